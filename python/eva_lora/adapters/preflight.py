"""What must not have happened to a model before its ranks change: said before any work is done."""

import gc
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .outline import ModelOutline

__all__ = [
    "living",
    "require_changeable",
    "require_loaded",
    "require_ordinary",
    "require_watchable",
    "waits_for_others",
]

_WRAPPERS = {
    "OptimizedModule": "compiled by torch.compile",
    "DistributedDataParallel": "wrapped in DistributedDataParallel",
    "FullyShardedDataParallel": "sharded by FullyShardedDataParallel",
    "FSDPModule": "sharded by fully_shard",
    "DeepSpeedEngine": "wrapped in a DeepSpeedEngine",
}


def require_changeable(model: nn.Module, *, ranks_change: bool) -> None:
    """Raise unless the parameters of the LoRA layers may be replaced.

    Args:
        model: The model with LoRA layers.
        ranks_change: Whether any rank may change. Without, A is written in place, which wrappers survive.

    Raises:
        ValueError: it is compiled or wrapped and ranks change, or an optimizer holds its LoRA parameters, or it was
            made in inference mode.
    """
    require_ordinary(model)
    _require_no_copies(ModelOutline(model), ranks_change=ranks_change)
    require_no_optimizer([(name, parameter) for name, parameter in model.named_parameters() if is_lora(name)])


def require_ordinary(model: nn.Module) -> None:
    """Raise ValueError if a parameter was made in inference mode: no adapter of such a model can ever be trained."""
    name = next((name for name, parameter in model.named_parameters() if parameter.is_inference()), None)
    if name is not None:
        raise ValueError(
            f"model: {name} was made within torch.inference_mode(), where nothing is made that can be trained; build "
            "the model outside of it"
        )


def _require_no_copies(outline: ModelOutline, *, ranks_change: bool) -> None:
    state = wrapped(outline) if ranks_change else None
    if state is not None:
        raise ValueError(
            f"model: it is {state}, and a new rank means new parameters that the wrapper would not see. Initialise "
            "before wrapping; or collect, plan, build the model with those ranks (eva_lora.peft.planned_config), and "
            "apply; or keep every rank with rho=1"
        )
    if any(hasattr(parameter, "_z3_optimizer") for parameter in outline.parameters):
        raise ValueError(
            "model: DeepSpeed's optimizer already holds a copy of its weights, and would go on training that. "
            "Initialise before deepspeed.initialize makes an optimizer"
        )


def require_no_optimizer(named: Sequence[tuple[str, Tensor]]) -> None:
    """Raise ValueError if a living optimizer holds one of the parameters."""
    # Going through all objects there are takes 0.1 s, and most parameters are held by their layer alone.
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.empty(0, dtype=torch.float32, device="cpu"))
    if _most_references(named) <= _most_references(list(layer.named_parameters())):
        return
    name = _held_by_optimizer({id(parameter): name for name, parameter in named})
    if name is not None:
        raise ValueError(
            f"model: an optimizer already holds {name}, and would go on training the parameter that EVA replaces. "
            "Initialise first and make the optimizer (or Trainer) afterwards"
        )


def require_loaded(outline: ModelOutline) -> None:
    """Raise ValueError if a weight of the base model is on the meta device and nothing will load it."""
    on_meta = [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in outline.named_modules
        if "_hf_hook" not in vars(module)  # accelerate's: loads the weights when the module runs
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.device.type == "meta" and not is_lora(f"{prefix}.{name}")
    ]
    if on_meta:
        raise ValueError(
            f"model: {len(on_meta)} weights are on the meta device, the first is {on_meta[0]}; load them first"
        )


def require_watchable(outline: ModelOutline) -> None:
    """Raise ValueError if calls of the model cannot be watched from hooks.

    Those of DistributedDataParallel and fully_shard can.
    """
    state = wrapped(outline)
    if state in (_WRAPPERS["DistributedDataParallel"], _WRAPPERS["FSDPModule"]):
        state = None
    if "DataParallel" in outline.class_names:
        state = "wrapped in DataParallel, which calls copies of it in threads"
    if state is not None:
        raise ValueError(f"model: it is {state}, where its calls cannot be watched; watch it before, or make a pass")


def wrapped(outline: ModelOutline) -> str | None:
    """How the model or a part of it is compiled or wrapped, or None."""
    wrapper = wrapper_of(outline)
    if wrapper is not None:
        return _WRAPPERS[wrapper]
    if any(module._compiled_call_impl is not None for module in outline.modules):
        return "compiled by module.compile()"
    return "partitioned by DeepSpeed ZeRO-3" if any(map(is_partitioned, outline.parameters)) else None


def wrapper_of(outline: ModelOutline) -> str | None:
    """The class that compiles or wraps the model or a part of it, or None."""
    return next((name for name in outline.class_names if name in _WRAPPERS), None)


def waits_for_others(outline: ModelOutline) -> bool:
    """Whether a forward waits for those of other processes: weights are gathered, or activations exchanged, in it."""
    wrappers = _WRAPPERS.keys() - {"OptimizedModule"}
    sharded = any(hasattr(p, "device_mesh") or is_partitioned(p) for p in outline.parameters)
    return sharded or not wrappers.isdisjoint(outline.class_names)


def is_partitioned(parameter: Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 holds a parameter: nobody has it whole but while a layer that needs it runs."""
    return hasattr(parameter, "ds_tensor")


def is_lora(name: str) -> bool:
    """Whether a parameter's name is an adapter's, in any of the LoRA libraries: ``lora_A``, ``lora_down``, …"""
    return any(part.startswith("lora_") for part in name.split("."))


def _most_references(named: Sequence[tuple[str, Tensor]]) -> int:
    return max((sys.getrefcount(parameter) for _, parameter in named), default=0)


def _held_by_optimizer(names: dict[int, str]) -> str | None:
    found = _first_held(names)
    if found is not None:
        gc.collect()  # an optimizer that nobody can reach any more holds nothing
        found = _first_held(names)
    return found


def _first_held(names: dict[int, str]) -> str | None:
    optimizers = living(torch.optim.Optimizer)
    return next((names[id(p)] for optimizer in optimizers for p in _held(optimizer) if id(p) in names), None)


def living(kind: type) -> list[Any]:
    """All objects of a class that there are."""
    objects = gc.get_objects()
    # By type, many objects at a time; isinstance would ask proxies for their __class__, and abstract classes anybody.
    kinds = {each for each in set(map(type, objects)) if kind in each.__mro__}
    return [candidate for candidate in objects if type(candidate) in kinds] if kinds else []


def _held(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in getattr(optimizer, "param_groups", []):  # absent while one is being made
        yield from group["params"]
