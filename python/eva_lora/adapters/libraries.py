"""The libraries beside PEFT, the most specific first."""

from collections.abc import Callable
from typing import Any

from torch import nn

from . import layouts, litgpt, loralib, patched, torchtune
from .outline import plain_modules
from .site_adapter import SiteAdapter
from .sites import LeftAlone, LoraSite

__all__ = ["find"]

_SITE_OF: tuple[Callable[[str, Any], LoraSite | list[LoraSite] | None], ...] = (
    loralib.site_of,
    litgpt.site_of,
    torchtune.site_of,
    patched.site_of,
    layouts.cloneofsimo,
    layouts.lora_vit,
    layouts.automodel,
    layouts.megatron_bridge,
    layouts.torchtitan,
)


def find(model: nn.Module) -> SiteAdapter | None:
    """The LoRA layers of these libraries in a model, or None.

    Raises:
        ValueError: EVA can initialise none of them, or one cannot be right as it is.
    """
    sites: list[LoraSite] = []
    left_alone: dict[str, str] = {}
    for name, module in plain_modules(model):
        try:
            site = next((s for site_of in _SITE_OF if (s := site_of(name, module)) is not None), None)
        except LeftAlone as reason:
            left_alone[name] = str(reason)
            continue
        if site is not None:
            sites += site if isinstance(site, list) else [site]
    if left_alone and not sites:
        raise ValueError(f"model: EVA applies to none of its LoRA layers: {left_alone}")
    return SiteAdapter(sites, left_alone) if sites else None
