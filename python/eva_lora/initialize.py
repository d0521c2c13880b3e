"""The one call: collect → plan → apply → report."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from .adapters import find_adapter
from .batches import ForwardFn, RowMaskFn
from .collecting import collect
from .planning import EvaPlan, plan
from .report import EvaReport, command_line

__all__ = ["apply", "eva_initialize"]


def eva_initialize(
    model: nn.Module,
    loader: Iterable[Any],
    config: Any = None,
    *,
    forward_fn: ForwardFn | None = None,
    row_mask_fn: RowMaskFn | None = None,
    sites: None = None,
    progress: bool = True,
    checkpoint: None = None,
    checkpoint_every: None = None,
) -> EvaReport:
    """Initialise a model's LoRA layers with EVA (Paischer et al., arXiv 2410.07170).

    Each A becomes the leading principal directions of its layer's inputs on the data, ranks move to the
    layers whose inputs they explain best under the same total, and every B becomes zero, so that the model
    still computes what its base computes. Call it before the optimizer is made.

    Args:
        model: A model with LoRA layers (today: PEFT's, on ``nn.Linear`` or transformers' ``Conv1D``).
        loader: Any iterable of batches: dicts and other mappings, dataclasses, tuples, lists or tensors. One
            that can start again does so until the layers have converged.
        config: :class:`EvaConfig`, or PEFT's. None: the ``eva_config`` of the ``LoraConfig`` if it has one,
            else the defaults.
        forward_fn: Called as ``forward_fn(model, batch)`` in place of the model itself.
        row_mask_fn: Called as ``row_mask_fn(batch)``; returns which rows count, a bool tensor
            (batch, tokens), or None for all. In place of attention_mask and labels.
        sites: Not available yet.
        progress: Show a progress bar (on standard error).
        checkpoint: Not available yet.
        checkpoint_every: Not available yet.

    Returns:
        What was done. Warns where layers had not converged when a bound or the data's end was reached.

    Raises:
        TypeError: as :func:`eva_lora.collect`.
        ValueError: as :func:`eva_lora.collect` and :func:`eva_lora.apply`; the model is then as it was.
    """
    adapter = find_adapter(model)
    if config is None:
        config = adapter.eva_config
    statistics = collect(
        model, loader, config, forward_fn=forward_fn, row_mask_fn=row_mask_fn, sites=sites, progress=progress,
        checkpoint=checkpoint, checkpoint_every=checkpoint_every,
    )  # fmt: skip
    eva_plan = plan(statistics)
    adapter.apply(eva_plan)
    return EvaReport.of(statistics, eva_plan, run=_run_facts(model))


def _run_facts(model: nn.Module) -> dict[str, str]:
    """What a report can know of a library call: the process's command line and the model."""
    wrapper: Any = model
    inner = wrapper.get_base_model() if hasattr(model, "get_base_model") else wrapper
    name = getattr(getattr(inner, "config", None), "name_or_path", "")
    parameters = list(inner.parameters())
    dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))
    devices = ", ".join(sorted({str(p.device) for p in parameters}))
    size = sum(p.numel() for p in parameters)
    facts = {"command": command_line(), "model": f"{type(inner).__name__} {name}".strip()}
    facts["parameters"] = f"{size:,} with the adapter's, {dtypes}, on {devices}"
    return {label: value for label, value in facts.items() if value}


def apply(model: nn.Module, eva_plan: EvaPlan) -> None:
    """Write a plan into a model with the same LoRA layers: all of it, or nothing and an error.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: the model has no LoRA layers, or others than the plan's.
    """
    find_adapter(model).apply(eva_plan)
