"""torchtune: ``LoRALinear`` (of QAT too) and ``DoRALinear`` (github.com/pytorch/torchtune)."""

from typing import Any

from .parameters import ParameterSite
from .recognition import is_a, require_unmerged
from .sites import LoraSite

__all__ = ["site_of"]


def site_of(name: str, module: Any) -> LoraSite | None:
    """The site that a layer of torchtune with a LoRA is.

    Raises:
        ValueError: its adapter is merged.
    """
    a, b = "lora_a.weight", "lora_b.weight"
    if is_a(module, "torchtune.", "LoRALinear"):  # computes alpha / rank in its forward
        require_unmerged(name, module, module.lora_b.weight, "load the base checkpoint again")
        return ParameterSite.of(name, module, a, b, rank="rank", alpha="alpha")
    if is_a(module, "torchtune.", "DoRALinear"):  # keeps neither rank nor alpha
        return ParameterSite.of(name, module, a, b, scaling="scaling")
    return None
