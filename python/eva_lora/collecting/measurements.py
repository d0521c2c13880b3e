"""What a pass measures of itself: how far components agree with those before, and the memory it took."""

import sys

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["agreement", "peak_memory"]


def agreement(
    cosines: NDArray[np.float64],  # (k,)
    overlaps: NDArray[np.float64],  # (k,)
    rank: int,
    criterion: str,
) -> float:
    """How far the leading ``rank`` components agree with those before, in [0, 1]: ``Trace.agreement``."""
    if rank == 0:
        return 1.0
    if criterion == "component":
        return float(cosines[:rank].min())
    return min(1.0, float(overlaps[rank - 1]) / rank)


def peak_memory() -> dict[str, int]:
    """Most bytes in use at once so far, by device: this process's on the CPU ("cpu"; absent where the
    platform does not tell), PyTorch's allocations on each GPU."""
    peaks = {}
    try:
        import resource
    except ImportError:  # Windows
        pass
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peaks["cpu"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            peaks[f"cuda:{index}"] = torch.cuda.max_memory_allocated(index)
    return peaks
