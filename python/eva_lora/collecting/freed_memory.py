"""What the C library does with memory that was freed: keeps it, or gives it back to the system.

Others than glibc do not notice.
"""

import ctypes
from collections.abc import Callable

import torch

__all__ = ["give_back_freed_memory", "keep_freed_memory"]


def keep_freed_memory() -> None:
    """Have glibc keep the memory of activations from one layer to the next, rather than give it back each time.

    It maps blocks larger than the largest it has yet seen freed anew every time, and gives back what is free at the
    heap's end beyond twice that size (mallopt(3), M_MMAP_THRESHOLD). So one block is freed that is about as large as
    still counts there, 32 MiB; none of it is ever written, and so none is taken. glibc remembers it beyond the pass.
    """
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


def give_back_freed_memory() -> None:
    """Have glibc give back every whole page that is free now.

    Where activations are kept for a backward, what is freed between them is too small for the next one, and stays.
    """
    if _TRIM is not None:
        _TRIM(0)


def _found() -> Callable[[int], int] | None:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return trim


_TRIM = _found()
