"""Layers that are split over ranks: which part of an input is here, and which rank counts its rows.

The ranks of a tensor-parallel group run one batch together. An input that all of them hold whole (a column-parallel
layer's) is folded in by the first of them alone; of one whose features are split (a row-parallel layer's) each folds in
its block; of one whose sequence is split each folds in its tokens. What they hold adds up like that of any other ranks.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from eva_kernels._double import double

from ..adapters import LoraSite, ModelOutline, is_lora
from .rows import RowMask

__all__ = ["Part", "TensorParallel"]

SAME_INPUT = 1e-5  # relative: far above what reducing in another order changes, far below what other tokens do


class Part(NamedTuple):
    """What of an input is here.

    Attributes:
        x: The part, an ordinary tensor.
        kind: "replica": all of it, as on the other ranks; "block": some of its features; "tokens": some of its rows.
    """

    x: Tensor
    kind: str


class TensorParallel:
    """The ranks that this one runs its batches together with.

    Args:
        group: Their process group.

    Attributes:
        rank: Of this process, among them.
        size: How many there are.
        leader: The first of them, by its rank in the default group.
    """

    def __init__(self, group: "dist.ProcessGroup") -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.leader = dist.get_process_group_ranks(group)[0]
        self._kinds: dict[str, str] = {}  # of the inputs that come as ordinary tensors, by layer

    @classmethod
    def of(cls, outline: ModelOutline, sites: Sequence[LoraSite]) -> "TensorParallel | None":
        """Of a model as it is sharded; None where no layer is split over ranks.

        Raises:
            ValueError: layers are split over different ranks.
        """
        fully_sharded = "FSDPModule" in outline.class_names
        groups = [group for site in sites if (group := _group_of(site.module, fully_sharded)) is not None]
        if not groups:
            return None
        if len({group.group_name for group in groups}) > 1:
            raise ValueError("model: its layers are split over different tensor-parallel groups; expected one")
        return cls(groups[0]) if groups[0].size() > 1 else None

    def divided(self, site: LoraSite) -> LoraSite:
        """The site, whose rank is a multiple of these ranks where A or B is split along it."""
        for name, weight in site.module.named_parameters():
            placement = weight.placements[-1] if is_lora(name) and hasattr(weight, "placements") else None
            if placement is not None and placement.is_shard() and weight.shape[placement.dim] == site.rank:
                return replace(site, rank_multiple=math.lcm(site.rank_multiple, self.size))
        return site

    def part(self, site: LoraSite, x: Tensor) -> Part:
        """What of a layer's input a tensor is.

        An ordinary tensor of the full width is looked at once on all ranks: equal ones are the same input, where equal
        means sums and sums of squares that differ by no more than the rounding of collectives.
        """
        if hasattr(x, "placements"):
            return self._of_dtensor(x)
        if x.shape[-1] * self.size == site.in_features:
            return Part(x, "block")
        kind = self._kinds.get(site.name)
        if kind is None:
            wide = double(x.detach())
            mine = torch.stack([wide.sum(), wide.square().sum()])
            if mine.device != x.device:  # it has no float64, nor perhaps the group a way between CPUs
                mine = mine.to(torch.float32).to(x.device)
            everyone = mine.new_empty(2 * self.size)
            gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            gather(everyone, mine, group=self.group)
            same = bool(torch.isclose(everyone.view(self.size, 2), mine, rtol=SAME_INPUT, atol=0).all())
            kind = self._kinds[site.name] = "replica" if same else "tokens"
        return Part(x, kind)

    def add_up_(self, x: Tensor) -> None:
        """The sum over these ranks, in place."""
        dist.all_reduce(x, group=self.group)

    def whole(self, block: Tensor) -> Tensor:  # (..., d / ranks) -> (..., d)
        """All features of rows whose features are split."""
        rows = block.reshape(-1, block.shape[-1]).contiguous()
        blocks = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(blocks, rows, group=self.group)
        return torch.cat(blocks, 1).view(*block.shape[:-1], -1)

    def tokens(self, mask: RowMask) -> RowMask:
        """The mask of the tokens that are here, of a sequence that is split."""
        return mask.split(self.size, self.rank)

    def _of_dtensor(self, x: Any) -> Part:
        from torch.distributed.tensor import Partial, Replicate

        placement = x.placements[-1]
        if isinstance(placement, Partial):
            x, placement = x.redistribute(placements=[*x.placements[:-1], Replicate()]), Replicate()
        if isinstance(placement, Replicate):
            return Part(x.to_local(), "replica")
        return Part(x.to_local(), "block" if placement.dim % x.ndim == x.ndim - 1 else "tokens")


def _group_of(layer: nn.Module, fully_sharded: bool) -> "dist.ProcessGroup | None":
    """The group that a layer's base weight is split over, beside the sharding of ``fully_shard``.

    That puts its dimensions of the mesh before those of tensor parallelism.
    """
    base: Any = layer
    while hasattr(base, "base_layer"):
        base = base.base_layer
    weight: Any = getattr(base, "weight", None)
    if not hasattr(weight, "device_mesh"):
        return None
    mesh, split = weight.device_mesh, [placement for placement in weight.placements if not placement.is_replicate()]
    return mesh.get_group(mesh.ndim - 1) if len(split) > fully_sharded else None
