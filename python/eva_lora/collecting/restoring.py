"""What a pass borrows of the model and of the process, and gives back however the pass ends."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from eva_kernels.streaming_svd import release_workspaces

from ..adapters import ModelOutline, same_generators, wrapped

__all__ = ["borrowed", "without_autocast"]

_FLAGS = ("training", "gradient_checkpointing", "use_nested_tensor")  # the second is transformers' switch
_HOOK_TABLES = [name for name in vars(nn.Module()) if "_hooks" in name and ("_forward" in name or "_backward" in name)]
_ABSENT = object()
_NOTHING = nullcontext()


@contextmanager
def borrowed(outline: ModelOutline, *, backward: bool = False) -> Iterator[None]:
    """Within it the model is in eval mode, without gradients, gradient checkpointing and a cache of keys and values.

    That cache is for tokens to come, of which a pass has none; transformers' trainers switch it off likewise, and a
    forward that asks for it has it. With ``backward`` there are gradients, and modules that checkpoint activations
    stay as they are: many do so in training mode alone.

    Afterwards, also after an exception or Ctrl-C, these are what they were, whatever the loader or a ``forward_fn``
    did to them: every module's training flag, gradient checkpointing flag and (unless the model is compiled or
    wrapped) hooks; the configs' switch of that cache; the grad and autocast modes; the global random generators,
    torch's (also of the model's GPUs), Python's and NumPy's. The kernels' scratch memory is let go.
    """
    devices = {parameter.device for parameter in outline.parameters}
    with ExitStack() as stack:
        stack.callback(release_workspaces)
        stack.callback(_modes(devices))
        stack.enter_context(same_generators(devices))
        stack.callback(_module_flags(outline.modules))
        caching = _caching_configs(outline.modules)
        stack.callback(_switch_cache, caching, True)
        _switch_cache(caching, False)
        if wrapped(outline) is None:  # wrappers hang hooks of their own on modules, some of them in the first forward
            stack.callback(_hooks(outline.modules))
        for module in outline.modules:
            if backward and vars(module).get("gradient_checkpointing") is True:
                continue
            if module.training:
                module.training = False  # not eval(), which some libraries override to merge weights
            # In eval mode the last would pack padded batches into nested tensors, which have no common shape.
            for name in ("gradient_checkpointing", "use_nested_tensor"):
                if vars(module).get(name) is True:
                    vars(module)[name] = False
        torch.set_grad_enabled(backward)
        yield


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Within it no product is rounded to the caller's autocast dtype: the statistics need every bit of theirs."""
    # Entered for every input of every batch, where more than this question would be felt.
    return _autocast_off(device) if torch._C._is_any_autocast_enabled() else _NOTHING


@contextmanager
def _autocast_off(device: torch.device) -> Iterator[None]:
    with ExitStack() as stack:
        for kind in {"cpu", device.type}:
            if torch.amp.is_autocast_available(kind):  # "meta" has none
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _caching_configs(modules: list[nn.Module]) -> list[Any]:
    configs = {id(config): config for config in (vars(module).get("config") for module in modules)}
    return [config for config in configs.values() if getattr(config, "use_cache", None) is True]


def _switch_cache(configs: list[Any], on: bool) -> None:
    for config in configs:
        config.use_cache = on


def _module_flags(modules: list[nn.Module]) -> Callable[[], None]:
    flags = [(names, name, names.get(name, _ABSENT)) for names in map(vars, modules) for name in _FLAGS]

    def restore() -> None:
        for names, name, value in flags:
            if value is not _ABSENT:
                names[name] = value
            else:
                names.pop(name, None)

    return restore


def _hooks(modules: list[nn.Module]) -> Callable[[], None]:
    tables = [names[table] for names in map(vars, modules) for table in _HOOK_TABLES if table in names]
    empty = [table for table in tables if not table]  # nearly all
    filled = [(table, dict(table)) for table in tables if table]

    def restore() -> None:
        for table in empty:
            table.clear()
        for table, before in filled:
            if table != before:
                table.clear()
                table.update(before)

    return restore


def _modes(devices: set[torch.device]) -> Callable[[], None]:
    grad = torch.is_grad_enabled()
    kinds = {"cpu"} | {device.type for device in devices} - {"meta"}
    autocast = [
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in kinds
        if torch.amp.is_autocast_available(kind)
    ]
    cache = torch.is_autocast_cache_enabled()

    def restore() -> None:
        torch.set_grad_enabled(grad)
        for kind, enabled, dtype in autocast:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(cache)

    return restore
