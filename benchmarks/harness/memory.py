"""Peaks of memory: what the allocators gave out during a call, or what the process held."""

import ctypes
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

PROC = Path("/proc/self")


def allocated_peak(call: Callable[[], object], device: str) -> int:
    """Most bytes that were allocated during a call, of PyTorch's allocator and of Python's, which NumPy uses."""
    if device != "cpu":
        return _of_cuda(call)
    of_python = 0

    def traced() -> None:
        nonlocal of_python
        tracemalloc.start()
        try:
            call()
            of_python = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    most, _ = tensor_bytes(traced)
    return most + of_python


def tensor_bytes(call: Callable[[], object]) -> tuple[int, int]:
    """Bytes of PyTorch's allocator on the CPU beyond those before a call: the most during it, and those after it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    standing = most = 0
    for event in recorded.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            standing += event.nbytes()
            most = max(most, standing)
    return most, standing


def resident_peak(call: Callable[[], object], device: str) -> int | None:
    """Most bytes that the process held during a call beyond those before it; None where the system does not tell.

    For whole passes: pages that the C library keeps for reuse are given back first.
    """
    if device != "cpu":
        return _of_cuda(call)
    if not (PROC / "clear_refs").exists():
        call()
        return None
    with suppress(OSError, AttributeError):  # not glibc: the figure may then be low
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    (PROC / "clear_refs").write_text("5")
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(entry: str) -> int:
    lines = (PROC / "status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(entry)).split()[1])


def _of_cuda(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)
