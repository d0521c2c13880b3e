"""An orthonormal basis of the columns of each matrix in a batch."""

import math

import torch
from torch import Tensor

from .._double import home_of
from .core import core_runs, orthonormalize_core
from .reference import cholesky_qr, greatest_growth, householder_qr

__all__ = [
    "APART",
    "greatest_growth",
    "orthonormalize",
    "orthonormalize_apart",
    "orthonormalize_by_cholesky",
    "orthonormalize_or",
]

APART = 16  # roundings: no more is between columns that are orthonormal

# Of each unit column, what is added in one of an orthonormal matrix. Squared and halved twice it stays above the
# rounding of a float64 Gram matrix, of up to 2¹⁷ rows: there is a Cholesky factor then, whatever the column's rank.
ADDED = 2.0**-16


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
    _require_tall(y)
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


def orthonormalize_by_cholesky(
    y: Tensor,  # (b, d, q) float32 or float64, d ≥ q
) -> tuple[Tensor, Tensor]:  # (b, d, q), (b,) bool
    """:func:`orthonormalize`, and for which matrices it worked: nothing waits for a GPU, which is not asked.

    There Cholesky QR is done twice. Of matrices that it does not work for, with NaN, Inf or numerically dependent
    columns, the result means nothing. On a CPU, and where float64 is on the CPU, it works for all, as there.

    Raises:
        ValueError: fewer rows than columns.
    """
    if y.device.type == "cpu" or home_of(y.device) != y.device:
        return orthonormalize(y), torch.ones(len(y), dtype=torch.bool, device=y.device)
    _require_tall(y)
    growth = greatest_growth(y.shape[-2], y.shape[-1], y.dtype)
    once, enough = cholesky_qr(y.double(), growth)
    twice, is_now = cholesky_qr(once, growth)
    return torch.where(enough[:, None, None], once, twice).to(y.dtype), enough | is_now


def orthonormalize_or(
    y: Tensor,  # (d, q) float32 or float64, d ≥ q
    otherwise: Tensor,  # (d, q) y's dtype, orthonormal columns
) -> Tensor:  # (d, q)
    """Orthonormal columns that span about what those of ``y`` span; ``otherwise`` where that has NaN or Inf.

    On a GPU nothing waits: each unit column has 2⁻¹⁶ of a cosine added, of a frequency of its own, so that what
    dependent columns lack is there; should they stay dependent with that, the result is ``otherwise`` too. On a CPU,
    and where float64 is on the CPU, :func:`orthonormalize` does it, to the bit.

    Raises:
        ValueError: fewer rows than columns.
    """
    home = home_of(y.device)
    if home != y.device:
        return orthonormalize_or(y.to(home), otherwise.to(home)).to(y.device)
    _require_tall(y)
    if core_runs(y):
        return orthonormalize_core(y, otherwise)
    if y.device.type == "cpu":
        finite = y.numel() == 0 or all(map(math.isfinite, y.aminmax()))
        return orthonormalize(y if finite else otherwise)
    (d, q), wide = y.shape, y.double()
    norm = torch.linalg.vector_norm(wide, dim=0)
    i, j = (torch.arange(size, dtype=torch.float64, device=y.device) for size in (d, q))
    cosines = (2 / d) ** 0.5 * torch.outer(i + 0.5, j * (math.pi / d)).cos()
    found, done = orthonormalize_by_cholesky((wide / norm.where(norm > 0, 1) + ADDED * cosines)[None])
    return torch.where(done, found[0].to(y.dtype), otherwise)


def orthonormalize_apart(
    block: Tensor,  # (..., d, c) float32 or float64
    space: Tensor,  # (..., d, q) of its dtype, orthonormal columns
) -> Tensor:  # (..., d, c)
    """Orthonormal columns that span a block's part outside of a space, and others outside of it where that is less.

    Raises:
        ValueError: fewer rows than columns, of both together.
    """
    norms = torch.linalg.vector_norm(block, dim=-2, keepdim=True)
    block = block / norms.where(norms > 0, 1)
    if not space.shape[-1]:
        return orthonormalize(block)
    for _ in range(2):  # the second time takes what the first one's rounding has left
        block = block - space @ (space.mT @ block)
    block = orthonormalize(block)
    if bool((space.mT @ block).abs().max() <= APART * torch.finfo(block.dtype).eps):
        return block
    # The space holds all of the block but rounding: columns that were completed know nothing of it.
    return orthonormalize(torch.cat([space, block], -1))[..., space.shape[-1] :]


def _require_tall(y: Tensor) -> None:
    if y.ndim < 2 or y.shape[-2] < y.shape[-1]:
        raise ValueError(f"y: expected shape (..., d, q) with d ≥ q, got {tuple(y.shape)}")
