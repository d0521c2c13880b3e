"""The state of one pass, from the first batch to the statistics that come of it."""

import math
import time
import warnings
from collections.abc import Callable

import torch

from eva_kernels.streaming_svd import bring_home_

from ..adapters import LoraAdapter
from ..config import DEFAULT_MAX_BATCHES, REFRESH_PERIOD, EvaConfig
from ..planning import Trace
from .capture import Capture
from .convergence import LayerConvergence
from .ending import ForwardEnd
from .inputs import DistinctInput
from .local import LocalStatistics
from .making import StatisticMaker
from .restoring import without_autocast
from .row_rules import RowRules
from .rows import RowMask
from .tensor_parallel import TensorParallel

__all__ = ["Run"]

SHOWN_INPUTS = 3

CountRows = Callable[[], dict[str, int]]  # layer -> rows


class Run:
    """What the hooks fill, when it is refreshed, and when to stop.

    Args:
        adapter: Whose layers' inputs are looked at.
        config: Of the run.
        end: Decides where forwards may end. None: at their own.
        parallel: The ranks that layers are split over, if they are.
        maker: Makes the statistics.
        watches: Whether forwards are somebody else's: they end by themselves, and not each has to reach every layer.
    """

    def __init__(
        self,
        adapter: LoraAdapter,
        config: EvaConfig,
        *,
        end: ForwardEnd | None = None,
        parallel: TensorParallel | None = None,
        maker: type[StatisticMaker] = StatisticMaker,
        watches: bool = False,
    ) -> None:
        self._watches = watches
        self.config, self.left_alone = config, dict(adapter.left_alone)
        self.invocation: list[int] | None = getattr(adapter, "invocation", None)
        self.sites = [site if parallel is None else parallel.divided(site) for site in adapter.sites]
        self.convergence = LayerConvergence(self.sites, config)
        self.maker = maker(self.sites, self.convergence.candidates.tolist(), config)
        self.capture = Capture(
            self.sites, self.maker.columns, self.maker.make, share=config.share_inputs, end=end, parallel=parallel
        )
        self.statistics = LocalStatistics()
        self.row_rules = RowRules()
        self.num_batches = self.num_rows = 0
        self.history: list[int] = []
        self.started = time.perf_counter()
        self.seconds = {"total": 0.0, "forward": 0.0, "statistics": 0.0, "refresh": 0.0}
        self.trace = Trace()
        self.stop_reason = ""

    def names(self, entry: DistinctInput) -> list[str]:
        """Of the layers fed by an input."""
        return list(dict.fromkeys(self.sites[self.capture.site_of[stream]].name for stream in entry.streams))

    def refresh_tells_nonfinite(self) -> bool:
        """Whether all inputs are refreshed after this batch, which finds NaN and Inf: one synchronisation does then."""
        return self.statistics.size == 1 and all(map(self._is_due, self.capture.inputs))

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

    def _nonfinite_inputs(self) -> list[DistinctInput]:
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
        self.row_rules.take(mask, map(self.names, self.capture.inputs))
        self.num_rows += self.capture.rows_in_batch
        self.capture.rows_in_batch = 0
        if self.num_rows:
            if not self._watches:
                self.require_called()
            self._refresh([entry for entry in self.capture.inputs if self._is_due(entry)], count_rows)
        self.history.append(self.convergence.num_done)
        limit = self.config.max_batches or (math.inf if self._watches else DEFAULT_MAX_BATCHES)
        waits = self._watches and self.config.uncalled == "error" and self.silent()
        if self.convergence.all_done and not waits and not self.config.keep_moments:
            self.stop_reason = "all layers converged"
        elif self.config.max_rows is not None and self.num_rows >= self.config.max_rows:
            self.stop_reason = f"max_rows ({self.config.max_rows})"
        elif self.num_batches >= limit:
            self.stop_reason = f"max_batches ({limit})"

    def _is_due(self, entry: DistinctInput) -> bool:
        """Whether an input has enough new data for a refresh.

        A step from fewer rows than columns would pass the convergence test for being small. Refreshes come after
        1, 2, 4, 8, … batches, and every ``REFRESH_PERIOD`` from then on.
        """
        statistic = entry.statistic
        if statistic.pending_rows < statistic.num_components:
            return False
        period = REFRESH_PERIOD[self.config.convergence]
        return entry.pending_batches >= min(2 ** max(statistic.num_refreshes - 1, 0), period)

    def require_called(self) -> None:
        """Raise ValueError where layers saw no input, unless the config says that they may not."""
        silent = self.silent()
        if silent and self.config.uncalled == "error":
            when = f"the {self.num_batches} calls watched" if self._watches else "the first batch"
            raise ValueError(
                f"model: {len(silent)} LoRA layers saw no input in {when}: {', '.join(silent)}. Their "
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

    def _refresh(self, inputs: list[DistinctInput], count_rows: CountRows = dict) -> None:
        if not inputs:
            return
        tick = time.perf_counter()
        with without_autocast(inputs[0].statistic.basis.device):
            refreshed = self.statistics.refresh_(inputs)
        for entry, result in zip(inputs, refreshed, strict=True):
            entry.pending_batches = 0
            if not result.finite:
                self.require_finite(self.num_batches, count_rows)
                names = ", ".join(self.names(entry))
                raise ValueError(f"batch {self.num_batches}: the products of the input of {names} overflow float32")
        done = self.convergence.decide(self.capture, inputs, refreshed)
        self.trace.record(self.num_batches, self.num_rows, *self.convergence.standing)
        frees = not (self.config.equal_data or self.config.keep_moments)
        self.capture.wanted = set(range(len(self.sites))) - (done if frees else set())
        self.seconds["refresh"] += time.perf_counter() - tick

    def finish(self) -> None:
        """Close the books: last refreshes, the exact eigensolve of every Gram, a warning if need be.

        Raises:
            ValueError: no row counted, at all or for some layer.
        """
        self.statistics.gather_facts(final=True)
        self._require_rows()
        self.require_called()
        self._refresh([e for e in self.capture.inputs if e.statistic.pending_rows])
        if self.convergence.decision is None:
            raise ValueError(f"model: none of its {len(self.sites)} LoRA layers saw an unmasked row: {self.silent()}")
        tick = time.perf_counter()
        self.statistics.finish_(self.capture.inputs)
        self.seconds["refresh"] += time.perf_counter() - tick
        self.seconds["total"] = time.perf_counter() - self.started
        self.seconds["statistics"] = self.capture.seconds
        self.history[-1] = self.convergence.num_done
        if self.statistics.is_speaker:
            self._warn()

    def _require_rows(self) -> None:
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

    def _warn(self) -> None:
        self.row_rules.warn(stacklevel=5)
        if self.config.keep_moments:  # nobody waited for convergence
            if self.config.max_batches is None and self.stop_reason.startswith("max_batches"):
                warnings.warn(
                    f"the pass that keeps whole second moments stopped at {self.stop_reason}, after {self.num_rows} "
                    "rows; whatever the loader holds beyond them was not read",
                    stacklevel=5,
                )
            return
        pending = len(self.convergence.members) - self.convergence.num_done
        if pending:
            warnings.warn(
                f"EVA stopped at {self.stop_reason}, after {self.num_batches} batches and {self.num_rows} rows, with "
                f"{pending} of {len(self.sites)} layers not converged",
                stacklevel=5,
            )


def _sum_of(entry: DistinctInput) -> torch.Tensor:
    """A number that NaN or Inf in any row of an input has reached."""
    return entry.statistic.square_sum if entry.sketch is None else entry.sketch.total.sum()
