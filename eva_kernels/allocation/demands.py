"""What an allocation is asked for, checked once at the public edge."""

from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

LARGEST = 2**31 - 1  # so that sums and least common multiples of ranks stay within 64 bits


@dataclass(frozen=True)
class Demands:
    """Arguments of :func:`eva_kernels.allocation.allocate_ranks` after the check of types and ranges.

    Whether they can be met together is for the implementation to find out.
    """

    candidates: NDArray[np.int64]  # (sites,)
    budget: int
    groups: NDArray[np.int64] | None  # (sites,) labels 0, 1, …
    min_rank: int
    max_rank: int | None
    rank_multiple: int
    divisors: NDArray[np.int64] | None  # (sites,)

    @classmethod
    def checked(
        cls,
        candidates: ArrayLike,
        budget: int,
        groups: ArrayLike | None,
        min_rank: int,
        max_rank: int | None,
        rank_multiple: int,
        divisors: ArrayLike | None,
    ) -> "Demands":
        """Raises TypeError or ValueError naming the argument that is not what it must be."""
        sites = integers("candidates", candidates, at_least=0)
        return cls(
            candidates=sites,
            budget=integer("budget", budget, at_least=0),
            groups=None if groups is None else group_labels(groups, sites.size),
            min_rank=integer("min_rank", min_rank, at_least=0),
            max_rank=None if max_rank is None else integer("max_rank", max_rank, at_least=1),
            rank_multiple=integer("rank_multiple", rank_multiple, at_least=1),
            divisors=None if divisors is None else integers("divisors", divisors, at_least=1, size=sites.size),
        )


def integer(name: str, value: Any, *, at_least: int) -> int:
    if isinstance(value, bool | np.bool_) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    value = index(value)
    if not at_least <= value <= LARGEST:
        raise ValueError(f"{name}: expected an integer from {at_least} to {LARGEST}, got {value}")
    return value


def integers(name: str, values: ArrayLike, *, at_least: int, size: int | None = None) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.size == 0 and size in (0, None):
        return np.zeros(0, np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got {array.dtype}")
    if array.ndim != 1 or size not in (None, array.size):
        expected = "one integer per site" if size is None else f"shape ({size},)"
        raise ValueError(f"{name}: expected {expected}, got shape {array.shape}")
    if array.min() < at_least or array.max() > LARGEST:
        wrong = array.min() if array.min() < at_least else array.max()
        raise ValueError(f"{name}: expected integers from {at_least} to {LARGEST}, got {wrong}")
    return np.ascontiguousarray(array, np.int64)


def group_labels(groups: ArrayLike, size: int) -> NDArray[np.int64]:
    """Equal labels for equal groups, counted from 0."""
    labels = np.unique(integers("groups", groups, at_least=-LARGEST, size=size), return_inverse=True)[1]
    return np.ascontiguousarray(labels.reshape(-1), np.int64)


def matrix(name: str, values: ArrayLike, rows: int) -> NDArray[np.float64]:
    """``values`` as contiguous float64 of shape (rows, k)."""
    array = np.asarray(values)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name}: expected real numbers, got {array.dtype}")
    if array.ndim != 2 or array.shape[0] != rows:
        raise ValueError(f"{name}: expected shape ({rows}, k), got {array.shape}")
    return np.ascontiguousarray(array, np.float64)
