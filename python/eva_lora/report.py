"""What a run did: as members, as text, as JSON and as a page with pictures."""

import importlib.metadata
import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .layout import Grid
from .planning import EvaPlan
from .statistics import EvaStatistics, SiteStatistics

__all__ = ["EvaReport"]


@dataclass(frozen=True)
class EvaReport:
    """The result of :func:`eva_initialize`. Dicts are keyed by the layer's name in the base model.

    Attributes:
        ranks: The rank each layer has now; 0: its adapter is gone.
        configured_ranks: The rank each layer was configured with.
        explained_variance_ratio: Per layer, the ratio of every candidate component, descending; the first
            ``ranks[name]`` of them are in A.
        components_converged: How many leading components had converged.
        converged: Whether the layer as a whole had.
        shared_inputs: Layers fed by the same tensor, which share one statistic.
        statistic: Per layer: "kind", "reason" it was chosen, "nbytes", "rows" (what chose the rows that count) and
            "skipped_rows" (left out for NaN or Inf); where a layer has several matrices A (experts), those of all
            together, and "expert_rows", how many each of them saw. Empty where it saw no input.
        num_batches: Batches seen.
        num_rows: Unmasked rows (tokens) seen.
        seconds: Wall time: "total", "forward" (statistics included), "refresh".
        history: Per batch, how many layers had converged.
        stop_reason: Why the pass ended.
        budget: Ranks there were to give.
        config: The options of the run.
        notes: Layers and experts that EVA could not initialise from their own data, each with the reason.
    """

    ranks: dict[str, int]
    configured_ranks: dict[str, int]
    explained_variance_ratio: dict[str, tuple[float, ...]]
    components_converged: dict[str, int]
    converged: dict[str, bool]
    shared_inputs: list[list[str]]
    statistic: dict[str, dict[str, Any]]
    num_batches: int
    num_rows: int
    seconds: dict[str, float]
    history: list[int]
    stop_reason: str
    budget: int
    config: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, statistics: EvaStatistics, eva_plan: EvaPlan) -> "EvaReport":
        sites = statistics.sites
        sharing: dict[int, list[str]] = {}
        for site in sites:
            if len(site.inputs) == 1 and site.input >= 0:
                sharing.setdefault(site.input, []).append(site.name)
        return cls(
            ranks=eva_plan.ranks,
            configured_ranks={s.name: s.rank for s in sites},
            explained_variance_ratio={n: s.explained_variance_ratio for n, s in eva_plan.sites.items()},
            components_converged={s.name: s.components_converged for s in sites},
            converged={s.name: s.converged for s in sites},
            shared_inputs=[names for names in sharing.values() if len(names) > 1],
            statistic={s.name: _statistic(s, statistics) for s in sites},
            num_batches=statistics.num_batches,
            num_rows=statistics.num_rows,
            seconds=statistics.seconds,
            history=statistics.history,
            stop_reason=statistics.stop_reason,
            budget=eva_plan.budget,
            config=eva_plan.config.to_dict(),
            notes=eva_plan.notes,
        )  # fmt: skip

    def captured(self, name: str) -> float:
        """Share of the variance of a layer's input that its A keeps."""
        return sum(self.explained_variance_ratio[name][: self.ranks[name]])

    def facts(self) -> list[tuple[str, str]]:
        """The summary, as (label, value) pairs."""
        n = len(self.ranks)
        states = {tuple(names): self.statistic[names[0]] for names in self._inputs()}
        megabytes = sum(state.get("nbytes", 0) for state in states.values()) / 2**20
        kinds = [state["kind"] for state in states.values() for _ in state.get("expert_rows", [0]) if state]
        moved = sum(abs(self.ranks[k] - self.configured_ranks[k]) for k in self.ranks) // 2
        removed = sum(rank == 0 for rank in self.ranks.values())
        total = self.seconds["total"]
        return [
            ("layers", f"{n}, fed by {len(kinds)} distinct inputs"),
            ("ranks", f"{sum(self.ranks.values())} of a budget of {self.budget}; {moved} moved between layers"),
            ("without adapter", f"{removed} layers were given rank 0"),
            ("converged", f"{sum(self.converged.values())} of {n} layers; stopped: {self.stop_reason}"),
            ("data", f"{self.num_rows:,} rows in {self.num_batches} batches{self._left_out(states)}"),
            ("rows that count", "; ".join(sorted({state["rows"] for state in self.statistic.values() if state}))),
            ("time", f"{total:.1f} s, {self.seconds['refresh']:.1f} s of it small algebra after the forwards"),
            ("statistics", f"{kinds.count('gram')} exact, {kinds.count('subspace')} subspace; {megabytes:.1f} MiB"),
        ]

    def _left_out(self, states: dict[tuple[str, ...], dict[str, Any]]) -> str:
        skipped = sum(state.get("skipped_rows", 0) for state in states.values())
        return f"; {skipped:,} rows of layers' inputs left out for NaN or Inf" if skipped else ""

    def _inputs(self) -> list[list[str]]:
        shared = {name for names in self.shared_inputs for name in names}
        return self.shared_inputs + [[name] for name in self.ranks if name not in shared]

    def __str__(self) -> str:
        width = max(len(label) for label, _ in self.facts())
        lines = ["EVA initialisation", *(f"  {label:<{width}}  {value}" for label, value in self.facts())]
        notes = ["", "Notes", *(f"  {note}" for note in self.notes)] if self.notes else []
        return "\n".join([*lines, "", "Rank per layer", Grid.of(self.ranks).text(), *notes])

    def to_dict(self) -> dict[str, Any]:
        """Everything above, with the versions it was made with, ready for JSON."""
        return {"format_version": 1, **asdict(self), "versions": versions()}

    def save(self, folder: str | Path) -> Path:
        """Write ``report.json`` and ``report.html`` (self-contained, with plots); returns the folder."""
        from .page import render

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps(self.to_dict(), indent=1), encoding="utf-8")
        (folder / "report.html").write_text(render(self), encoding="utf-8")
        return folder


def _statistic(site: SiteStatistics, statistics: EvaStatistics) -> dict[str, Any]:
    entries = [statistics.inputs[index] for index in site.inputs if index >= 0]
    if not entries:
        return {}
    facts: dict[str, Any] = {
        "rows": site.rows, "kind": entries[0].kind, "reason": entries[0].reason,
        "nbytes": sum(entry.nbytes for entry in entries),
        "skipped_rows": sum(entry.skipped_rows for entry in entries),
    }  # fmt: skip
    if len(site.inputs) > 1:
        facts["expert_rows"] = [statistics.inputs[index].num_rows if index >= 0 else 0 for index in site.inputs]
    return facts


def versions() -> dict[str, str]:
    """The installed versions that a result depends on."""
    versions = {"python": platform.python_version()}
    for name in ("eva-kernels", "torch", "triton", "peft", "transformers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
