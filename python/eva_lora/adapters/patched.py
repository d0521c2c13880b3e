"""LyCORIS and kohya sd-scripts: their modules stand outside of the model and take over a layer's ``forward``."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .parameters import ParameterSite
from .recognition import is_a
from .sites import LeftAlone, LoraSite, Patches

__all__ = ["site_of"]

_ELSEWHERE = ("LohaModule", "LokrModule", "FullModule", "NormModule", "DiagOFTModule", "ButterflyOFTModule",
              "GLoRAModule", "DyLoraModule", "IA3Module", "TLoraModule")  # fmt: skip


@dataclass(frozen=True)
class PatchedSite(ParameterSite):
    """``alpha`` is a buffer that says which scaling a saved file has: scale = alpha / rank, of rsLoRA too."""

    def rescale(self, rank: int, adjust: bool) -> None:
        owner: Any = self.owner
        owner.lora_dim = rank
        if not adjust:
            growth = rank / self.rank
            owner.scale = owner.scale / (growth if self.linear_in_rank else growth**0.5)
        owner.alpha = torch.full((), owner.scale * rank, dtype=torch.float32, device=owner.alpha.device)


def site_of(name: str, module: Any) -> LoraSite | None:
    """The site that a layer is whose ``forward`` a ``LoConModule`` or ``LoRAModule`` has taken over.

    The layer's own calls are watched: the module's never happen, and LyCORIS calls ``lora_down`` in few modes.

    Raises:
        LeftAlone: EVA does not apply to it.
        ValueError: it would never train.
    """
    owner: Any = getattr(vars(module).get("forward"), "__self__", None)
    if not isinstance(owner, nn.Module) or owner is module:
        return None
    if is_a(owner, "lycoris.", *_ELSEWHERE):
        raise LeftAlone(f"the update of a {type(owner).__name__} is no product B A of two matrices")
    if not all(hasattr(owner, attribute) for attribute in ("lora_down", "lora_up", "lora_dim", "scale", "alpha")):
        return None
    if isinstance(getattr(owner, "scalar", None), nn.Parameter):
        raise ValueError(
            f"model: LoRA layer {name} has use_scalar, a factor that begins with 0; with B = 0 as well no gradient "
            "would ever move it. Make it without use_scalar"
        )
    if getattr(owner, "tucker", False):
        raise LeftAlone("the Tucker core lora_mid between A and B is tied to both of their ranks")
    rows = None
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        if module.groups > 1:
            raise LeftAlone(f"with groups={module.groups} each group of outputs reads a part of A of its own")
        # LyCORIS rebuilds the weight and uses the layer's own geometry, dilation included, unless it bypasses.
        rebuilds = is_a(owner, "lycoris.", "LoConModule") and not owner.bypass_mode
        geometry: Any = module if rebuilds else owner.lora_down
        rows = Patches.of(geometry)
        if rows.padding_mode != "zeros":
            raise LeftAlone(f"LyCORIS pads its update with zeros, the layer with {rows.padding_mode}")
    return PatchedSite.of(
        name, module, "lora_down.weight", "lora_up.weight", owner=owner, rows=rows, rank="lora_dim", alpha="alpha",
        scaling="scale", linear_in_rank=not getattr(owner, "rs_lora", False),
    )  # fmt: skip
