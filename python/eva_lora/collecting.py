"""The pass over the data: forward passes of the frozen model, statistics folded in as they run."""

import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .adapters import LoraAdapter, LoraSite, find_adapter
from .batches import ForwardFn, RowMaskFn, default_forward, is_encoder_decoder, row_mask, to_device
from .checkpoint import Checkpoint, identity
from .config import EvaConfig
from .preflight import require_loaded
from .progress import Progress
from .restoring import borrowed, without_autocast
from .running import Run
from .statistics import EvaStatistics
from .streams import Stream

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
) -> EvaStatistics:
    """Run the frozen model over batches until every layer's components have converged (or a bound is met).

    Nothing of the model's is changed: adapters are disabled, modules are in eval mode and hooked only while
    it runs, and the global random generators are given back as they were (``eva_lora.restoring``). Arguments
    are those of :func:`eva_lora.eva_initialize`.

    Returns:
        The statistics of every distinct layer input, enough to plan ranks and write A.

    Raises:
        TypeError: ``model`` is no module, ``loader`` not iterable, ``config`` of another type, or a layer's
            input no floating-point tensor.
        ValueError: no LoRA layers, an empty loader, batches without a single unmasked row, a layer that the
            first batch does not reach, NaN or Inf in a layer's input (the layer, the batch and the rows are
            named), a checkpoint that is damaged or of another run, a loader that does not replay.
        OSError: the checkpoint cannot be written.
    """
    config = EvaConfig.of(config)
    if checkpoint is None and checkpoint_every is not None:
        raise ValueError("checkpoint_every: expected None without a checkpoint to write")
    adapter = find_adapter(model, sites)
    return collect_with(
        adapter, model, loader, config, forward_fn=forward_fn, row_mask_fn=row_mask_fn, progress=progress,
        checkpoint=checkpoint, checkpoint_every=checkpoint_every,
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
) -> EvaStatistics:
    """:func:`collect` for an adapter that is known already."""
    if adapter.left_alone:
        named = "; ".join(f"{name}: {reason}" for name, reason in adapter.left_alone.items())
        warnings.warn(f"EVA leaves these layers as they are: {named}", stacklevel=4)
    require_loaded(model)
    run = Run(adapter, config, head=_head(model, adapter))
    device = _input_device(model)
    saving = position = None
    if checkpoint is not None:
        known = identity(model, run, device, forward_fn=forward_fn, row_mask_fn=row_mask_fn)
        saving = Checkpoint(checkpoint, checkpoint_every, known)
        position = saving.load_into(run)
    early_stop = _may_stop_early(model, config, forward_fn)
    forward = forward_fn or default_forward
    two_sided = is_encoder_decoder(model)
    bar = Progress(len(adapter.sites), config, seen=(run.num_batches, run.num_rows), enabled=progress)
    with bar, borrowed(model), adapter.disabled(), run.capture.hooks():
        stream = Stream(loader, fingerprints=saving is not None, position=position)
        while not run.stop_reason:
            batch = next(stream, _END)
            if batch is _END:
                run.stop_reason = "end of the data"
            else:
                # The mask first: counted where the loader left it, no device has to be waited for.
                mask = row_mask(batch, config, row_mask_fn, encoder_decoder=two_sided).to(device)
                mask.sides = run.sides
                batch = to_device(batch, device)
                if mask.num_rows != 0:
                    tick = time.perf_counter()
                    with run.capture.batch(mask, early_stop=early_stop):
                        forward(model, batch)
                    run.seconds["forward"] += time.perf_counter() - tick
                    if run.nonfinite_inputs():
                        again = mask.counting()
                        if not _others_wait():
                            with run.capture.batch(again, early_stop=early_stop):
                                forward(model, batch)
                        run.fail_nonfinite(again.skipped)
                with without_autocast(device):
                    run.finish_batch(mask)
                bar.update(run.num_batches, run.num_rows, run.history[-1], run.trace)
            if saving is not None and (run.stop_reason or run.num_batches % saving.every == 0):
                saving.save(run, stream)
    with without_autocast(device):
        return run.result()


_END = object()


def _may_stop_early(model: nn.Module, config: EvaConfig, forward_fn: ForwardFn | None) -> bool:
    """Whether leaving a forward by an exception is safe: nobody waits for its end."""
    if config.early_stop != "auto":
        return config.early_stop
    if forward_fn is not None:
        return False
    wrappers = ("OptimizedModule", "DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")
    return not any(
        hasattr(module, "_hf_hook") or type(module).__name__ in wrappers or hasattr(module, "_get_fsdp_state")
        for module in model.modules()
    )


def _head(model: nn.Module, adapter: LoraAdapter) -> nn.Module | None:
    """The LM head of a transformers model, unless a LoRA layer is in it."""
    find: Any = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if not isinstance(head, nn.Module) or {*head.modules()} & {site.module for site in adapter.sites}:
        return None
    return head


def _others_wait() -> bool:
    """Whether other processes would wait in vain if this one ran a forward of its own."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _input_device(model: nn.Module) -> torch.device:
    """Where batches go: the device of the first parameter that is on one."""
    for parameter in model.parameters():
        if parameter.device.type != "meta":
            return parameter.device
    raise ValueError("model: every parameter is on the meta device; load the base model's weights first")
