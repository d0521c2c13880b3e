"""torchtune: ``LoRALinear`` (of QAT too), ``DoRALinear`` and ``LoRAGroupedExperts`` (github.com/pytorch/torchtune)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .answers import Answers
from .base_weights import BaseWeight, KnownWeight
from .held import Halves, hold, is_held
from .parameters import ParameterSite
from .recognition import is_a, require_unmerged
from .sharded import fill_
from .sites import LayerInput, LoraSite, first_tensor

__all__ = ["site_of"]

_UNMERGE = "load the base checkpoint again"


def site_of(name: str, module: Any) -> LoraSite | list[LoraSite] | None:
    """The site that a layer of torchtune with a LoRA is, or the two that a mixture of experts is.

    Raises:
        ValueError: its adapter is merged.
    """
    a, b = "lora_a.weight", "lora_b.weight"
    if is_a(module, "torchtune.", "LoRALinear"):  # computes alpha / rank in its forward
        require_unmerged(name, module, module.lora_b.weight, _UNMERGE)
        return ParameterSite.of(name, module, a, b, rank="rank", alpha="alpha")
    if is_a(module, "torchtune.", "DoRALinear"):  # keeps neither rank nor alpha
        return ParameterSite.of(name, module, a, b, scaling="scaling")
    if is_a(module, "torchtune.", "MoE") and is_a(module.experts, "torchtune.", "LoRAGroupedExperts"):
        return [_experts(name, module, *which) for which in (("gate_up_proj", "gate", "up"), ("down_proj", "down"))]
    return None


def _experts(name: str, moe: Any, projection: str, *matrices: str) -> LoraSite:
    experts = moe.experts
    path = f"{name}.experts.{projection}" if name else f"experts.{projection}"
    if is_held(experts):
        raise ValueError(
            f"model: half of A and B of {path} is held, since it started from part of its base weight; to begin anew, "
            "make the model anew"
        )
    for matrix in matrices:
        require_unmerged(path, experts, getattr(experts, f"lora_{matrix}_b"), _UNMERGE)
    parts, width, rank = getattr(experts, f"lora_{matrices[0]}_a").shape
    return GroupedExpertsSite(
        path, moe, width, rank, removable=False, parts=parts, owner=experts,
        a=tuple(f"lora_{m}_a" for m in matrices), b=tuple(f"lora_{m}_b" for m in matrices),
    )  # fmt: skip


@dataclass(frozen=True)
class GroupedExpertsSite(ParameterSite):
    """The gate and up projections of all experts, which are fed the same rows, or their down projections.

    A is (experts, d, rank) and B (experts, rank, out). The mixture is watched and routes a second time, since the
    experts are not told which token a row is. All matrices of the experts multiply with one alpha / ``rank`` of the
    module; so a rank that changes leaves both as they are, and with them the scaling.
    """

    def inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterable[LayerInput]:
        moe: Any = self.module
        experts = moe.experts
        x = first_tensor(self.name, args, kwargs)
        x = x.reshape(-1, x.shape[-1])
        scores, tokens, counts = moe.router(x)
        counts = counts.long().tolist()
        routed = torch.split(x[tokens] * scores.reshape(-1, 1), counts)
        for expert, (rows, mine) in enumerate(zip(routed, torch.split(tokens, counts), strict=True)):
            if len(mine):
                if self.a == ("lora_down_a",):
                    rows = experts.act_fn(rows @ experts.gate_proj[expert]) * (rows @ experts.up_proj[expert])
                yield LayerInput(rows, expert, mine, (len(x),), x)

    def write(self, rank: int, lora_a: Tensor | None, *, adjust_scaling: bool) -> None:
        if rank != self.rank and not adjust_scaling:
            raise ValueError(
                f"plan: {self.name} cannot keep alpha while its rank goes from {self.rank} to {rank}: its projections "
                "share one alpha and rank. Use adjust_scaling_factors=True, or rho=1"
            )
        own = [lora_a] * len(self.a)
        if lora_a is not None and len(lora_a) > self.parts * rank:
            own = [*lora_a.chunk(len(self.a))]
        for path_a, path_b, mine in zip(self.a, self.b, own, strict=True):
            new_a, new_b = getattr(self.owner, path_a), getattr(self.owner, path_b)
            if rank != self.rank:
                new_a = nn.Parameter(new_a.new_empty(self.parts, self.in_features, rank), new_a.requires_grad)
                new_b = nn.Parameter(new_b.new_empty(self.parts, rank, new_b.shape[2]), new_b.requires_grad)
                setattr(self.owner, path_a, new_a)
                setattr(self.owner, path_b, new_b)
            if mine is not None:
                fill_(new_a, mine.view(self.parts, rank, self.in_features).mT)
            new_b.zero_()

    def write_second(self, lora_b: Tensor) -> None:
        sizes = [self.parts * b.shape[2] for b in self.second]
        for b, rows in zip(self.second, torch.split(lora_b / self.answers().scaling, sizes), strict=True):
            fill_(b, rows.view(self.parts, -1, rows.shape[1]).mT)

    def answers(self) -> Answers:
        experts: Any = self.owner
        outputs = [
            torch.arange(b.shape[2], dtype=torch.int64, device=b.device) for b in self.second for _ in range(self.parts)
        ]
        return Answers(experts.alpha / experts.rank, outputs, self.second[0].new_ones(1))

    def matrices(self, answers: Answers) -> tuple[BaseWeight, ...]:
        return tuple(
            KnownWeight(
                self.name, self.owner, self.in_features, b.shape[2], b.dtype, part=part,
                matrix=partial(_of_expert, self.owner, f"{path.removeprefix('lora_').removesuffix('_a')}_proj", part),
            )
            for path, b in zip(self.a, self.second, strict=True)
            for part in range(self.parts)
        )  # fmt: skip

    def hold(self) -> None:
        hold(self.owner, {**dict.fromkeys(self.a, Halves(2)), **dict.fromkeys(self.b, Halves(1))})


def _of_expert(experts: nn.Module, name: str, part: int) -> Tensor:  # (out, d)
    stack: Tensor = getattr(experts, name)
    return stack[part].T
