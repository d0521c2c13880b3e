"""Libraries known by the layout of their layers: they are recognised by class name and attributes."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from .parameters import ParameterSite
from .recognition import is_a
from .sites import LeftAlone, LoraSite, Patches

__all__ = ["automodel", "cloneofsimo", "lora_vit", "megatron_bridge", "torchtitan"]


def cloneofsimo(name: str, module: Any) -> LoraSite | None:
    """``LoraInjectedLinear`` and ``LoraInjectedConv2d`` of cloneofsimo/lora, whose scale does not know the rank.

    Raises:
        LeftAlone: EVA does not apply to it.
    """
    if not is_a(module, "", "LoraInjectedLinear", "LoraInjectedConv2d"):
        return None
    if not isinstance(getattr(module, "selector", None), (nn.Identity, type(None))):
        raise LeftAlone("a selector between A and B is tied to their rank")
    conv, rows = getattr(module, "conv", None), None
    if conv is not None:
        if conv.groups > 1:
            raise LeftAlone(f"with groups={conv.groups} each group of outputs reads a part of A of its own")
        rows = Patches.of(module.lora_down)
    rank = "r" if hasattr(module, "r") else ()
    return ParameterSite.of(name, module, "lora_down.weight", "lora_up.weight", rows=rows, rank=rank)


def torchtitan(name: str, module: Any) -> LoraSite | None:
    """What ``apply_lora`` of torchtitan makes of a linear layer."""
    if not isinstance(module, nn.Linear) or not all(hasattr(module, n) for n in ("lora_a", "lora_b", "_lora_scaling")):
        return None
    return ParameterSite.of(name, module, "lora_a.weight", "lora_b.weight", scaling="_lora_scaling")


def automodel(name: str, module: Any) -> LoraSite | None:
    """``LinearLoRA`` of NeMo Automodel, also where it patches a layer; it may read A's weight without calling A."""
    if not is_a(module, "", "LinearLoRA") or not isinstance(getattr(module, "lora_A", None), nn.Module):
        return None
    return ParameterSite.of(name, module, "lora_A.weight", "lora_B.weight", rank="dim", scaling="scale")


def megatron_bridge(name: str, module: Any) -> LoraSite | None:
    """``ParallelLinearAdapter`` of Megatron-Bridge. It is what is watched: a fused layer norm may come before it.

    Raises:
        ValueError: A is split over tensor-parallel workers.
    """
    if not is_a(module, "", "ParallelLinearAdapter"):
        return None
    held = module.linear_in.weight.shape[0]
    if held != module.dim:
        raise ValueError(
            f"model: A of {name} has {held} of its {module.dim} rows in this process. Initialise before A is split "
            "over tensor-parallel workers: collect, plan, build the model with the plan's ranks, load"
        )
    workers = int(getattr(getattr(module, "config", None), "tensor_model_parallel_size", 1) or 1)
    return ParameterSite.of(
        name.removesuffix(".adapter"), module, "linear_in.weight", "linear_out.weight", rank="dim", alpha="alpha",
        rank_multiple=workers,
    )  # fmt: skip


@dataclass(frozen=True)
class IntegerScaledSite(ParameterSite):
    """The scaling is alpha // rank, so a rank above alpha has none.

    Raises:
        ValueError: that is so of the new rank.
    """

    def rescale(self, rank: int, adjust: bool) -> None:
        super().rescale(rank, adjust)
        _require_scaling(self.name, self.owner, rank)


def lora_vit(name: str, module: Any) -> LoraSite | None:
    """LoRA-ViT's ``_LoRALayer``, and ``_LoRA_qkv`` whose query and value have one rank together.

    Raises:
        ValueError: its scaling is 0.
    """
    if is_a(module, "", "_LoRALayer"):
        a: tuple[str, ...] = ("w_a.weight",)
        b: tuple[str, ...] = ("w_b.weight",)
    elif is_a(module, "", "_LoRA_qkv_timm", "_LoRA_qkv"):
        a, b = ("linear_a_q.weight", "linear_a_v.weight"), ("linear_b_q.weight", "linear_b_v.weight")
    else:
        return None
    if not hasattr(module, "alpha"):  # its first versions have no scaling
        return ParameterSite.of(name, module, a, b)
    _require_scaling(name, module, module.r)
    return IntegerScaledSite.of(name, module, a, b, rank="r", alpha="alpha")


def _require_scaling(name: str, module: Any, rank: int) -> None:
    if module.alpha < rank:
        raise ValueError(
            f"layer {name}: its scaling alpha // rank would be 0 with alpha {module.alpha} and rank {rank}; set "
            "adjust_scaling_factors=True, max_rank, or a larger alpha"
        )
