"""Something in the place of a parameter while the module that it is for runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..adapters import InnerWeight

__all__ = ["substituted"]


@contextmanager
def substituted(module: nn.Module, weight: InnerWeight, make: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Within it each call of a module computes with what is made of a parameter, or as ever where that is None.

    Args:
        module: Whose calls are meant.
        weight: A parameter that it, or something in it, computes with.
        make: Asked at the beginning of each call.
    """
    kept: list[Tensor] = []

    def enter(_: nn.Module, args: tuple[Any, ...]) -> None:
        place: dict[str, Any] = weight.owner._parameters
        given = place[weight.name]
        made = make(given)
        if made is not None:
            kept.append(given)
            place[weight.name] = made

    def leave(*_: Any) -> None:
        if kept:
            place: dict[str, Any] = weight.owner._parameters
            place[weight.name] = kept.pop()

    handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        leave()  # a call that Ctrl-C ended is left by no hook
