"""Unsloth's and axolotl's fused forwards, which read PEFT's weights without calling the layers that hold them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["is_fused", "unfused"]


def is_fused(modules: Iterable[nn.Module]) -> bool:
    """Whether any of the modules computes with such a forward."""
    return any(name in vars(module) for module in modules for name in _PLAIN) or any(map(_is_fused_mlp, modules))


@contextmanager
def unfused(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within it, attention and MLP modules call their projections, so that those are seen; afterwards all is as before.

    Both libraries hang ``apply_qkv`` and ``apply_o`` on an attention module, axolotl as methods, Unsloth as functions
    that are given the module as well, and a function whose name holds "lora_mlp" on an MLP as its ``forward``. Axolotl
    hangs ``apply_in_proj_fused`` and ``apply_out_proj`` on linear attention; without ``v_proj``, keys are the values.
    """
    kept: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module in modules:
            names = vars(module)
            for name, plain in _PLAIN.items():
                if name in names:
                    kept.append((names, name, names[name]))
                    names[name] = plain(module)
            if _is_fused_mlp(module):
                kept.append((names, "forward", names.pop("forward")))
        yield
    finally:
        for names, name, value in kept:
            names[name] = value


def _is_fused_mlp(module: nn.Module) -> bool:
    return "lora_mlp" in getattr(vars(module).get("forward"), "__name__", "")


def _qkv(module: Any) -> Callable[..., list[Tensor]]:
    def plain(*args: Any) -> list[Tensor]:
        q, k = module.q_proj(args[-1]), module.k_proj(args[-1])
        v_proj = getattr(module, "v_proj", None)
        return [q, k, k if v_proj is None else v_proj(args[-1])]

    return plain


def _one(name: str) -> Callable[[Any], Callable[..., Tensor]]:
    return lambda module: lambda *args: getattr(module, name)(args[-1])


def _into_linear_attention(module: Any) -> Callable[[Tensor], dict[str, Tensor]]:
    names = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
    return lambda x: {name: getattr(module, name)(x) for name in names}


_PLAIN: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "apply_qkv": _qkv,
    "apply_o": _one("o_proj"),
    "apply_in_proj_fused": _into_linear_attention,
    "apply_out_proj": _one("out_proj"),
}
