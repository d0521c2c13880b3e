"""The pass over the data: forward passes of the frozen model, statistics folded in as they run."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..adapters import (
    LoraAdapter,
    LoraSite,
    ModelOutline,
    find_adapter,
    ordinary_tensors,
    require_loaded,
    tell_left_alone,
    whole_weights,
)
from ..config import EvaConfig
from ..distributed import ProcessGroup, Ranks, joined, together
from ..planning import EvaStatistics
from .batches import ForwardFn
from .checkpoint import Checkpoint, identity
from .closing import statistics_of
from .ending import ForwardEnd
from .forwards import Forwards
from .freed_memory import keep_freed_memory
from .masks import RowMaskFn
from .pooling import PooledStatistics
from .progress import Progress
from .reader import END, BatchReader
from .restoring import borrowed, without_autocast
from .run import Run
from .tensor_parallel import TensorParallel
from .together import run_together

__all__ = ["collect"]


def collect(
    model: nn.Module,
    loader: Iterable[Any],
    config: Any = None,
    *,
    forward_fn: ForwardFn | None = None,
    row_mask_fn: RowMaskFn | None = None,
    sites: Sequence[LoraSite] | None = None,
    progress: bool = True,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    process_group: ProcessGroup = None,
) -> EvaStatistics:
    """Run the frozen model over batches until every layer's components have converged (or a bound is met).

    Nothing of the model's is changed: adapters are disabled, modules are in eval mode and hooked only while
    it runs, and the global random generators are given back as they were (``eva_lora.collecting.restoring``). Arguments
    are those of :func:`eva_lora.eva_initialize`.

    Returns:
        The statistics of every distinct layer input, enough to plan ranks and write A; in a process group, of all
        ranks' rows, and the same on every rank.

    Raises:
        TypeError: ``model`` is no module, ``loader`` not iterable, ``config`` of another type, or a layer's
            input no floating-point tensor.
        ValueError: no LoRA layers, an empty loader, batches without a single unmasked row, a layer that the
            first batch does not reach, NaN or Inf in a layer's input (the layer, the batch and the rows are
            named), a checkpoint that is damaged or of another run, a loader that does not replay.
        OSError: the checkpoint cannot be written.
        RuntimeError: another rank of the process group is gone. What one rank fails with, all raise.
    """
    ranks = joined(process_group)

    def prepare() -> tuple[LoraAdapter, EvaConfig]:
        if checkpoint is None and checkpoint_every is not None:
            raise ValueError("checkpoint_every: expected None without a checkpoint to write")
        with whole_weights(model):
            return find_adapter(model, sites), EvaConfig.of(config)

    with ordinary_tensors():
        adapter, its_config = together(ranks, prepare)
        return collect_with(
            adapter, model, loader, its_config, forward_fn=forward_fn, row_mask_fn=row_mask_fn, progress=progress,
            checkpoint=checkpoint, checkpoint_every=checkpoint_every, ranks=ranks,
        )  # fmt: skip


def collect_with(
    adapter: LoraAdapter,
    model: nn.Module,
    loader: Iterable[Any],
    config: EvaConfig,
    *,
    forward_fn: ForwardFn | None = None,
    row_mask_fn: RowMaskFn | None = None,
    progress: bool = True,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    ranks: Ranks | None = None,
) -> EvaStatistics:
    """:func:`collect` for an adapter and ranks that are known already."""
    if ranks is None or ranks.rank == 0:
        tell_left_alone(adapter, "EVA", stacklevel=4)

    outline = ModelOutline(model)

    def prepare() -> tuple[Run, Forwards, Checkpoint | None]:
        require_loaded(outline)
        if config.keep_moments and ranks is not None:
            raise ValueError("keep_moments: expected False where several ranks make one pass: one of them holds it")
        end = ForwardEnd.of(model, outline, adapter, config, forward_fn)
        parallel = TensorParallel.of(outline, adapter.sites)
        run = Run(adapter, config, end=end, parallel=parallel)
        if parallel is not None and ranks is None:
            raise ValueError(
                "process_group: the model's layers are split over ranks, which have to make one pass together"
            )
        forwards = Forwards(model, outline, run, forward_fn, row_mask_fn)
        saving = None
        if checkpoint is not None:
            known = identity(model, run, forwards.device, forward_fn=forward_fn, row_mask_fn=row_mask_fn)
            saving = Checkpoint(checkpoint, checkpoint_every, known)
        return run, forwards, saving

    run, forwards, saving = together(ranks, prepare)
    pooled = None
    if ranks is not None:
        run.statistics = pooled = PooledStatistics(run, ranks, run.capture.parallel)
    position = None
    if saving is not None:
        position = together(ranks, lambda: saving.load_into(run))
        if ranks is not None and len(set(ranks.gather(run.num_batches))) > 1:
            raise ValueError(f"checkpoint: not every rank sees the same file {saving.path}; give one that all can read")
    if forwards.device.type == "cpu":
        keep_freed_memory()
    bar = Progress(len(adapter.sites), config, seen=(run.num_batches, run.num_rows), enabled=progress)
    with bar, borrowed(outline), adapter.disabled(), run.capture.hooks():

        def open_loader() -> BatchReader:
            return BatchReader(
                loader, fingerprints=saving is not None, position=position, may_be_empty=ranks is not None,
                may_be_none=forward_fn is not None,
            )  # fmt: skip

        reader = together(ranks, open_loader)
        if pooled is not None:
            run_together(run, pooled, reader, forwards, saving=saving, bar=bar)
        while not run.stop_reason:
            batch = reader.take() if config.keep_moments else next(reader, END)
            if batch is END:
                run.stop_reason = "end of the data"
            else:
                mask = forwards.fold(batch)
                run.finish_batch(mask, partial(forwards.count_nonfinite, batch, mask))
                bar.update(run.num_batches, run.num_rows, run.history[-1], run.trace)
            if saving is not None and (run.stop_reason or run.num_batches % saving.every == 0):
                saving.save(run, [reader.position()])
    with without_autocast(forwards.device):
        run.finish()
        return statistics_of(run)
