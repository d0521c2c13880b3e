"""What a pass over the data leaves behind, and all that planning needs: no model, no data."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import storage
from .config import EvaConfig
from .measurements import Trace


@dataclass(frozen=True)
class SiteStatistics:
    """One LoRA layer as the pass saw it.

    Attributes:
        name: The layer's name in the base model.
        input: Index of its input in :attr:`EvaStatistics.inputs`; layers fed the same tensor share one.
        rank: The rank it was configured with.
        in_features: Width of its input.
        converged: Whether its components had converged when the pass ended.
        components_converged: How many leading components had.
    """

    name: str
    input: int
    rank: int
    in_features: int
    converged: bool
    components_converged: int


@dataclass(frozen=True)
class InputStatistics:
    """One distinct layer input.

    Attributes:
        kind: "gram" (exact) or "subspace".
        num_rows: Unmasked rows it is computed from.
        total_scatter: Σ ‖x − mean‖² over those rows.
        nbytes: Memory its state took during the pass.
        reason: Why this kind was chosen.
        eigenvalues: (q,) float64, of the centred scatter, descending.
        components: (q, d) float32, orthonormal rows: the leading principal directions.
    """

    kind: str
    num_rows: int
    total_scatter: float
    nbytes: int
    reason: str
    eigenvalues: Tensor
    components: Tensor

    def explained_variance_ratio(self) -> Tensor:  # (q,) float64
        """Eigenvalues over the total scatter of all directions, kept or not (PEFT's ratio, not eq. 6)."""
        total = max(self.total_scatter, float(self.eigenvalues.sum()))
        return self.eigenvalues / total if total > 0 else torch.zeros_like(self.eigenvalues)


@dataclass(frozen=True)
class EvaStatistics:
    """The result of :func:`eva_lora.collect`.

    Attributes:
        sites: One entry per LoRA layer.
        inputs: One entry per distinct layer input.
        config: The configuration of the pass.
        num_batches: Batches seen.
        num_rows: Unmasked rows (tokens) seen, each counted once.
        seconds: Wall time: "total", and its parts "forward" (statistics included), "statistics" (of the
            forward, folding rows in; on a GPU only launching that) and "refresh".
        history: Per batch, how many sites had converged.
        stop_reason: Why the pass ended.
        trace: Per batch with a refresh, how each site's components agreed with those before.
        peak_memory: Device → most bytes in use at once up to the pass's end.
    """

    sites: list[SiteStatistics]
    inputs: list[InputStatistics]
    config: EvaConfig
    num_batches: int
    num_rows: int
    seconds: dict[str, float] = field(default_factory=dict)
    history: list[int] = field(default_factory=list)
    stop_reason: str = ""
    trace: Trace = field(default_factory=Trace)
    peak_memory: dict[str, int] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write to one safetensors file; returns its path."""
        tensors, facts = {}, self._facts()
        for i, entry in enumerate(self.inputs):
            tensors[f"{i}.eigenvalues"] = entry.eigenvalues
            tensors[f"{i}.components"] = entry.components
        return storage.save(path, "statistics", tensors, facts)

    @classmethod
    def load(cls, path: str | Path) -> "EvaStatistics":
        """Read what :meth:`save` wrote; raises as :func:`eva_lora.storage.load` does."""
        tensors, facts = storage.load(path, "statistics")
        try:
            inputs = [
                InputStatistics(**entry, eigenvalues=tensors[f"{i}.eigenvalues"], components=tensors[f"{i}.components"])
                for i, entry in enumerate(facts.pop("inputs"))
            ]
            sites = [SiteStatistics(**entry) for entry in facts.pop("sites")]
            trace = Trace(**facts.pop("trace", {}))
            statistics = cls(
                sites=sites, inputs=inputs, config=EvaConfig.from_dict(facts.pop("config")), trace=trace, **facts
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"path: {path} is no complete statistics file: {error}") from error
        statistics._check(path)
        return statistics

    def _facts(self) -> dict[str, Any]:
        names = ("kind", "num_rows", "total_scatter", "nbytes", "reason")
        return {
            "sites": [asdict(site) for site in self.sites],
            "inputs": [{name: getattr(entry, name) for name in names} for entry in self.inputs],
            "config": self.config.to_dict(),
            "num_batches": self.num_batches,
            "num_rows": self.num_rows,
            "seconds": self.seconds,
            "history": self.history,
            "stop_reason": self.stop_reason,
            "trace": asdict(self.trace),
            "peak_memory": self.peak_memory,
        }

    def _check(self, path: str | Path) -> None:
        for site in self.sites:
            if not 0 <= site.input < len(self.inputs):
                raise ValueError(f"path: {path}: site {site.name} names input {site.input} of {len(self.inputs)}")
            entry = self.inputs[site.input]
            expected = (entry.eigenvalues.numel(), site.in_features)
            if entry.components.shape != expected:
                raise ValueError(
                    f"path: {path}: components of {site.name} have shape {tuple(entry.components.shape)}, "
                    f"expected {expected}"
                )
