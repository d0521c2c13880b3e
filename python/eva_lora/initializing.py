"""The one call in five steps: find the adapter → collect → plan → report → apply."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .adapters import (
    LoraAdapter,
    LoraSite,
    SiteAdapter,
    TrainedLayers,
    find_adapter,
    ordinary_tensors,
    require_changeable,
    whole_weights,
)
from .collecting import ForwardFn, RowMaskFn, collect_with
from .config import EvaConfig
from .distributed import ProcessGroup, Ranks, joined, together
from .planning import EvaPlan, EvaStatistics, command_line, plan
from .reporting import EvaReport

__all__ = ["apply", "eva_initialize", "prepared"]


def eva_initialize(
    model: nn.Module,
    loader: Iterable[Any] | EvaStatistics,
    config: Any = None,
    *,
    forward_fn: ForwardFn | None = None,
    row_mask_fn: RowMaskFn | None = None,
    sites: Sequence[LoraSite] | None = None,
    progress: bool = True,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    process_group: ProcessGroup = None,
    overwrite: bool = False,
) -> EvaReport:
    """Initialise a model's LoRA layers with EVA (Paischer et al., arXiv 2410.07170).

    Each A becomes the leading principal directions of its layer's inputs on the data, ranks move to the
    layers whose inputs they explain best under the same total, and every B becomes zero, so that the model
    still computes what its base computes. Call it before the optimizer is made.

    Args:
        model: A model with LoRA layers: PEFT's of any kind, or what :func:`eva_lora.register_adapter` was told of.
        loader: Any iterable of batches: dicts and other mappings, dataclasses, tuples, lists or tensors. One
            that can start again does so until the layers have converged. Or the statistics of a pass that was made
            already, or of forwards that were watched (:func:`eva_lora.watching`): no forward runs then, and ``config``
            is that of the plan, as in :func:`eva_lora.plan`.
        config: :class:`EvaConfig`, or PEFT's. None: the ``eva_config`` of the ``LoraConfig`` if it has one,
            else the defaults.
        forward_fn: Called as ``forward_fn(model, batch)`` in place of the model itself.
        row_mask_fn: Called as ``row_mask_fn(batch)``; returns which rows count, a bool tensor
            (batch, tokens), or None for all; for an encoder-decoder one of each, ``{"encoder": …, "decoder": …}``.
            In place of attention_mask and labels.
        sites: The LoRA layers, where they are not to be looked for: :class:`eva_lora.ParameterSite` for layers that
            keep A and B as parameters. None: those of the model's adapter.
        progress: Show a progress bar (on standard error).
        checkpoint: A file to save the pass in, and to go on from where it exists. With a loader that replays or
            has ``state_dict()``, the result is bit-equal to a pass that was never cut off, on one device with the
            same number of threads. The file stays when the pass is done, and a rerun takes its result from it.
        checkpoint_every: Batches between two saves. None: 10.
        process_group: The ranks that make one pass together, each with batches of its own (docs/distributed.md).
            None: torch.distributed's default group, where it has more than one rank. "off": each rank for itself.
        overwrite: Whether an adapter may be overwritten that was trained already: whose B is not zero. False: that is
            an error before any batch is taken (docs/resuming.md).

    Returns:
        What was done, the same on all ranks. Warns where layers had not converged when a bound or the data's end was
        reached.

    Raises:
        TypeError: as :func:`eva_lora.collect`.
        ValueError: as :func:`eva_lora.collect` and :func:`eva_lora.apply`; the model is then as it was. Or an option
            of a pass is given with statistics.
        RuntimeError: another rank is gone. What one rank fails with, all raise.
    """

    made = loader if isinstance(loader, EvaStatistics) else None

    def check_options() -> None:
        if checkpoint is None and checkpoint_every is not None:
            raise ValueError("checkpoint_every: expected None without a checkpoint to write")
        of_a_pass = {"forward_fn": forward_fn, "row_mask_fn": row_mask_fn, "checkpoint": checkpoint}
        given = [name for name, value in of_a_pass.items() if value is not None]
        if made is not None and given:
            raise ValueError(f"{given[0]}: expected None beside statistics, which no forward has to be run for")

    def write() -> EvaReport:
        eva_plan = plan(statistics, None if made is None else chosen)  # 3
        report = EvaReport.of(statistics, eva_plan, run=_run_facts(model))  # 4
        with whole_weights(model):
            adapter.apply(eva_plan)  # 5, so that whatever fails before it has changed nothing
        return report

    ranks = joined(process_group)
    with ordinary_tensors():
        together(ranks, check_options)
        carried = config if made is None or config is not None else made.config
        adapter, chosen = prepared(model, carried, sites=sites, overwrite=overwrite, ranks=ranks)  # 1
        if isinstance(loader, EvaStatistics):
            statistics = loader
        else:
            statistics = collect_with(  # 2
                adapter, model, loader, chosen, forward_fn=forward_fn, row_mask_fn=row_mask_fn, progress=progress,
                checkpoint=checkpoint, checkpoint_every=checkpoint_every, ranks=ranks,
            )  # fmt: skip
        return together(ranks, write)


def prepared(
    model: nn.Module,
    config: Any = None,
    *,
    sites: Sequence[LoraSite] | None = None,
    overwrite: bool = False,
    ranks: Ranks | None = None,
) -> tuple[LoraAdapter, EvaConfig]:
    """A model's adapter, and the options of its initialisation, if nothing stands against that: asked before any work.

    Raises:
        Exception: as :func:`eva_initialize`, of what is wrong with a model.
    """

    def prepare() -> tuple[LoraAdapter, EvaConfig, TrainedLayers]:
        with whole_weights(model):
            adapter = find_adapter(model, sites)
            if isinstance(adapter, SiteAdapter):
                adapter.writable()  # an error now, not after the pass
            trained = TrainedLayers.of(adapter)
        chosen = EvaConfig.of(adapter.eva_config if config is None else config)
        require_changeable(model, ranks_change=chosen.moves_ranks)
        return adapter, chosen, trained

    adapter, chosen, trained = together(ranks, prepare)
    if not overwrite:
        together(ranks, trained.require_none)
    return adapter, chosen


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


def apply(
    model: nn.Module, eva_plan: EvaPlan, *, sites: Sequence[LoraSite] | None = None, overwrite: bool = False
) -> None:
    """Write a plan into a model with the same LoRA layers: all of it, or nothing and an error.

    Args:
        model: As in :func:`eva_initialize`; of the ranks that the plan was made from, or built with those that it gives
            (:func:`eva_lora.peft.planned_config`), as it has to be where its weights are sharded already.
        eva_plan: From :func:`eva_lora.plan`.
        sites: As in :func:`eva_initialize`; what was given there is given here.
        overwrite: As in :func:`eva_initialize`.

    Raises:
        TypeError: ``model`` is no module, or ``sites`` cannot be written.
        ValueError: the model has no LoRA layers, or others than the plan's; it is compiled or wrapped and a rank
            changes; an optimizer holds its LoRA parameters; or its adapter was trained.
    """
    with ordinary_tensors(), whole_weights(model):
        adapter = find_adapter(model, sites)
        if eva_plan.lora_b and not hasattr(adapter, "base_weights"):
            raise TypeError(f"model: a {type(adapter).__name__} does not take matrices B, which this plan holds")
        asked: Any = adapter
        bases = asked.base_weights()[0] if eva_plan.lora_bias else {}
        if lacking := [name for name in eva_plan.lora_bias if name not in bases or not bases[name].bias_beside]:
            raise ValueError(
                f"plan: it has a bias beside B for {lacking[0]}, and the model has none; build it with lora_bias=True"
            )
        ranks = {site.name: site.rank for site in adapter.sites}
        changed = any(
            planned.rank != ranks.get(name, planned.configured_rank)
            for name, planned in eva_plan.sites.items()
            if name in ranks or planned.rank  # a layer of rank 0 may have been left out when the model was built
        )
        require_changeable(model, ranks_change=changed)
        if not overwrite:
            TrainedLayers.of(adapter).require_none()
        adapter.apply(eva_plan)
