"""Scratch memory of launches that follow one another, and what is known of them."""

import threading
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

MAX_PLANS = 256  # kept of one device and stream; batches of ever new lengths would fill it


class Workspace:
    """Scratch memory for launches that follow one another on one device and stream, and what is known of them.

    A buffer has a name, grows and never shrinks. What programs count their arrivals with is zero whenever no launch is
    under way.

    Attributes:
        plans: By everything that decides it, how an update is launched. A plan holds buffers: where one has to grow,
            all plans are forgotten.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.plans = device, dict[Hashable, Any]()
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._origin = torch.empty(0, dtype=torch.float32, device=device)

    def buffer(self, name: str, size: int, dtype: torch.dtype = torch.float32) -> Tensor:  # (size or more,)
        """Memory that holds anything."""
        return self._held(name, size, dtype, self._origin.new_empty)

    def counters(self, size: int) -> Tensor:  # (size or more,) int32
        """Memory that holds zeros, and must again when a launch is over."""
        return self._held("counters", size, torch.int32, self._origin.new_zeros)

    def _held(self, name: str, size: int, dtype: torch.dtype, make: Callable[..., Tensor]) -> Tensor:
        held = self._buffers.get((name, dtype))
        if held is None or held.numel() < size:
            self._buffers[name, dtype] = held = make(size, dtype=dtype)
            self.plans.clear()
        return held

    def keep(self, key: Hashable, plan: Any) -> None:
        """Remember a plan."""
        if len(self.plans) >= MAX_PLANS:
            self.plans.clear()
        self.plans[key] = plan


_OWN = threading.local()  # launches of two threads may come between each other, and so share nothing


def workspace_of(device: torch.device, stream: int) -> Workspace:
    """This thread's workspace for launches on a device's stream."""
    owned: dict[tuple[torch.device, int], Workspace] | None = getattr(_OWN, "workspaces", None)
    if owned is None:
        owned = _OWN.workspaces = {}
    workspace = owned.get((device, stream))
    if workspace is None:
        workspace = owned[device, stream] = Workspace(device)
    return workspace


def release_workspaces() -> None:
    """Let go of the scratch memory that this thread's updates have kept for the next one, which makes its own."""
    _OWN.workspaces = {}
