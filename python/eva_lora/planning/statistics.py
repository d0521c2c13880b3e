"""What a pass over the data leaves behind, and all that planning needs: no model, no data."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eva_kernels.low_rank_fit import SecondMoment

from ..config import EvaConfig
from . import storage
from .trace import Trace


@dataclass(frozen=True)
class SiteStatistics:
    """One LoRA layer as the pass saw it.

    Attributes:
        name: The layer's name in the base model.
        inputs: For each of its matrices A, the index of its input in ``EvaStatistics.inputs``, −1 where it saw
            none. Layers fed the same tensor share one; a layer of experts has one for each expert.
        rank: The rank it was configured with.
        in_features: Width of its input.
        converged: Whether its components had converged when the pass ended.
        components_converged: How many leading components had.
        rank_multiple: What its rank must be a multiple of.
        removable: Whether its rank may become 0.
        rows: What chose the rows of its input that count: "all rows", "attention_mask and labels", ...
        parameters: Of its A and B together, for each unit of its rank; 0: not known.
    """

    name: str
    inputs: tuple[int, ...]
    rank: int
    in_features: int
    converged: bool
    components_converged: int
    rank_multiple: int = 1
    removable: bool = True
    rows: str = ""
    parameters: int = 0

    @property
    def input(self) -> int:
        """The first of its inputs that saw anything; −1 if none did."""
        return next((index for index in self.inputs if index >= 0), -1)


@dataclass(frozen=True)
class InputStatistics:
    """One distinct layer input.

    Attributes:
        kind: "gram" (exact) or "subspace".
        num_rows: Unmasked rows it is computed from.
        total_scatter: Σ ‖x − mean‖² over those rows.
        nbytes: Memory its state took during the pass.
        reason: Why this kind was chosen.
        skipped_rows: Rows left out because they held NaN or Inf (``nonfinite="skip"``).
        eigenvalues: (q,) float64, of the centred scatter, descending.
        components: (q, d) float32, orthonormal rows: the leading principal directions.
        mean: (d,) float32, of the rows.
        moment: (d, d) float64, E[x xᵀ] of the rows, not centred; None unless it was asked for (``keep_moments``).
    """

    kind: str
    num_rows: int
    total_scatter: float
    nbytes: int
    reason: str
    skipped_rows: int
    eigenvalues: Tensor
    components: Tensor
    mean: Tensor
    moment: Tensor | None = None

    def second_moment(self, *, centred: bool = False) -> SecondMoment:
        """E[x xᵀ] of the rows, or their covariance: as far as it is known.

        That is R = QΛQᵀ + τ(I − QQᵀ) + x̄x̄ᵀ with the components Q and τ the mean variance of the other directions;
        exact where there are none. In float32.
        """
        rows, left = max(1, self.num_rows), self.components.shape[1] - len(self.eigenvalues)
        variances = self.eigenvalues / rows
        rest = max(0.0, self.total_scatter / rows - float(variances.sum())) / left if left else 0.0
        factor = self.components.T.double() * (variances - rest).clamp_min(0).sqrt()
        if not centred:
            factor = torch.cat([factor, self.mean.double()[:, None]], 1)
        return SecondMoment(factor.float(), torch.full((), rest, dtype=torch.float32, device=factor.device))

    def explained_variance_ratio(self) -> Tensor:  # (q,) float64
        """Eigenvalues over the total scatter of all directions, kept or not (PEFT's ratio, not eq. 6)."""
        total = max(self.total_scatter, float(self.eigenvalues.sum()))
        return self.eigenvalues / total if total > 0 else torch.zeros_like(self.eigenvalues)

    def check(self, index: int) -> None:
        """Raise ValueError unless the numbers can be those of a statistic."""
        values, rows = self.eigenvalues, self.components
        if (
            values.ndim != 1
            or rows.ndim != 2
            or rows.shape[0] != values.shape[0]
            or not 0 < len(values) <= rows.shape[1]
        ):
            raise ValueError(
                f"input {index}: expected eigenvalues (q,) and components (q, d) with 1 ≤ q ≤ d, got shapes "
                f"{tuple(values.shape)} and {tuple(rows.shape)}"
            )
        if values.dtype != torch.float64 or rows.dtype != torch.float32:
            raise ValueError(f"input {index}: expected float64 and float32, got {values.dtype} and {rows.dtype}")
        if self.mean.shape != rows.shape[1:] or self.mean.dtype != torch.float32:
            raise ValueError(
                f"input {index}: expected a float32 mean ({rows.shape[1]},), got {self.mean.dtype} of shape "
                f"{tuple(self.mean.shape)}"
            )
        kept = self.moment
        if kept is not None and (kept.shape != (rows.shape[1],) * 2 or kept.dtype != torch.float64):
            raise ValueError(
                f"input {index}: expected a float64 moment of width {rows.shape[1]}, got {kept.dtype} of shape "
                f"{tuple(kept.shape)}"
            )
        parts = (values, rows, self.mean, *(() if kept is None else (kept,)))
        finite = all(bool(tensor.isfinite().all()) for tensor in parts)
        if not (finite and bool((values >= 0).all())):
            raise ValueError(f"input {index}: expected finite components and mean, and eigenvalues of at least 0")
        if min(self.num_rows, self.nbytes, self.skipped_rows) < 0 or not 0 <= self.total_scatter < float("inf"):
            raise ValueError(f"input {index}: its totals are out of range")


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
        notes: Layers that it does not cover, each with the reason.
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
    notes: tuple[str, ...] = ()
    trace: Trace = field(default_factory=Trace)
    peak_memory: dict[str, int] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write to one safetensors file; returns its path."""
        tensors, facts = {}, self._facts()
        for i, entry in enumerate(self.inputs):
            tensors[f"{i}.eigenvalues"] = entry.eigenvalues
            tensors[f"{i}.components"] = entry.components
            tensors[f"{i}.mean"] = entry.mean
            if entry.moment is not None:
                tensors[f"{i}.moment"] = entry.moment
        return storage.save(path, "statistics", tensors, facts)

    @classmethod
    def load(cls, path: str | Path) -> "EvaStatistics":
        """Read what :meth:`save` wrote; raises as :func:`eva_lora.planning.storage.load` does."""
        tensors, facts = storage.load(path, "statistics")
        try:
            inputs = [
                storage.checked(
                    InputStatistics,
                    entry,
                    eigenvalues=tensors.pop(f"{i}.eigenvalues"),
                    components=tensors.pop(f"{i}.components"),
                    mean=tensors.pop(f"{i}.mean"),
                    moment=tensors.pop(f"{i}.moment", None),
                )
                for i, entry in enumerate(facts.pop("inputs"))
            ]
            sites = [storage.checked(SiteStatistics, entry) for entry in facts.pop("sites")]
            config = EvaConfig.from_dict(facts.pop("config"))
            trace = storage.checked(Trace, facts.pop("trace"))
            statistics = storage.checked(cls, facts, sites=sites, inputs=inputs, config=config, trace=trace)
            statistics._check(tensors)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"path: {path} is no complete statistics file: {error}") from error
        return statistics

    def _facts(self) -> dict[str, Any]:
        names = ("kind", "num_rows", "total_scatter", "nbytes", "reason", "skipped_rows")
        return {
            "sites": [asdict(site) for site in self.sites],
            "inputs": [{name: getattr(entry, name) for name in names} for entry in self.inputs],
            "config": self.config.to_dict(),
            "num_batches": self.num_batches,
            "num_rows": self.num_rows,
            "seconds": self.seconds,
            "history": self.history,
            "stop_reason": self.stop_reason,
            "notes": self.notes,
            "trace": asdict(self.trace),
            "peak_memory": self.peak_memory,
        }

    def _check(self, unknown: dict[str, Tensor]) -> None:
        """Raise ValueError where the parts of a file do not fit together."""
        names = [site.name for site in self.sites]
        if not names or len(set(names)) < len(names):
            raise ValueError("expected sites of different names")
        if unknown:
            raise ValueError(f"unknown tensors {sorted(unknown)}")
        if min(self.num_batches, self.num_rows) < 0 or not {"total", "forward", "refresh"} <= set(self.seconds):
            raise ValueError("its totals are out of range or incomplete")
        for i, entry in enumerate(self.inputs):
            entry.check(i)
        for site in self.sites:
            if not site.inputs or not all(-1 <= index < len(self.inputs) for index in site.inputs):
                raise ValueError(f"site {site.name} names inputs {site.inputs} of {len(self.inputs)}")
            for width in {self.inputs[index].components.shape[1] for index in site.inputs if index >= 0}:
                if site.in_features != width:
                    raise ValueError(f"components of {site.name} have width {width}, expected {site.in_features}")
            if (
                min(site.rank, site.rank_multiple, site.in_features) < 1
                or min(site.components_converged, site.parameters) < 0
            ):
                raise ValueError(f"site {site.name} has rank {site.rank}, expected at least 1")
