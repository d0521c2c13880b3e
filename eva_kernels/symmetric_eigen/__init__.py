"""Eigenvalues and eigenvectors of many small symmetric positive semidefinite matrices at once."""

import torch
from torch import Tensor

from .._dispatch import choose_impl
from .._double import double, home_of, like
from .core import core_runs, leading_core_runs, leading_eigen_core, symmetric_eigen_core
from .reference import leading_eigen_reference, symmetric_eigen_reference
from .steep import is_steep, refined

__all__ = ["leading_eigen", "symmetric_eigen"]

MAX_SIZE = 256  # of a matrix the kernel takes
CACHED_SIZE = 128  # up to it float64 matrices, one for each multiprocessor, stay in the L2 cache
BATCHED_SINCE = (2, 12)  # before, PyTorch's eigh on CUDA solves matrices beyond 32 x 32 one after the other
_DTYPES = (torch.float32, torch.float64)


def symmetric_eigen(
    matrix: Tensor,  # (..., k, k) float32 or float64, symmetric positive semidefinite
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:  # (..., k) descending, (..., k, k)
    """Eigenpairs of every matrix of a batch: ``matrix @ vectors`` = ``vectors * values``.

    An eigenvalue that rounding has made negative comes back as its magnitude from the kernel and as it is
    from the reference; both are of the size of the rounding. "auto" takes the kernel on a GPU for k up to 256,
    and on a CPU with AVX2 or AVX-512 compiled code for float64 and k up to 128. From torch 2.12 on, whose own
    solver on CUDA takes all matrices at once, it takes the kernel for k up to 128 only.

    Raises:
        TypeError: ``matrix`` is neither float32 nor float64.
        ValueError: ``matrix`` is not square, ``impl`` is unknown or cannot run here, or an explicit "triton"
            meets k beyond 256.
    """
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"matrix: expected shape (..., k, k), got {tuple(matrix.shape)}")
    if matrix.dtype not in _DTYPES:
        raise TypeError(f"matrix: expected dtype float32 or float64, got {matrix.dtype}")
    chosen = choose_impl(impl, matrix, matrix, dtypes=_DTYPES, accumulators=_DTYPES)
    fits = matrix.shape[-1] <= (CACHED_SIZE if impl == "auto" and eigh_is_batched() else MAX_SIZE)
    if impl == "triton" and not fits:
        raise ValueError(f"matrix: expected k up to {MAX_SIZE} for impl='triton', got {matrix.shape[-1]}")
    if chosen == "triton" and fits:
        from .triton import symmetric_eigen_triton

        return symmetric_eigen_triton(matrix)
    if (home := home_of(matrix.device)) != matrix.device:  # nor has it the eigensolver
        values, vectors = symmetric_eigen(matrix.to(home), impl=impl)
        return values.to(matrix.device), vectors.to(matrix.device)
    if impl == "auto" and core_runs(matrix):
        return symmetric_eigen_core(matrix)
    return symmetric_eigen_reference(matrix)


def leading_eigen(
    matrix: Tensor,  # (..., k, k) float32 or float64, symmetric positive semidefinite: the lower triangle is read
    count: int,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:  # (..., count) descending, (..., k, count)
    """The eigenpairs of the ``count`` largest eigenvalues of every matrix of a batch.

    In float64, whatever the dtype. Of a quarter of them at most, "auto" takes compiled code on a CPU with AVX2 or
    AVX-512, k up to 256; else it is :func:`symmetric_eigen`, and what is left of all. Where the last of them is far
    below the first, they are solved for again without the largest (README.md).

    Raises:
        TypeError: ``matrix`` is neither float32 nor float64.
        ValueError: ``matrix`` is not square, ``count`` is out of range, or another ``impl`` than "auto" or "reference".
    """
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"matrix: expected shape (..., k, k), got {tuple(matrix.shape)}")
    if matrix.dtype not in _DTYPES:
        raise TypeError(f"matrix: expected dtype float32 or float64, got {matrix.dtype}")
    if not 1 <= count <= matrix.shape[-1]:
        raise ValueError(f"count: expected 1 to {matrix.shape[-1]}, got {count}")
    if impl not in ("auto", "reference"):
        raise ValueError(f"impl: expected 'auto' or 'reference', got {impl!r}")
    values, vectors = _leading(double(matrix), count, impl)
    return like(values, matrix), like(vectors, matrix)


def _leading(matrix: Tensor, count: int, impl: str) -> tuple[Tensor, Tensor]:  # of float64, at home
    if impl == "reference":
        return leading_eigen_reference(matrix, count)
    if leading_core_runs(matrix, count):
        values, vectors = leading_eigen_core(matrix, count)
        if not is_steep(values):
            return values, vectors
    whole = matrix.tril() + matrix.tril(-1).mT
    values, vectors = symmetric_eigen(whole)
    if is_steep(values[..., :count]):
        values, vectors = refined(whole, values, vectors, count)
    return values[..., :count], vectors[..., :count]


def eigh_is_batched() -> bool:
    """Whether PyTorch's ``eigh`` solves a batch of matrices of any size on CUDA at once, and not in a loop."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return torch.version.hip is None and version >= BATCHED_SINCE
