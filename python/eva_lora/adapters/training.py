"""Whether an adapter was trained already: said before it is overwritten."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["TrainedLayers"]


@dataclass(frozen=True)
class TrainedLayers:
    """Which layers of an adapter are not as they were before training, as far as this process holds them.

    Attributes:
        names: A layer's name for each of ``moved``.
        moved: Whether a tensor is not what it was; bool, without dimensions, each where its tensor is.
        meshes: Those that tensors are sharded over.
    """

    names: list[str]
    moved: list[Tensor]
    meshes: list[Any]

    @classmethod
    def of(cls, adapter: object) -> "TrainedLayers":
        """Look at an adapter. One that has no ``zero_before_training()`` cannot be asked: nothing is found in it.

        Weights on the meta device hold nothing, and so nothing that could be lost.
        """
        ask = getattr(adapter, "zero_before_training", None)
        return cls.among(ask() if ask is not None else {})

    @classmethod
    def among(cls, told: Mapping[str, Sequence[Tensor]]) -> "TrainedLayers":
        """Look at tensors by layer that are zero before training."""
        named = [(name, tensor) for name, tensors in told.items() for tensor in tensors]
        named = [(name, tensor.detach()) for name, tensor in named if tensor.device.type != "meta"]
        meshes = list(dict.fromkeys(tensor.device_mesh for _, tensor in named if hasattr(tensor, "device_mesh")))
        local: list[Any] = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for _, tensor in named]
        return cls([name for name, _ in named], [tensor.any() for tensor in local], meshes)

    def require_none(self) -> None:
        """Raise where there are any.

        Raises:
            ValueError: the adapter was trained; the message names the first such layer.
        """
        trained = self.trained()
        if trained:
            raise ValueError(
                f"model: its adapter was trained: B is not zero in {len(trained)} of {len(set(self.names))} layers, "
                f"the first is {trained[0]}. It would be overwritten. To train on, start nothing; to begin anew, pass "
                "overwrite=True to the function of eva_lora that is to, also where init_lora_weights=False has filled "
                "B with random numbers"
            )

    def trained(self) -> list[str]:
        """The names of such layers: on all processes alike, where they hold shards. Waits once for each device."""
        return list(dict.fromkeys(name for name, moved in zip(self.names, self._everywhere(), strict=True) if moved))

    def _everywhere(self) -> list[bool]:
        """What was found, here or by any process that holds a shard."""
        found = [False] * len(self.moved)
        for device in dict.fromkeys(moved.device for moved in self.moved):
            here = [i for i, moved in enumerate(self.moved) if moved.device == device]
            flags = torch.stack([self.moved[i] for i in here]).to(torch.int32)
            for mesh in self.meshes:
                for dim in range(mesh.ndim):
                    dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=mesh.get_group(dim))
            for i, flag in zip(here, flags.tolist(), strict=True):
                found[i] = bool(flag)
        return found
