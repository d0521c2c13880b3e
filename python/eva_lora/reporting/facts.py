"""What a run did, as members and as text: all that figures and pages are drawn from."""

from dataclasses import dataclass, field
from statistics import median
from typing import Any, TypeVar

from ..planning import EvaPlan, EvaStatistics, SiteStatistics, Trace, command_line, feature_gain, versions
from .layout import Grid

__all__ = ["ReportFacts"]

F = TypeVar("F", bound="ReportFacts")


@dataclass(frozen=True)
class ReportFacts:
    """What there is to report. Dicts are keyed by the layer's name in the base model.

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
        seconds: Wall time: "total", and of it "forward" (statistics included), "statistics" (of the forward,
            folding rows in; on a GPU only launching that) and "refresh" (the small algebra in between).
        history: Per batch, how many layers had converged.
        stop_reason: Why the pass ended.
        budget: Ranks there were to give.
        config: The options of the run.
        notes: Layers and experts that EVA could not initialise from their own data, each with the reason.
        in_features: Width of each layer's input.
        trace: Per batch with a refresh, how each layer's components agreed with those before; layers in the
            order of ``ranks``.
        peak_memory: Device → most bytes in use at once up to the end of the pass.
        feature_gain: Layer → how many times as large the features are that its A gives B as those of PEFT's default A
            (:func:`eva_lora.feature_gain`); of layers that have an A from data.
        run: What was run, as label → text: "command", "model", "data" and so on, as far as known.
        versions: Of what the result depends on.
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
    in_features: dict[str, int] = field(default_factory=dict)
    trace: Trace = field(default_factory=Trace)
    peak_memory: dict[str, int] = field(default_factory=dict)
    feature_gain: dict[str, float] = field(default_factory=dict)
    run: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=versions)

    @classmethod
    def of(cls: type[F], statistics: EvaStatistics, eva_plan: EvaPlan, run: dict[str, str] | None = None) -> F:
        """The report of a pass and the plan made from it.

        Args:
            statistics, eva_plan: The pass's, and the plan's for the same layers.
            run: Facts for :attr:`run`. None: the command line, where there is one.
        """
        sites = statistics.sites
        sharing: dict[int, list[str]] = {}
        for site in sites:
            if len(site.inputs) == 1 and site.input >= 0:
                sharing.setdefault(site.input, []).append(site.name)
        command = command_line()
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
            in_features={s.name: s.in_features for s in sites},
            trace=statistics.trace,
            peak_memory=statistics.peak_memory,
            feature_gain=feature_gain(statistics, eva_plan.lora_a) if eva_plan.lora_a else {},
            run=run if run is not None else ({"command": command} if command else {}),
        )

    def captured(self, name: str) -> float:
        """Share of the variance of a layer's input that its A keeps."""
        return sum(self.explained_variance_ratio[name][: self.ranks[name]])

    def inputs(self) -> list[list[str]]:
        """The layers of each distinct input, shared ones first."""
        shared = {name for names in self.shared_inputs for name in names}
        return self.shared_inputs + [[name] for name in self.ranks if name not in shared]

    def warnings(self) -> list[str]:
        """What deserves a second look, as sentences."""
        found = []
        waiting = [name for name, converged in self.converged.items() if not converged]
        if waiting:
            found.append(
                f"{len(waiting)} of {len(self.ranks)} layers had not converged when the pass ended at "
                f"{self.stop_reason}: {_some(waiting)}. More batches, or a lower tau, would let them."
            )
        removed = [name for name, rank in self.ranks.items() if rank == 0]
        if removed:
            found.append(
                f"{len(removed)} layers were given rank 0 and have no adapter any more: {_some(removed)}. "
                "min_rank=1 keeps one everywhere."
            )
        constant = [name for name, ratios in self.explained_variance_ratio.items() if ratios and not any(ratios)]
        if constant:
            found.append(f"The inputs of {len(constant)} layers did not vary at all: {_some(constant)}.")
        widest = max(self.in_features.values(), default=0)
        if self.num_rows < widest:
            found.append(
                f"Only {self.num_rows:,} rows were seen, fewer than the widest input has features ({widest:,}): "
                "its directions rest on little data."
            )
        return [*found, *self.notes]

    def facts(self) -> list[tuple[str, str]]:
        """The summary, as (label, value) pairs."""
        n = len(self.ranks)
        states = [self.statistic[names[0]] for names in self.inputs()]
        megabytes = sum(state.get("nbytes", 0) for state in states) / 2**20
        kinds = [state["kind"] for state in states for _ in state.get("expert_rows", [0]) if state]
        moved = sum(abs(self.ranks[k] - self.configured_ranks[k]) for k in self.ranks) // 2
        removed = sum(rank == 0 for rank in self.ranks.values())
        total = self.seconds["total"]
        return [
            ("layers", f"{n}, fed by {len(kinds)} distinct inputs"),
            ("ranks", f"{sum(self.ranks.values())} of a budget of {self.budget}; {moved} moved between layers"),
            ("without adapter", f"{removed} layers were given rank 0"),
            ("converged", f"{sum(self.converged.values())} of {n} layers; stopped: {self.stop_reason}"),
            ("data", f"{self.num_rows:,} rows in {self.num_batches} batches{self._left_out(states)}"),
            ("feature gain", self._gains()),
            ("rows that count", "; ".join(sorted({state["rows"] for state in self.statistic.values() if state}))),
            ("time", f"{total:.1f} s, {self.seconds['refresh']:.1f} s of it small algebra after the forwards"),
            ("statistics", f"{kinds.count('gram')} exact, {kinds.count('subspace')} subspace; {megabytes:.1f} MiB"),
        ]

    def _gains(self) -> str:
        gains = self.feature_gain.values()
        if not gains:
            return "none: no layer has an A from data"
        return f"{median(gains):.3g} in the median layer, {min(gains):.3g} to {max(gains):.3g} (PEFT's default A: 1)"

    def _left_out(self, states: list[dict[str, Any]]) -> str:
        skipped = sum(state.get("skipped_rows", 0) for state in states)
        return f"; {skipped:,} rows of layers' inputs left out for NaN or Inf" if skipped else ""

    def __str__(self) -> str:
        width = max(len(label) for label, _ in self.facts())
        lines = ["EVA initialisation", *(f"  {label:<{width}}  {value}" for label, value in self.facts())]
        lines += [f"  ! {warning}" for warning in self.warnings()]
        return "\n".join([*lines, "", "Rank per layer", Grid.of(self.ranks).text()])


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


def _some(names: list[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
