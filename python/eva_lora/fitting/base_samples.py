"""Which base an adapter was fitted to: how it was quantised, and samples of what its layers compute with."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..adapters import BaseWeight

__all__ = ["difference", "quantization_of", "samples_of"]

SAMPLES = 4  # rows, and columns, of each layer
SAME = 2.0**-6  # of a layer's largest sample: what devices and dtypes round apart; steps of 8 bits differ by as much

#: Settings of how a layer computes, or where it is, and not of what.
_NOT_OF_THE_WEIGHTS = (
    "dtype",
    "skip",
    "modules_to_not_convert",
    "offload",
    "kernel",
    "_load_in",
    "backend",
    "storage",
    "threshold",
)


def samples_of(bases: Mapping[str, BaseWeight]) -> dict[str, tuple[float, ...]]:
    """Layer → some entries of the matrix that it computes with: the same ones each time."""
    return {name: base.samples(SAMPLES) for name, base in bases.items()}


def quantization_of(model: nn.Module) -> dict[str, Any]:
    """How a transformers model was quantised, as its config says; empty where it does not."""
    wrapper: Any = model
    inner = wrapper.get_base_model() if hasattr(model, "get_base_model") else wrapper
    config: Any = getattr(getattr(inner, "config", None), "quantization_config", None)
    values = config if isinstance(config, Mapping) else config.to_dict() if hasattr(config, "to_dict") else {}
    kept = {
        str(name): value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
        for name, value in values.items()
        if not any(part in str(name) for part in _NOT_OF_THE_WEIGHTS)
    }
    return dict(sorted(kept.items()))


def difference(
    fitted: Mapping[str, tuple[float, ...]],
    how: Mapping[str, Any],
    bases: Mapping[str, BaseWeight],
    how_here: Mapping[str, Any],
) -> str:
    """How a base differs from the one that an adapter was fitted to, in words; "" where it does not.

    Args:
        fitted, how: Of the base that it was fitted to.
        bases, how_here: Of the base here.
    """
    changed = [
        f"{name}: {how.get(name)!r} there, {how_here.get(name)!r} here"
        for name in sorted({*how, *how_here})
        if how.get(name) != how_here.get(name)
    ]
    if changed:
        return f"it was quantised otherwise ({'; '.join(changed)})"
    missing = sorted(set(fitted) - set(bases))
    if missing:
        return f"it has no layer {missing[0]} ({len(missing)} in all)"
    for name, values in fitted.items():
        here = bases[name].samples(SAMPLES)
        largest = max(map(abs, (*values, *here)), default=0.0)
        if len(values) != len(here):
            return f"layer {name} is of another size"
        apart = max((abs(a - b) for a, b in zip(values, here, strict=True)), default=0.0)
        if apart > SAME * largest:
            return f"layer {name} computes with other weights: entries differ by {apart:.2g} of at most {largest:.2g}"
    return ""
