"""Bases of all sites compared with their predecessors: the evidence that a convergence tracker reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._build import cuda_state, use_core
from .._memory import cuda_address

MAX_COLUMNS = 512  # of the CUDA kernel


@dataclass(frozen=True)
class Comparison:
    """What successive bases Q, Q′ of each site show; columns beyond a site's own are 0."""

    cosines: NDArray[np.float64]  # (sites, k) |qᵢᵀq′ᵢ| / (‖qᵢ‖ ‖q′ᵢ‖), 0 where a column is 0
    overlaps: NDArray[np.float64]  # (sites, k) ‖(QᵀQ′)₁..ᵢ,₁..ᵢ‖²_F in column i − 1
    norms: NDArray[np.float64]  # (sites, k) ‖q′ᵢ‖, 1 to rounding
    components_converged: NDArray[np.int32]  # (sites,) length of the leading run of cosines ≥ tau
    subspace_converged: NDArray[np.int32]  # (sites,) largest i with overlapᵢ / i ≥ tau


class BasisComparison:
    """Compares all sites' bases in one launch and copies one small result, without stalling the stream.

    ``impl="cuda"`` takes float32 arrays of one device with unit column stride, and enqueues; "reference"
    takes anything NumPy reads, and computes at once in float64; "auto" is "cuda" where the module was built
    with it and there is a device.

    Args:
        shapes: (rows, columns) of each site's bases, columns ≤ 512.
        tau: threshold of both criteria, see :class:`eva_kernels.convergence.ConvergenceTracker`.
        device: number of the CUDA device.

    Raises:
        ValueError: no site, a shape out of range, a tau outside [0, 1], an unknown ``impl``.
        RuntimeError: ``impl="cuda"`` without a built CUDA part or a device.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, int]], tau: float = 0.99, *, impl: str = "auto", device: int = 0
    ) -> None:
        if impl not in ("auto", "cuda", "reference"):
            raise ValueError(f"impl: expected 'auto', 'cuda' or 'reference', got {impl!r}")
        if not shapes or any(rows < 1 or not 1 <= columns <= MAX_COLUMNS for rows, columns in shapes):
            raise ValueError(f"shapes: expected pairs of 1 or more rows and 1 to {MAX_COLUMNS} columns, got {shapes}")
        if not 0.0 <= tau <= 1.0:
            raise ValueError(f"tau: expected a number from 0 to 1, got {tau}")
        self._shapes, self._tau, self._device = [tuple(shape) for shape in shapes], tau, device
        available = cuda_state().devices > device
        if impl == "cuda" and not available:
            raise RuntimeError(f"impl='cuda': expected CUDA device {device}, but cuda: {cuda_state().summary}")
        self._cuda: Any = None
        self._result: Comparison | None = None
        if impl != "reference" and available:
            rows, columns = np.array(shapes, np.int64).T
            core = use_core("core")
            self._cuda = core.BasisComparison(np.ascontiguousarray(rows), np.ascontiguousarray(columns), tau, device)

    @property
    def impl(self) -> str:
        return "reference" if self._cuda is None else "cuda"

    def start(self, previous: Sequence[Any], current: Sequence[Any], *, stream: int = 0) -> None:
        """Compare (rows, columns) arrays, one pair per site, on the CUDA stream with handle ``stream``.

        CUDA arrays (``__cuda_array_interface__``) must stay unchanged until the stream has passed this work.

        Raises:
            TypeError: not an array of float32 on CUDA.
            ValueError: another number or shape of arrays than announced, another device, a column stride, rows that
                overlap, or memory that no float can be at.
        """
        for name, bases in (("previous", previous), ("current", current)):
            shapes = [tuple(basis.shape) for basis in bases]
            if shapes != self._shapes:
                raise ValueError(f"{name}: expected arrays of shapes {self._shapes}, got {shapes}")
        if self._cuda is None:
            self._result = compare_bases_reference(previous, current, self._tau)
        else:
            self._cuda.launch(*self._addresses("previous", previous), *self._addresses("current", current), stream)

    def _addresses(self, name: str, bases: Sequence[Any]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Device address and row stride, in floats, of each array."""
        pointers, strides = zip(*(cuda_address(name, basis, self._device) for basis in bases), strict=True)
        return np.array(pointers, np.uint64), np.array(strides, np.int64)

    def ready(self) -> bool:
        """Whether :meth:`result` would return at once."""
        return self._result is not None if self._cuda is None else bool(self._cuda.ready())

    def result(self) -> Comparison:
        """The comparison started last; waits for it, not for later work on its stream.

        Raises:
            RuntimeError: nothing was started.
        """
        if self._cuda is not None:
            return Comparison(**self._cuda.result())
        if self._result is None:
            raise RuntimeError("result: expected a start before it")
        return self._result


def compare_bases_reference(previous: Sequence[Any], current: Sequence[Any], tau: float) -> Comparison:
    """The definition, in float64."""
    width = max(basis.shape[1] for basis in current)
    cosines, overlaps, norms = (np.zeros((len(current), width)) for _ in range(3))
    converged = np.zeros((2, len(current)), np.int32)
    for s, (before, after) in enumerate(zip(previous, current, strict=True)):
        q, p = np.asarray(before, np.float64), np.asarray(after, np.float64)
        columns = q.shape[1]
        product = q.T @ p
        norms[s, :columns] = np.linalg.norm(p, axis=0)
        scale = np.linalg.norm(q, axis=0) * norms[s, :columns]
        np.divide(np.abs(np.diagonal(product)), scale, out=cosines[s, :columns], where=scale > 0)
        shells = np.maximum.outer(np.arange(columns), np.arange(columns))  # entry (i, j) is in blocks > max(i, j)
        overlaps[s, :columns] = np.cumsum(np.bincount(shells.ravel(), (product**2).ravel(), columns))
        passed = np.flatnonzero(overlaps[s, :columns] / np.arange(1, columns + 1) >= tau)
        converged[0, s] = np.logical_and.accumulate(cosines[s, :columns] >= tau).sum()
        converged[1, s] = passed[-1] + 1 if passed.size else 0
    return Comparison(cosines, overlaps, norms, *converged)
