"""litgpt: ``LoRALinear`` and ``LoRAQKVLinear`` (github.com/Lightning-AI/litgpt)."""

from typing import Any

from .parameters import ParameterSite
from .recognition import is_a, require_unmerged
from .sites import LoraSite

__all__ = ["site_of"]


def site_of(name: str, module: Any) -> LoraSite | None:
    """The site that a layer of litgpt with a LoRA is; query, key and value are groups of one.

    Raises:
        ValueError: its adapter is merged.
    """
    if not is_a(module, "litgpt.", "LoRALinear") or not hasattr(module, "lora_A"):
        return None
    require_unmerged(name, module, module.lora_B, "litgpt cannot take it out: load the base checkpoint again")
    groups = sum(module.enable_lora) if is_a(module, "litgpt.", "LoRAQKVLinear") else 1
    return ParameterSite.of(
        name, module, "lora_A", "lora_B", groups=groups, rank="r", alpha="lora_alpha", scaling="scaling"
    )
