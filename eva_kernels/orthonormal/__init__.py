"""An orthonormal basis of the columns of each matrix in a batch."""

import torch
from torch import Tensor

from .._double import home_of
from .core import core_runs, orthonormalize_core
from .reference import cholesky_qr, greatest_growth, householder_qr

__all__ = ["greatest_growth", "orthonormalize"]


def orthonormalize(
    y: Tensor,  # (..., d, q) float32 or float64, d ≥ q
) -> Tensor:  # (..., d, q)
    """Orthonormal columns whose leading i span the leading i columns of ``y``, for every i.

    Cholesky QR of unit columns in float64, twice where once is not enough (Yamamoto et al. 2015); matrices for which
    that fails (numerically dependent columns) take Householder QR, which completes a deficient span by directions of
    its own. Whatever the processor, no entry of QᵀQ − I exceeds 3 · 2⁻²⁴ for float32, 4 (d + 8 (q + 1)) · 2⁻⁵³ for
    float64 (after Householder QR a small multiple of d q · 2⁻⁵³).

    Raises:
        ValueError: fewer rows than columns.
    """
    if y.ndim < 2 or y.shape[-2] < y.shape[-1]:
        raise ValueError(f"y: expected shape (..., d, q) with d ≥ q, got {tuple(y.shape)}")
    if (home := home_of(y.device)) != y.device:
        return orthonormalize(y.to(home)).to(y.device)
    flat = y.reshape(-1, *y.shape[-2:])
    if core_runs(flat):
        each = [orthonormalize_core(matrix) for matrix in flat]
        return each[0].reshape(y.shape) if len(each) == 1 else torch.stack(each).reshape(y.shape)
    wide, growth = flat.double(), greatest_growth(y.shape[-2], y.shape[-1], y.dtype)
    q, enough = cholesky_qr(wide, growth)
    again = ~enough
    if bool(again.any()):
        q[again], enough[again] = cholesky_qr(q[again], growth)
        failed = ~enough
        if bool(failed.any()):
            q[failed] = householder_qr(wide[failed])
    return q.to(y.dtype).reshape(y.shape)
