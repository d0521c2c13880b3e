"""Weights that no process holds whole: how to write them, and how to read their shapes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["fill_", "plain_name", "whole_weights"]

_WRAPPER = "_fsdp_wrapped_module."


def fill_(
    parameter: Tensor,
    value: Tensor,  # of the parameter's shape, the same on all processes
) -> None:
    """Copy a whole matrix into a parameter; of a DTensor, into the shard that is here. Nothing is sent."""
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import DTensor, Replicate

        assert isinstance(parameter, DTensor)
        mesh, placements = parameter.device_mesh, parameter.placements
        local = value.to(device=parameter.device, dtype=parameter.dtype)
        whole = DTensor.from_local(local, mesh, [Replicate()] * mesh.ndim, run_check=False)
        value = whole.redistribute(placements=placements)
    parameter.copy_(value)


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Within it the weights that ``FullyShardedDataParallel`` has flattened have their shapes, and can be written.

    All of them are gathered, on every process. A model without such a wrapper is left alone.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()  # what is none is refused by name later
    if not any(type(module).__name__ == "FullyShardedDataParallel" for module in modules):
        yield
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    with FullyShardedDataParallel.summon_full_params(model, writeback=True), torch.no_grad():
        yield


def plain_name(name: str) -> str:
    """A module's name without the wrappers on the way to it."""
    return name.replace(_WRAPPER, "").removesuffix(f".{_WRAPPER[:-1]}")
