"""How the layers of a library are told from others without importing it."""

from typing import Any

from torch import Tensor, nn

__all__ = ["is_a", "require_unmerged"]


def is_a(module: nn.Module, package: str, *classes: str) -> bool:
    """Whether a module is of one of these classes, or a subclass, from a module whose name begins with ``package``."""
    return any(kind.__name__ in classes and kind.__module__.startswith(package) for kind in type(module).__mro__)


def require_unmerged(name: str, module: Any, lora_b: Tensor, remedy: str) -> None:
    """Raise ValueError if the adapter is merged into the base weight, unless B = 0: then there is nothing in it."""
    if getattr(module, "merged", False) and bool(lora_b.any()):
        raise ValueError(f"model: the adapter of {name} is merged into its base weight; {remedy}")
