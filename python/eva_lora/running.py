"""The state of one pass, from the first batch to the statistics that come of it."""

import math
import time
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from eva_kernels.streaming_svd import GramStatistic, Statistic, SubspaceStatistic, bring_home_, finish_, refresh_

from .adapters import LoraAdapter
from .batches import ALL_ROWS, FITS_NO_MASK, RowMask
from .capture import Capture, Input
from .config import DEFAULT_MAX_BATCHES, DEFAULT_OVERSAMPLING, GRAM_MAX_WIDENING, REFRESH_PERIOD, EvaConfig
from .following import Following
from .measurements import Trace, peak_memory
from .restoring import without_autocast
from .statistics import EvaStatistics, InputStatistics, SiteStatistics

if TYPE_CHECKING:
    from .distributed import Pool, TensorParallel

__all__ = ["Run", "device_of"]

_KINDS: dict[str, type[GramStatistic] | type[SubspaceStatistic]] = {
    kind.kind: kind for kind in (GramStatistic, SubspaceStatistic)
}
SHOWN_INPUTS = 3

CountRows = Callable[[], dict[str, int]]  # layer -> rows


class Run:
    """What the hooks fill, when it is refreshed, when to stop, and what comes of it."""

    def __init__(
        self,
        adapter: LoraAdapter,
        config: EvaConfig,
        *,
        head: nn.Module | None = None,
        parallel: "TensorParallel | None" = None,
    ) -> None:
        self.config, self.left_alone = config, dict(adapter.left_alone)
        self.sites = [site if parallel is None else parallel.divided(site) for site in adapter.sites]
        self.following = Following(self.sites, config)
        oversampling = config.oversampling or DEFAULT_OVERSAMPLING[config.convergence]
        self.columns = [
            min(site.in_features, math.ceil(k * oversampling))
            for site, k in zip(self.sites, self.following.candidates.tolist(), strict=True)
        ]
        this = weakref.proxy(self)  # a cycle would keep the statistics' memory until the collector comes by
        self.capture = Capture(
            self.sites, self.columns, lambda stream: this._make_statistic(stream), share=config.share_inputs, head=head
        )
        self.capture.parallel = parallel
        self.gram_bytes = 0
        self.num_batches = self.num_rows = 0
        self.history: list[int] = []
        self.started = time.perf_counter()
        self.seconds = {"total": 0.0, "forward": 0.0, "statistics": 0.0, "refresh": 0.0}
        self.trace = Trace()
        self.stop_reason = ""
        self.rules: dict[str, set[str]] = {}  # layer -> what its rows were chosen by
        self.sides: dict[str, str] = {}  # layer of an encoder–decoder model -> which side its rows are of
        self.skipped_rows: dict[str, int] = {}  # layer -> rows left out for NaN or Inf
        self.pool: Pool | None = None  # of a pass that several ranks make together

    def _make_statistic(self, stream: int) -> tuple[Statistic, str]:
        index = self.capture.site_of[stream]
        site, config = self.sites[index], self.config
        width, columns = site.in_features, self.columns[index]
        gram_bytes = GramStatistic.predict_nbytes(width, columns)
        kind: type[GramStatistic] | type[SubspaceStatistic] = SubspaceStatistic
        if config.statistic != "auto":
            kind, reason = (GramStatistic if config.statistic == "gram" else SubspaceStatistic), "asked for"
        elif width > GRAM_MAX_WIDENING * columns:
            reason = f"wider than {GRAM_MAX_WIDENING} times its {columns} columns"
        elif config.memory_budget is not None and self.gram_bytes + gram_bytes > config.memory_budget:
            reason = f"memory_budget of {config.memory_budget} bytes is spent"
        else:
            kind, reason = GramStatistic, f"at most {GRAM_MAX_WIDENING} times as wide as its {columns} columns"
        if kind is GramStatistic:
            self.gram_bytes += gram_bytes
        return self.new_statistic(stream, kind.kind, columns), reason

    def new_statistic(self, stream: int, kind: str, columns: int) -> Statistic:
        """An empty statistic of a layer's input."""
        site = self.sites[self.capture.site_of[stream]]
        return _KINDS[kind](
            site.in_features, columns, device=device_of(site.module.modules()) or "cpu", seed=self.config.seed + stream,
            impl=self.config.impl, watch_gain=self.config.convergence == "captured",
        )  # fmt: skip

    def names(self, entry: Input) -> list[str]:
        """Of the layers fed by an input."""
        return list(dict.fromkeys(self.sites[self.capture.site_of[stream]].name for stream in entry.streams))

    def refresh_tells_nonfinite(self) -> bool:
        """Whether all inputs are refreshed after this batch, which finds NaN and Inf: one synchronisation does then."""
        return self.pool is None and all(map(self._is_due, self.capture.inputs))

    def require_finite(self, batch: int, count_rows: CountRows) -> None:
        """One synchronisation to see that neither NaN nor Inf has reached an input.

        Raises:
            ValueError: they have; inputs and rows are named.
        """
        reached = self._nonfinite_inputs()
        if not reached:
            return
        counts, named = count_rows(), []
        for entry in reached[:SHOWN_INPUTS]:
            names = self.names(entry)
            count = sum(counts.get(name, 0) for name in names)
            named.append(f"{', '.join(names)} ({count or 'an unknown number of'} rows)")
        more = f" and {len(reached) - SHOWN_INPUTS} other inputs" if len(reached) > SHOWN_INPUTS else ""
        raise ValueError(
            f"batch {batch}: NaN or Inf reached the input of {'; '.join(named)}{more}. "
            "Float16 overflows at 65504: bfloat16 or float32 may mend it; nonfinite='skip' leaves such rows out"
        )

    def _nonfinite_inputs(self) -> list[Input]:
        """The inputs that NaN or Inf has reached, found through their sums of squares."""
        inputs = self.capture.inputs
        if not inputs:
            return []
        bring_home_([entry.statistic for entry in inputs])
        device = inputs[0].statistic.square_sum.device
        sums = torch.stack([_sum_of(entry).to(device) for entry in inputs])
        if bool(sums.sum().isfinite()):
            return []
        return [entry for entry, ok in zip(inputs, sums.isfinite().tolist(), strict=True) if not ok]

    def finish_batch(self, mask: RowMask, count_rows: CountRows = dict) -> None:
        """After a forward: refresh what has enough new rows, all layers together; decide; check the bounds.

        ``count_rows``: rows of the batch that hold NaN or Inf, by layer; asked for where a refresh finds some.
        """
        self.num_batches += 1
        for name, rule in mask.rules.items():
            self.rules.setdefault(name, set()).add(rule)
        for entry in self.capture.inputs:
            names = self.names(entry)
            if len(names) == 1:
                continue
            # What the first layer fed by an input found out holds for the others.
            rules = set[str]().union(*(self.rules.get(name, ()) for name in names))
            self.rules.update({name: set(rules) for name in names})
            side = next((self.sides[name] for name in names if name in self.sides), None)
            if side is not None:
                self.sides.update(dict.fromkeys(names, side))
        for name, count in mask.skipped.items():
            self.skipped_rows[name] = self.skipped_rows.get(name, 0) + count
        self.num_rows += self.capture.rows_in_batch
        self.capture.rows_in_batch = 0
        if self.num_rows:
            self._check_called()
            self._refresh([entry for entry in self.capture.inputs if self._is_due(entry)], count_rows)
        self.history.append(self.following.num_done)
        limit = self.config.max_batches or DEFAULT_MAX_BATCHES
        if self.following.all_done:
            self.stop_reason = "all layers converged"
        elif self.num_batches >= limit:
            self.stop_reason = f"max_batches ({limit})"
        elif self.config.max_rows is not None and self.num_rows >= self.config.max_rows:
            self.stop_reason = f"max_rows ({self.config.max_rows})"

    def _is_due(self, entry: Input) -> bool:
        """Whether an input has enough new data for a refresh.

        A step from fewer rows than columns would pass the convergence test for being small. Refreshes come after
        1, 2, 4, 8, … batches, and every ``REFRESH_PERIOD`` from then on.
        """
        statistic = entry.statistic
        if statistic.pending_rows < statistic.num_components:
            return False
        period = REFRESH_PERIOD[self.config.convergence]
        return entry.pending_batches >= min(2 ** max(statistic.num_refreshes - 1, 0), period)

    def _check_called(self) -> None:
        silent = self.silent()
        if silent and self.config.uncalled == "error":
            raise ValueError(
                f"model: {len(silent)} LoRA layers saw no input in the first batch: {', '.join(silent)}. Their "
                "statistics would stay empty; leave them out of target_modules, feed batches that reach them, or "
                'set uncalled="default", with which layers that see none keep their initial A.'
            )

    def silent(self) -> list[str]:
        """Names of the sites that have seen no input."""
        heard = {site for site, entry in zip(self.capture.site_of, self.capture.input_of, strict=True) if entry}
        return [site.name for i, site in enumerate(self.sites) if i not in heard]

    def _rows_of(self, site: int) -> int | None:
        """Rows that a site's inputs hold; None where it was not called."""
        entries = [self.capture.input_of[stream] for stream in self.capture.streams_of[site]]
        counts = [entry.statistic.num_rows for entry in entries if entry is not None]
        return sum(counts) if counts else None

    def _refresh(self, inputs: list[Input], count_rows: CountRows = dict) -> None:
        if not inputs:
            return
        tick = time.perf_counter()
        with without_autocast(inputs[0].statistic.basis.device):
            statistics = [entry.statistic for entry in inputs]
            refreshed = refresh_(statistics) if self.pool is None else self.pool.refresh_(inputs)
        for entry, result in zip(inputs, refreshed, strict=True):
            entry.pending_batches = 0
            if not result.finite:
                self.require_finite(self.num_batches, count_rows)
                names = ", ".join(self.names(entry))
                raise ValueError(f"batch {self.num_batches}: the products of the input of {names} overflow float32")
        done = self.following.decide(self.capture, inputs, refreshed)
        self.trace.record(self.num_batches, self.num_rows, *self.following.standing)
        self.capture.wanted = set(range(len(self.sites))) - (set() if self.config.equal_data else done)
        self.seconds["refresh"] += time.perf_counter() - tick

    def result(self) -> EvaStatistics:
        """Close the books: last refreshes, the exact eigensolve of every Gram, a warning if need be."""
        if self.pool is not None:
            self.pool.gather_facts(final=True)
        if self.num_rows == 0:
            raise ValueError(
                f"loader: {self.num_batches} batches held no unmasked row; check attention_mask, and labels "
                f"against label_mask_value ({self.config.label_mask_value}) or set use_label_mask=False"
            )
        empty = [site.name for i, site in enumerate(self.sites) if self._rows_of(i) == 0]
        if empty:
            raise ValueError(
                f"loader: {self.num_batches} batches held no row that counts for {', '.join(empty)}: all were masked, "
                "or left out for NaN or Inf"
            )
        self._refresh([e for e in self.capture.inputs if e.statistic.pending_rows])
        decision, members = self.following.decision, self.following.members
        if decision is None:
            raise ValueError(f"model: none of its {len(self.sites)} LoRA layers saw an unmasked row: {self.silent()}")
        tick = time.perf_counter()
        if self.pool is None:
            finish_([entry.statistic for entry in self.capture.inputs])
        else:
            self.pool.finish_(self.capture.inputs)
        self.seconds["refresh"] += time.perf_counter() - tick
        self.seconds["total"] = time.perf_counter() - self.started
        self.seconds["statistics"] = self.capture.seconds
        self.history[-1] = self.following.num_done
        done = dict(zip(members, decision.done, strict=True))
        converged = dict(zip(members, decision.components_converged, strict=True))
        is_speaker = self.pool is None or self.pool.ranks.rank == 0
        astray = [name for name, rules in self.rules.items() if FITS_NO_MASK in rules]
        if astray and is_speaker:
            warnings.warn(
                f"the inputs of {len(astray)} layers, the first is {astray[0]}, have rows that fit no mask of the "
                "batch; all of their rows counted, padding included; see report.statistic[name]['rows']",
                stacklevel=4,
            )
        pending = int((~decision.done).sum())
        if pending and is_speaker:
            warnings.warn(
                f"EVA stopped at {self.stop_reason}, after {self.num_batches} batches and {self.num_rows} rows, with "
                f"{pending} of {len(self.sites)} layers not converged; see report.converged",
                stacklevel=5,
            )
        return EvaStatistics(
            sites=[
                SiteStatistics(
                    name=site.name, inputs=self._inputs_of(i), rank=site.rank, in_features=site.in_features,
                    converged=bool(done.get(i, False)), components_converged=int(converged.get(i, 0)),
                    rank_multiple=site.rank_multiple, removable=site.removable, rows=self._rows(site.name),
                )
                for i, site in enumerate(self.sites)
            ],
            inputs=[self._input_statistics(entry) for entry in self.capture.inputs],
            config=self.config, num_batches=self.num_batches, num_rows=self.num_rows, seconds=self.seconds,
            history=self.history, stop_reason=self.stop_reason, notes=self._notes(), trace=self.trace,
            peak_memory=peak_memory(),
        )  # fmt: skip

    def _inputs_of(self, site: int) -> tuple[int, ...]:
        index = {id(entry): i for i, entry in enumerate(self.capture.inputs)}
        entries = [self.capture.input_of[stream] for stream in self.capture.streams_of[site]]
        return tuple(-1 if entry is None else index[id(entry)] for entry in entries)

    def _rows(self, name: str) -> str:
        rules = self.rules.get(name, set())
        return "; ".join(sorted(rules - {ALL_ROWS} or rules))

    def _notes(self) -> tuple[str, ...]:
        left_alone = [f"{name} is not initialised by EVA: {reason}" for name, reason in self.left_alone.items()]
        return (*left_alone, *(f"{name} saw no input: it keeps its rank and its initial A" for name in self.silent()))

    def _input_statistics(self, entry: Input) -> InputStatistics:
        statistic = entry.statistic
        return InputStatistics(
            kind=statistic.kind, num_rows=statistic.num_rows, total_scatter=float(statistic.total_scatter()),
            nbytes=statistic.nbytes(), reason=entry.reason,
            skipped_rows=sum(self.skipped_rows.get(name, 0) for name in self.names(entry)),
            eigenvalues=statistic.eigenvalues.cpu(), components=statistic.basis.T.float().cpu().contiguous(),
        )  # fmt: skip


def _sum_of(entry: Input) -> torch.Tensor:
    """A number that NaN or Inf in any row of an input has reached."""
    return entry.statistic.square_sum if entry.sketch is None else entry.sketch.total.sum()


def device_of(modules: Iterable[nn.Module]) -> torch.device | None:
    """Where modules compute: the device of their first parameter or buffer that is on one, or, of weights that are
    loaded as they are needed, where their hook says. None where nothing tells."""
    modules = list(modules)
    hooks = [vars(module)["_hf_hook"] for module in modules if "_hf_hook" in vars(module)]
    told = next((hook.execution_device for hook in hooks if getattr(hook, "execution_device", None) is not None), None)
    if told is not None:
        return torch.device(told)
    tensors = (t for name in ("_parameters", "_buffers") for module in modules for t in vars(module)[name].values())
    return next((tensor.device for tensor in tensors if tensor is not None and tensor.device.type != "meta"), None)
