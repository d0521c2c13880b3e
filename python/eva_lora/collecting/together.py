"""The pass of several ranks: in step from batch to batch, each with its own, or with none."""

import warnings
from typing import Any

from torch import Tensor

from ..distributed import Ranks
from .batches import named_fields
from .checkpoint import Checkpoint
from .forwards import Forwards
from .inputs import BatchShare
from .pooling import PooledStatistics
from .progress import Progress
from .reader import END, BatchReader
from .rerunning import CONTENT_BYTES
from .rows import RowMask
from .run import Run

__all__ = ["run_together"]


def run_together(
    run: Run,
    pooled: PooledStatistics,
    reader: BatchReader,
    forwards: Forwards,
    *,
    saving: Checkpoint | None,
    bar: Progress,
) -> None:
    """Run batches until the run says stop, on all ranks at once.

    A batch of the pass is one batch of every rank that has one left; loaders start again together, when all are at
    their end. An input starts from the rows that all ranks bring in its first batch: these are run twice, once for the
    sketch of what is there, and once to be folded in.

    Raises:
        ValueError: no rank has a batch. What one rank fails with, all raise.
    """
    ranks = pooled.ranks
    begins_round = True
    while not run.stop_reason:
        batch = ranks.attempt(reader.take, default=END)
        has_batch, sizes = batch is not END, [0]
        if forwards.in_step or None in run.capture.input_of:
            sizes = ranks.gather(_num_samples(batch) if has_batch else 0)
            leader = pooled.leaders[ranks.rank]
            run.capture.batch_share = BatchShare(
                sum(sizes[r] for r in sorted({*pooled.leaders}) if r < leader), sizes[leader]
            )
        idle = _stand_in(batch, sizes, ranks) if forwards.in_step else END
        own = batch if has_batch else idle
        unknown = forwards.note(own, contents=True) if _may_start(run) and own is not END else ""
        mask = _run(forwards, ranks, batch, idle)
        num_rows = run.capture.rows_in_batch if has_batch else 0
        had, all_rows, changed, rows = pooled.count(has_batch, num_rows)
        if had == 0:
            if begins_round:
                if run.num_batches == 0:
                    raise ValueError("loader: expected at least one batch, it is empty on every rank")
                run.stop_reason = "end of the data"
                _save(run, pooled, reader, saving)
            else:
                ranks.attempt(reader.again)
                begins_round = True
            continue
        begins_round = False
        if changed:
            started = pooled.unify()
            if started:
                _put_back(run, forwards, ranks, is_noted=own is not END, unknown=unknown)
                _run(forwards, ranks, batch, idle, only=started)
                num_rows = max(num_rows, run.capture.rows_in_batch) if has_batch else 0
            had, all_rows, changed, rows = pooled.count(has_batch, num_rows)
        if not has_batch:
            reader.pass_over()
        pooled.record(rows)
        run.capture.rows_in_batch = all_rows
        run.finish_batch(mask)
        bar.update(run.num_batches, run.num_rows, run.history[-1], run.trace)
        if saving is not None and (run.stop_reason or run.num_batches % saving.every == 0):
            _save(run, pooled, reader, saving)


def _run(forwards: Forwards, ranks: Ranks, batch: Any, idle: Any, only: Any = None) -> RowMask:
    nothing = RowMask(None, 0)
    if batch is not END:
        return ranks.attempt(lambda: forwards.fold(batch, only=only), default=nothing)
    if idle is not END:
        ranks.attempt(forwards.idle, idle)
    return nothing


def _may_start(run: Run) -> bool:
    """Whether a batch may bring a layer its first rows, and is then run twice."""
    inputs = run.capture.input_of
    return any(entry is None or entry.statistic.shift is None for entry in inputs)


def _put_back(run: Run, forwards: Forwards, ranks: Ranks, *, is_noted: bool, unknown: str) -> None:
    """Put back what the first of two forwards with a batch has changed."""

    def put_back() -> None:
        if is_noted and not forwards.restore():
            raise RuntimeError(
                f"batch {run.num_batches + 1} is run twice by several ranks, and its forward edits a tensor of more "
                f"than {CONTENT_BYTES >> 20} MiB that the model or the batch holds; make the pass on one rank "
                '(process_group="off")'
            )

    if unknown and ranks.rank == 0:
        warnings.warn(
            f"batch {run.num_batches + 1} is run twice by several ranks, and the model or the batch holds {unknown}, "
            "which cannot be put back in between; if forwards change it, layers may see other rows of that batch",
            stacklevel=6,
        )
    ranks.attempt(put_back)


def _stand_in(batch: Any, sizes: list[int], ranks: Ranks) -> Any:
    """For a rank that has no batch where others do: that of the first which has."""
    if all(sizes) or not any(sizes):
        return END
    source = next(rank for rank, size in enumerate(sizes) if size)
    received = ranks.broadcast(batch if ranks.rank == source else None, source)
    return END if batch is not END else received


def _save(run: Run, pooled: PooledStatistics, reader: BatchReader, saving: Checkpoint | None) -> None:
    if saving is None:
        return
    ranks = pooled.ranks
    pooled.gather_facts(final=False)
    states, positions = pooled.states(), ranks.exchange(reader.position())
    if ranks.rank == 0:
        ranks.attempt(lambda: saving.save(run, positions, states))
    ranks.agree()


def _num_samples(batch: Any) -> int:
    """Samples of a batch: the first dimension of its first tensor."""
    fields = named_fields(batch)
    values = list(fields.values()) if fields is not None else batch if isinstance(batch, (tuple, list)) else [batch]
    first = next((value for value in values if isinstance(value, Tensor) and value.ndim), None)
    return 1 if first is None else max(1, len(first))
