"""The matrix of low rank that stands for another where it matters: on inputs of a known second moment."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._double import double, like
from ..orthonormal import orthonormalize
from .iteration import leading_directions
from .moment import PrincipalMoment, SecondMoment, principal_moment
from .reference import dense_directions
from .steep import NEAR, steep_directions

__all__ = ["LowRankFit", "PrincipalMoment", "SecondMoment", "fit_image", "fit_low_rank", "principal_moment"]

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
    _check(matrix, moment, rank)
    rows, columns = matrix.shape[-2:]
    flat = matrix.reshape(-1, rows, columns)
    product = flat @ moment.factor
    total = moment.energy(flat, product)
    left, energies = _leading(flat, moment, rank, product, total, seed)
    batch = matrix.shape[:-2]
    right = left.mT @ flat
    return LowRankFit(
        left.reshape(*batch, rows, rank), right.reshape(*batch, rank, columns), energies.reshape(*batch, rank),
        total.reshape(batch),
    )  # fmt: skip


def fit_image(
    matrix: Tensor,  # (..., m, n) float32 or float64
    moment: SecondMoment,
    rank: int,
    *,
    seed: int = 0,
) -> LowRankFit:
    """U Uᵀ M with U the leading left singular vectors of M R, in place of those of a root of R: CorDA's.

    They are those of M R² Mᵀ, where the leading directions of R count for more, so that all of M F is searched at once,
    and little more is needed (README.md). Where that does not do, it is :func:`fit_low_rank`'s way with R².

    Args:
        matrix, rank, seed: As in :func:`fit_low_rank`.
        moment: R, of the matrix's dtype and device or in float64 where that is, with one ``rest`` for all directions;
            for several matrices :func:`principal_moment`'s, once for all.

    Returns:
        ``energies`` are of M R² Mᵀ, squared singular values of M R; ``total`` is tr(M R Mᵀ) all the same.

    Raises:
        TypeError, ValueError: as :func:`fit_low_rank`.
    """
    _check(matrix, moment, rank)
    if moment.rest.ndim:
        raise ValueError(f"moment: expected one rest for all directions, got {tuple(moment.rest.shape)}")
    flat = matrix.reshape(-1, *matrix.shape[-2:])
    principal = SecondMoment(*(like(part, flat) for part in principal_moment(moment)))
    product, rest = flat @ principal.factor, double(principal.rest)
    squares = double(principal.factor).square().sum(0)
    growth = like((squares + 2 * rest).sqrt(), flat)  # (λ + t)² = λ (λ + 2 t) + t²
    total, product = principal.energy(flat, product), product * growth
    found = None
    if product.shape[-1] >= rank and product.shape[-1] + rank <= min(flat.shape[1:]):
        found = steep_directions(flat, rest, product, rank)
    if found is not None:
        left, energies, after = found
        if flat.dtype == torch.float32 and bool((energies[:, -1] - after < NEAR * energies[:, -1]).any()):
            wide = fit_image(double(matrix), type(moment)(*map(double, moment)), rank, seed=seed)
            return LowRankFit(like(wide.left, matrix), like(wide.right, matrix), wide.energies, wide.total)
    else:
        squared = SecondMoment(principal.factor * growth, like(rest.square(), flat))
        left, energies = _leading(flat, squared, rank, product, squared.energy(flat, product), seed)
    batch = matrix.shape[:-2]
    right = left.mT @ flat
    return LowRankFit(
        left.reshape(*batch, *left.shape[1:]), right.reshape(*batch, *right.shape[1:]),
        energies.reshape(*batch, rank), total.reshape(batch),
    )  # fmt: skip


def _leading(
    flat: Tensor,  # (b, m, n)
    moment: SecondMoment,
    rank: int,
    product: Tensor,  # (b, m, k): M F
    total: Tensor,  # (b,) float64
    seed: int,
) -> tuple[Tensor, Tensor]:  # (b, m, r), (b, r) float64
    """The leading eigenvectors and eigenvalues of M R Mᵀ, by the way that costs less."""
    rows, columns = flat.shape[1:]
    width = min(rows, rank + max(8, rank // 2))  # of the iteration's blocks
    if min(rows, columns) > DENSE_BLOCKS * width:
        return leading_directions(flat, moment, rank, width, product, total, seed)
    if rows <= columns:
        return dense_directions(flat, moment, rank)
    wide, triangle = torch.linalg.qr(flat)  # M = Q T, and U is Q times T's own
    left, energies = dense_directions(triangle, moment, rank)
    return orthonormalize(wide @ left), energies


def _check(matrix: Tensor, moment: SecondMoment, rank: int) -> None:
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
