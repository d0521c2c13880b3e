"""Cholesky QR and its fallback in plain PyTorch, in float64."""

import torch
from torch import Tensor

UNIT_ROUNDOFF = 2.0**-53  # of the algebra's float64


def greatest_growth(d: int, q: int, dtype: torch.dtype) -> float:
    """The ‖R⁻¹‖₁ up to which one pass of Cholesky QR leaves no more than the rounding of its result to ``dtype``.

    R is the Cholesky factor of unit columns' Gram matrix. The derivation is in this folder's README.
    """
    algebra = (d + 8 * (q + 1)) * UNIT_ROUNDOFF
    return max(torch.finfo(dtype).eps / 2 / algebra, 4.0) ** 0.5


def cholesky_qr(
    y: Tensor,  # (b, d, q) float64
    growth: float,
) -> tuple[Tensor, Tensor]:  # (b, d, q), (b,) bool
    """One pass of Cholesky QR, and whether it was enough: no column of ``|R⁻¹|`` sums to more than ``growth``.

    Columns are scaled to unit norm inside the q × q matrix, not in the data. A matrix whose Cholesky
    factorisation fails comes back as it was.
    """
    gram = y.mT @ y
    squares = gram.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(squares > 0, squares.where(squares > 0, 1).rsqrt(), 1)
    eye = torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)
    factor, info = torch.linalg.cholesky_ex(scale[:, :, None] * gram * scale[:, None, :], upper=True)
    solved = info == 0
    factor = torch.where(solved[:, None, None], factor, eye)
    inverse = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=True)
    enough = solved & (torch.linalg.matrix_norm(inverse, 1) <= growth)  # NaN is not enough
    turn = torch.where(solved[:, None, None], scale[:, :, None] * inverse, eye)
    return y @ turn, enough


def householder_qr(
    y: Tensor,  # (b, d, q) float64
) -> Tensor:  # (b, d, q)
    """Householder QR: orthonormal for any finite input, zero and repeated columns included."""
    norm = torch.linalg.vector_norm(y, dim=-2, keepdim=True)
    return torch.linalg.qr(y / norm.where(norm > 0, 1)).Q
