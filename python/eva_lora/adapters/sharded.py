"""Weights that no process holds whole: how to write them, and how to read their shapes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from eva_kernels.streaming_svd import sent

from .outline import ModelOutline
from .preflight import is_lora, is_partitioned

__all__ = ["fill_", "whole_weights"]


def fill_(
    parameter: Tensor,
    value: Tensor,  # of the parameter's shape, the same on all processes
) -> None:
    """Copy a whole matrix into a parameter; of a DTensor, into the shard that is here. Processes send nothing.

    The host does not wait for a GPU.
    """
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import DTensor, Replicate

        assert isinstance(parameter, DTensor)
        mesh, placements = parameter.device_mesh, parameter.placements
        local = value.to(device=parameter.device, dtype=parameter.dtype)
        whole = DTensor.from_local(local, mesh, [Replicate()] * mesh.ndim, run_check=False)
        value = whole.redistribute(placements=placements)
    parameter.copy_(sent(value, parameter.device))


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Within it weights that a process holds a part of, in no shape, have their own and can be written.

    Those that ``FullyShardedDataParallel`` has flattened are all gathered, on every process; of those that DeepSpeed
    ZeRO-3 has partitioned the adapters' are. Any other model is left alone.
    """
    outline = ModelOutline(
        model if isinstance(model, nn.Module) else nn.Module()
    )  # what is none is refused by name later
    named = model.named_parameters() if any(map(is_partitioned, outline.parameters)) else ()
    adapters = [p for name, p in named if is_lora(name) and is_partitioned(p)]
    if adapters:
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(adapters, modifier_rank=0), torch.no_grad():
            yield
        return
    if "FullyShardedDataParallel" not in outline.class_names:
        yield
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    with FullyShardedDataParallel.summon_full_params(model, writeback=True), torch.no_grad():
        yield
