"""Parameters of twice the rank of which one half is trained and the other held: A beside A₀, B beside −B₀.

With them a layer computes W x + s (B A − B₀ A₀) x, and its base weight stays as it is. Only the trained half is a
parameter. Whoever reads the attribute gets both, and so does the layer's state: merging, switching off, scaling and
saving are the library's own, of an ordinary LoRA of twice the rank.
"""

import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Halves", "hold", "is_held"]

_HALVES, _HELD = "_eva_halves", "_eva_held"  # attributes of a module; the second begins the name of a buffer


@dataclass(frozen=True)
class Halves:
    """Where the rank is in a parameter: along ``dim``, whose entries are (outer, rank, inner)."""

    dim: int
    outer: int = 1
    inner: int = 1

    def split(self, whole: Tensor) -> tuple[Tensor, Tensor]:
        """A tensor's first half along the rank, and its second."""
        parts = self._apart(whole).chunk(2, self.dim + 1)
        first, second = (part.flatten(self.dim, self.dim + 2).contiguous() for part in parts)
        return first, second

    def join(self, first: Tensor, second: Tensor) -> Tensor:
        """What :meth:`split` has split."""
        return torch.cat([self._apart(first), self._apart(second)], self.dim + 1).flatten(self.dim, self.dim + 2)

    def _apart(self, tensor: Tensor) -> Tensor:
        shape = tensor.shape
        return tensor.reshape(*shape[: self.dim], self.outer, -1, self.inner, *shape[self.dim + 1 :])


def hold(module: nn.Module, halves: Mapping[str, Halves]) -> None:
    """Have only the first half of some of a module's own parameters trained, and hold the second.

    The attribute is no parameter any more but what both halves make, anew each time: what is written into it in place
    is lost. ``named_parameters`` has the first half, under the same name. ``state_dict`` has both; what is loaded is
    taken apart again.
    """
    for name, where in halves.items():
        parameter: Any = module._parameters[name]
        trained, held = where.split(parameter.detach())
        module._parameters[name] = nn.Parameter(trained, parameter.requires_grad)
        module.register_buffer(f"{_HELD}_{name}", held, persistent=False)
    kind: Any = type(module).__base__ if is_held(module) else type(module)
    everything = {**getattr(module, _HALVES, {}), **halves}
    setattr(module, _HALVES, everything)
    module.__class__ = _holding(kind, tuple(everything))


def is_held(module: nn.Module) -> bool:
    """Whether some of a module's parameters are held in part."""
    return _HALVES in vars(module)


@functools.cache
def _holding(kind: Any, names: tuple[str, ...]) -> type:
    """A class of modules like ``kind`` that hold half of these parameters. It has its name: libraries go by that."""

    def save(self: Any, destination: Any, prefix: str, keep_vars: bool) -> None:
        kind._save_to_state_dict(self, destination, prefix, keep_vars)
        _require_no_swap(prefix)
        for name in names:
            whole = getattr(self, name)
            destination[prefix + name] = whole if keep_vars else whole.detach()

    def load(self: Any, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in names:
            given = state_dict.get(prefix + name)
            if given is None:
                continue
            whole = tuple(getattr(self, name).shape)
            if tuple(given.shape) != whole:
                raise ValueError(
                    f"{prefix}{name}: expected shape {whole}, half of it what this started from, got "
                    f"{tuple(given.shape)}; load an ordinary adapter into a model that is not started"
                )
            state_dict[prefix + name], held = getattr(self, _HALVES)[name].split(given.detach())
            with torch.no_grad():
                self._buffers[f"{_HELD}_{name}"].copy_(held)
        kind._load_from_state_dict(self, state_dict, prefix, *rest)

    def reduce(self: Any, protocol: Any) -> Any:
        return _empty, (kind, names), vars(self)

    members: dict[str, Any] = {name: property(functools.partial(_whole, name)) for name in names}
    members |= {"_save_to_state_dict": save, "_load_from_state_dict": load, "__reduce_ex__": reduce}
    members |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), members)


def _empty(kind: Any, names: tuple[str, ...]) -> Any:
    """What a copy or a pickle of such a module is filled into."""
    made: Any = _holding(kind, names)
    return made.__new__(made)


def _whole(name: str, module: Any) -> Tensor:
    where: Halves = getattr(module, _HALVES)[name]
    return where.join(module._parameters[name], module._buffers[f"{_HELD}_{name}"])


def _require_no_swap(prefix: str) -> None:
    """Raise ValueError where PEFT takes the state to swap this adapter for another one: it writes in place."""
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "hotswap_adapter_from_state_dict" and frame.f_locals["adapter_name"] in prefix:
            raise ValueError(
                f"adapter {frame.f_locals['adapter_name']!r} cannot be swapped in place: half of A and B is held; load "
                "the saved adapter, an ordinary one, and swap that"
            )
        frame = frame.f_back
