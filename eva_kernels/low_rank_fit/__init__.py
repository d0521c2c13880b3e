"""The matrix of low rank that stands for another where it matters: on inputs of a known second moment."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..orthonormal import orthonormalize
from .iteration import leading_directions
from .moment import SecondMoment
from .reference import dense_directions

__all__ = ["LowRankFit", "SecondMoment", "fit_low_rank"]

DENSE_BLOCKS = 4  # so many blocks of the iteration's columns cost more than all directions at once


class LowRankFit(NamedTuple):
    """L = U Uᵀ M of rank r, the best of that rank for E‖(M − L) x‖².

    Attributes:
        left: U, (..., m, r): orthonormal columns, leading ones first.
        right: Uᵀ M, (..., r, n). M's own rows where U is complete.
        energies: (..., r) float64, descending: what each direction takes of ``total``.
        total: (...) float64: tr(M R Mᵀ), what is left with L = 0.
    """

    left: Tensor
    right: Tensor
    energies: Tensor
    total: Tensor


def fit_low_rank(
    matrix: Tensor,  # (..., m, n) float32 or float64
    moment: SecondMoment,
    rank: int,
    *,
    seed: int = 0,
) -> LowRankFit:
    """The L of rank ``rank`` that minimises tr((M − L) R (M − L)ᵀ), without an inverse or a root of R.

    U holds the leading eigenvectors of M R Mᵀ, and L = U Uᵀ M (the minimiser for any R, singular ones included: in the
    factored form of R the objective is ‖(M − L) G‖² with G Gᵀ = R, and Eckart–Young applies to M G). They are found by
    block Lanczos iteration with restarts (Golub & Underwood 1977; Musco & Musco 2015, arXiv 1504.05477), or at once
    where M has few rows. Products are in the matrix's dtype, the small algebra in float64.

    Args:
        matrix: M; several of one shape are fitted together.
        moment: R, of the matrix's dtype and device; shared by all of them.
        rank: 1 to the smaller side of M.
        seed: Of the start, drawn from a generator of its own.

    Raises:
        TypeError: another dtype.
        ValueError: shapes that do not fit, or a rank out of range.
    """
    if matrix.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"matrix: expected float32 or float64, got {matrix.dtype}")
    if matrix.ndim < 2:
        raise ValueError(f"matrix: expected shape (..., m, n), got {tuple(matrix.shape)}")
    rows, columns = matrix.shape[-2:]
    if not 1 <= rank <= min(rows, columns):
        raise ValueError(f"rank: expected 1 to {min(rows, columns)} for shape {tuple(matrix.shape)}, got {rank}")
    if moment.factor.ndim != 2 or len(moment.factor) != columns or moment.rest.shape not in ((), (columns,)):
        raise ValueError(
            f"moment: expected a factor ({columns}, k) and rest () or ({columns},), got "
            f"{tuple(moment.factor.shape)} and {tuple(moment.rest.shape)}"
        )
    flat = matrix.reshape(-1, rows, columns)
    product = flat @ moment.factor
    total = moment.energy(flat, product)
    width = min(rows, rank + max(8, rank // 2))  # of the iteration's blocks
    if min(rows, columns) > DENSE_BLOCKS * width:
        left, energies = leading_directions(flat, moment, rank, width, product, total, seed)
    elif rows <= columns:
        left, energies = dense_directions(flat, moment, rank)
    else:  # M = Q T, and U is Q times T's own
        wide, triangle = torch.linalg.qr(flat)
        left, energies = dense_directions(triangle, moment, rank)
        left = orthonormalize(wide @ left)
    batch = matrix.shape[:-2]
    right = left.mT @ flat
    return LowRankFit(
        left.reshape(*batch, rows, rank), right.reshape(*batch, rank, columns), energies.reshape(*batch, rank),
        total.reshape(batch),
    )  # fmt: skip
