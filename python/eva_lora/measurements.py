"""What a pass records of itself as it goes: the way to convergence, and the memory it took."""

import sys
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Trace", "agreement", "peak_memory"]


@dataclass
class Trace:
    """The way to convergence: one entry in every list per batch after which statistics were refreshed.

    Attributes:
        batch: Batches seen by then.
        rows: Unmasked rows (tokens) seen by then.
        agreement: Per layer, how far the components it would be given agree with those of its refresh
            before: the share of the subspace that is the same, or the smallest ``|cosine|`` of a component under
            the "component" criterion. A number in [0, 1], to be compared with tau; None before a layer's
            second refresh.
        converged: Per layer, 1 where it had converged.
    """

    batch: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    agreement: list[list[float | None]] = field(default_factory=list)
    converged: list[list[int]] = field(default_factory=list)

    def record(self, batch: int, rows: int, agreement: list[float | None], converged: list[int]) -> None:
        """Add the entry of a batch, or bring it up to date."""
        if self.batch and self.batch[-1] == batch:
            for entries in (self.batch, self.rows, self.agreement, self.converged):
                entries.pop()
        self.batch.append(batch)
        self.rows.append(rows)
        self.agreement.append([None if value is None else round(value, 6) for value in agreement])
        self.converged.append(converged)


def agreement(
    cosines: NDArray[np.float64],  # (k,)
    overlaps: NDArray[np.float64],  # (k,)
    rank: int,
    criterion: str,
) -> float:
    """How far the leading ``rank`` components agree with those before, in [0, 1]: see :class:`Trace`."""
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
