"""The pass over the data: forward passes of the frozen model, statistics folded in as they run."""

import time
import warnings
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .adapters import LoraAdapter, LoraSite, find_adapter
from .adapters.sharded import whole_weights
from .batches import ForwardFn, RowMask, RowMaskFn, default_forward, is_encoder_decoder, row_mask, to_device
from .checkpoint import Checkpoint, identity
from .config import EvaConfig
from .distributed import Pool, ProcessGroup, Ranks, TensorParallel, joined, run_together, together
from .preflight import is_partitioned, require_loaded, waits_for_others, wrapper_of
from .progress import Progress
from .restoring import borrowed, without_autocast
from .running import Run, device_of
from .statistics import EvaStatistics
from .streams import END, Stream
from .survey import Survey

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
    it runs, and the global random generators are given back as they were (``eva_lora.restoring``). Arguments
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
    if adapter.left_alone and (ranks is None or ranks.rank == 0):
        named = "; ".join(f"{name}: {reason}" for name, reason in adapter.left_alone.items())
        warnings.warn(f"EVA leaves these layers as they are: {named}", stacklevel=4)

    survey = Survey(model)

    def prepare() -> tuple[Run, Forwards, Checkpoint | None]:
        require_loaded(survey)
        run = Run(adapter, config, head=_head(model, adapter), parallel=TensorParallel.of(survey, adapter.sites))
        if run.capture.parallel is not None and ranks is None:
            raise ValueError(
                "process_group: the model's layers are split over ranks, which have to make one pass together"
            )
        forwards = Forwards(model, survey, run, forward_fn, row_mask_fn)
        saving = None
        if checkpoint is not None:
            known = identity(model, run, forwards.device, forward_fn=forward_fn, row_mask_fn=row_mask_fn)
            saving = Checkpoint(checkpoint, checkpoint_every, known)
        return run, forwards, saving

    run, forwards, saving = together(ranks, prepare)
    if ranks is not None:
        run.pool = Pool(run, ranks, run.capture.parallel)
    position = None
    if saving is not None:
        position = together(ranks, lambda: saving.load_into(run))
        if ranks is not None and len(set(ranks.gather(run.num_batches))) > 1:
            raise ValueError(f"checkpoint: not every rank sees the same file {saving.path}; give one that all can read")
    if forwards.device.type == "cpu":
        _keep_freed_memory()
    bar = Progress(len(adapter.sites), config, seen=(run.num_batches, run.num_rows), enabled=progress)
    with bar, borrowed(survey), adapter.disabled(), run.capture.hooks():

        def open_loader() -> Stream:
            return Stream(loader, fingerprints=saving is not None, position=position, may_be_empty=ranks is not None)

        stream = together(ranks, open_loader)
        if ranks is not None:
            run_together(run, stream, forwards, ranks, saving=saving, bar=bar)
        while not run.stop_reason:
            batch = next(stream, END)
            if batch is END:
                run.stop_reason = "end of the data"
            else:
                mask = forwards.fold(batch)
                run.finish_batch(mask, partial(forwards.count_nonfinite, batch, mask))
                bar.update(run.num_batches, run.num_rows, run.history[-1], run.trace)
            if saving is not None and (run.stop_reason or run.num_batches % saving.every == 0):
                saving.save(run, [stream.position()])
    with without_autocast(forwards.device):
        return run.result()


class Forwards:
    """Forward passes of the frozen model, whose rows are folded into a run's statistics.

    Attributes:
        device: Where batches go.
        in_step: Whether a forward waits for those of other ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        survey: Survey,
        run: Run,
        forward_fn: ForwardFn | None,
        row_mask_fn: RowMaskFn | None,
    ) -> None:
        self._model, self._run, self._row_mask_fn = model, run, row_mask_fn
        self._forward = forward_fn or default_forward
        self._early_stop = _may_stop_early(survey, run.config, forward_fn)
        self._two_sided = is_encoder_decoder(model)
        self.device, self.in_step = _input_device(survey), waits_for_others(survey)

    def fold(self, batch: Any, *, only: Collection[int] | None = None) -> RowMask:
        """Run one batch; ``only`` as in :meth:`Capture.batch`. Returns which rows counted.

        Raises:
            ValueError: NaN or Inf has reached a layer, and no refresh comes that will tell.
        """
        run = self._run
        # The mask first: counted where the loader left it, no device has to be waited for.
        mask = row_mask(batch, run.config, self._row_mask_fn, encoder_decoder=self._two_sided).to(self.device)
        mask.sides = run.sides
        if mask.num_rows == 0:
            if self.in_step:
                self.idle(batch)
            return mask
        batch = to_device(batch, self.device)
        tick = time.perf_counter()
        with run.capture.batch(mask, early_stop=self._early_stop, only=only):
            self._forward(self._model, batch)
        run.seconds["forward"] += time.perf_counter() - tick
        if not run.refresh_tells_nonfinite():
            run.require_finite(run.num_batches + 1, partial(self.count_nonfinite, batch, mask, only=only))
        return mask

    def count_nonfinite(self, batch: Any, mask: RowMask, *, only: Collection[int] | None = None) -> dict[str, int]:
        """Rows of a batch that hold NaN or Inf, by layer: a second forward, unless other ranks would wait for it."""
        again = mask.counting()
        if not self.in_step:
            with self._run.capture.batch(again, early_stop=self._early_stop, only=only):
                self._forward(self._model, to_device(batch, self.device))
        return again.skipped

    def idle(self, batch: Any) -> None:
        """Run a batch of which nothing counts, for the ranks that would wait for this one."""
        with self._run.capture.batch(RowMask(None, 0), early_stop=False, only=()):
            self._forward(self._model, to_device(batch, self.device))


def _keep_freed_memory() -> None:
    """Have glibc keep the memory of activations from one layer to the next, rather than give it back each time.

    It maps blocks larger than the largest it has yet seen freed anew every time, and gives back what is free at the
    heap's end beyond twice that size (mallopt(3), M_MMAP_THRESHOLD). So one block is freed that is about as large as
    still counts there, 32 MiB; none of it is ever written, and so none is taken. glibc remembers it beyond the pass.
    Other allocators do not notice.
    """
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


def _may_stop_early(survey: Survey, config: EvaConfig, forward_fn: ForwardFn | None) -> bool:
    """Whether leaving a forward by an exception is safe: nobody waits for its end."""
    if config.early_stop != "auto":
        return config.early_stop
    if forward_fn is not None:
        return False
    if any(map(is_partitioned, survey.parameters)) or any("_hf_hook" in vars(module) for module in survey.modules):
        return False
    return wrapper_of(survey) is None


def _head(model: nn.Module, adapter: LoraAdapter) -> nn.Module | None:
    """The LM head of a transformers model, unless a LoRA layer is in it."""
    find: Any = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if not isinstance(head, nn.Module) or {*head.modules()} & {site.module for site in adapter.sites}:
        return None
    return head


def _input_device(survey: Survey) -> torch.device:
    """Where batches go: where the first of its modules computes."""
    device = device_of(survey.modules)
    if device is None:
        raise ValueError("model: every parameter is on the meta device; load the base model's weights first")
    return device
