"""Two initialisations of the same layers, side by side: how far their subspaces overlap, how ranks differ."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from eva_kernels._double import double

from ..planning import EvaPlan

__all__ = ["Comparison", "compare", "load_directions"]

ADAPTER_FILE = "adapter_model.safetensors"
PLAN_FILE = "plan.safetensors"


@dataclass(frozen=True)
class Comparison:
    """The result of :func:`compare`; layers in the first run's order.

    Attributes:
        ranks: Layer → its rank in the first and in the second run; 0 where it has no adapter.
        overlap: Layer → share of the smaller row space that lies in the larger, in [0, 1]; None where a rank
            is 0. Two random subspaces of ranks r and s in d dimensions share max(r, s) / d of it on average.
    """

    ranks: dict[str, tuple[int, int]]
    overlap: dict[str, float | None]

    @property
    def mean_overlap(self) -> float | None:
        """Over all layers that have one, each counted with its smaller rank."""
        weights = {name: min(self.ranks[name]) for name, value in self.overlap.items() if value is not None}
        total = sum(weights.values())
        return sum((self.overlap[name] or 0.0) * w for name, w in weights.items()) / total if total else None

    @property
    def moved(self) -> int:
        """Ranks that the second run gives to other layers than the first, which is half the sum of differences."""
        return sum(abs(a - b) for a, b in self.ranks.values()) // 2

    def to_dict(self) -> dict[str, Any]:
        """As ``eva-lora compare --json`` prints it."""
        layers = {
            name: {"ranks": list(self.ranks[name]), "overlap": self.overlap[name]} for name in self.ranks
        }  # fmt: skip
        return {"mean_overlap": self.mean_overlap, "moved": self.moved, "layers": layers}


def compare(first: EvaPlan | Mapping[str, Tensor], second: EvaPlan | Mapping[str, Tensor]) -> Comparison:
    """Compare the row spaces of two runs' A matrices, layer by layer.

    Args:
        first, second: Plans, or layer → A of shape (rank, d), any floating dtype; rows need not be orthonormal.

    Raises:
        ValueError: no layer is in both, or a layer's A have different widths.
    """
    a, b = ({**run.lora_a} if isinstance(run, EvaPlan) else dict(run) for run in (first, second))
    if a.keys().isdisjoint(b):
        raise ValueError("second: expected a run of the same model, it shares no layer with the first")
    ranks, overlap = {}, {}
    for name in dict.fromkeys([*a, *b]):
        left, right = a.get(name), b.get(name)
        ranks[name] = (0 if left is None else len(left), 0 if right is None else len(right))
        overlap[name] = _overlap(name, left, right)
    return Comparison(ranks, overlap)


def _overlap(name: str, left: Tensor | None, right: Tensor | None) -> float | None:
    if left is None or right is None or not len(left) or not len(right):
        return None
    if left.shape[1] != right.shape[1]:
        raise ValueError(f"second: A of {name} has width {right.shape[1]}, in the first run {left.shape[1]}")
    bases = [torch.linalg.qr(double(matrix).T).Q for matrix in (left, right)]
    return min(1.0, float((bases[0].T @ bases[1]).square().sum()) / min(len(left), len(right)))


def load_directions(path: str | Path) -> dict[str, Tensor]:
    """Layer → A, from a plan file, a PEFT adapter folder, or a folder that holds ``plan.safetensors``.

    Raises:
        FileNotFoundError: there is none of these.
        ValueError: a damaged file, or no LoRA weights in it.
    """
    path = Path(path)
    if (path / PLAN_FILE).is_file():
        path = path / PLAN_FILE
    if path.is_file():
        plan = EvaPlan.load(path)
        return {name: plan.lora_a[name] for name in plan.sites}  # in the model's order
    for folder in (path, path / "adapter"):
        if (folder / ADAPTER_FILE).is_file():
            return _adapter_directions(folder / ADAPTER_FILE)
    raise FileNotFoundError(f"path: {path} is no plan file, and holds neither {PLAN_FILE} nor {ADAPTER_FILE}")


def _adapter_directions(file: Path) -> dict[str, Tensor]:
    try:
        with torch.device("cpu"):  # whatever the process's default is
            weights = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"path: {file} is damaged: {error}") from error
    ending = ".lora_A.weight"
    found = {
        key.removeprefix("base_model.model.").removesuffix(ending): value.flatten(1)
        for key, value in weights.items()
        if key.endswith(ending)
    }
    if not found:
        raise ValueError(f"path: {file} holds no LoRA weights")
    return found
