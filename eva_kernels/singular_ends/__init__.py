"""The singular vectors of a matrix at one end of its spectrum, without the others."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._double import double
from ..orthonormal import orthonormalize
from .krylov import leading_vectors
from .reference import dense_vectors

__all__ = ["SingularEnd", "leading_singular", "trailing_singular"]

DENSE_SIDE, DENSE_BLOCKS = 128, 3  # a smaller side of so many, or so many blocks of it: all directions cost no more


class SingularEnd(NamedTuple):
    """Left singular vectors and values, from the end of the spectrum inwards.

    Attributes:
        left: U, (..., m, r): orthonormal columns.
        right: Uᵀ M, (..., r, n).
        values: (..., r) float64: descending from the leading end, ascending from the trailing one.
    """

    left: Tensor
    right: Tensor
    values: Tensor


def leading_singular(
    matrix: Tensor,  # (..., m, n) float32 or float64
    rank: int,
    *,
    seed: int = 0,
) -> SingularEnd:
    """The ``rank`` largest: a block Krylov space (Musco & Musco 2015, arXiv 1504.05477) of a width and depth that the
    README beside this file has measured, or a full decomposition in float64 where that costs no more.

    Args:
        matrix: Several of one shape are decomposed together.
        rank: 1 to the smaller side.
        seed: Of the start, drawn from a generator of its own.

    Raises:
        TypeError: another dtype.
        ValueError: fewer than two dimensions, or a rank out of range.
    """
    flat, batch = _checked(matrix, rank)
    width = max(8, rank)  # no less, so that a value that is there more than once is found as often
    wide = flat if flat.shape[1] <= flat.shape[2] else flat.mT  # the smaller side is the one that is searched
    found = leading_vectors(wide, rank, width, seed) if wide.shape[1] > max(DENSE_SIDE, DENSE_BLOCKS * width) else None
    if found is None:
        return _end(flat, batch, *dense_vectors(flat, rank, leading=True))
    return _end(flat, batch, orthonormalize(found if wide is flat else flat @ found))


def trailing_singular(
    matrix: Tensor,  # (..., m, n) float32 or float64
    rank: int,
) -> SingularEnd:
    """The ``rank`` smallest of the min(m, n) that there are, by a full decomposition in float64: no product with the
    matrix's square tells them from rounding. Arguments and errors as in :func:`leading_singular`."""
    flat, batch = _checked(matrix, rank)
    return _end(flat, batch, *dense_vectors(flat, rank, leading=False))


def _checked(matrix: Tensor, rank: int) -> tuple[Tensor, torch.Size]:
    if matrix.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"matrix: expected float32 or float64, got {matrix.dtype}")
    if matrix.ndim < 2:
        raise ValueError(f"matrix: expected shape (..., m, n), got {tuple(matrix.shape)}")
    if not 1 <= rank <= min(matrix.shape[-2:]):
        raise ValueError(f"rank: expected 1 to {min(matrix.shape[-2:])} for shape {tuple(matrix.shape)}, got {rank}")
    return matrix.reshape(-1, *matrix.shape[-2:]), matrix.shape[:-2]


def _end(matrices: Tensor, batch: torch.Size, left: Tensor, values: Tensor | None = None) -> SingularEnd:
    """With Uᵀ M, and the batch's dimensions back; without values, their norms."""
    right = left.mT @ matrices
    values = double(torch.linalg.vector_norm(right, dim=-1)) if values is None else values
    return SingularEnd(*(part.reshape(*batch, *part.shape[1:]) for part in (left, right, values)))
