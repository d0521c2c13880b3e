"""The leading singular vectors of a gradient G = Σ δ xᵀ that is never formed: from G Ω and Gᵀ Ψ, pass after pass."""

import torch
from torch import Tensor

from .power import LowRank, leading_part, random_basis, range_basis
from .reference import outer_reference, projected_reference

__all__ = ["LowRank", "leading_part", "outer_add_", "projected", "random_basis", "range_basis"]


def outer_add_(
    product: Tensor,  # (a, q) float32 or float64
    rows: Tensor,  # (..., a) floating point
    weights: Tensor,  # (..., q) floating point
    row_mask: Tensor | None = None,  # (...) bool, False rows are left out
) -> None:
    """``product`` += Σ row weightᵀ over the rows where ``row_mask`` is True (all if None), in place and in its dtype.

    With rows δ and weights x Ω it becomes G Ω, with rows x and weights δ Ψ it becomes Gᵀ Ψ. Both are sums: those of
    several batches or processes add up.

    Raises:
        TypeError: ``rows`` or ``weights`` are not floating point, or ``row_mask`` is not bool.
        ValueError: shapes do not fit.
    """
    _validate(rows, row_mask)
    if not weights.dtype.is_floating_point:
        raise TypeError(f"weights: expected a floating-point dtype, got {weights.dtype}")
    if weights.ndim == 0 or weights.shape[:-1].numel() != rows.shape[:-1].numel():
        raise ValueError(f"weights: expected as many rows as {tuple(rows.shape)} has, got {tuple(weights.shape)}")
    if product.shape != (rows.shape[-1], weights.shape[-1]):
        wanted = (rows.shape[-1], weights.shape[-1])
        raise ValueError(f"product: expected shape {wanted}, got {tuple(product.shape)}")
    outer_reference(product, rows, weights, row_mask)


def projected(
    rows: Tensor,  # (..., a) floating point
    basis: Tensor,  # (a, q) floating point
    row_mask: Tensor | None = None,  # (...) bool, False rows become zero
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # (rows, q) dtype
    """rows · basis, in ``dtype``: what is kept of a layer's inputs in place of them.

    Raises:
        TypeError: ``rows`` are not floating point, or ``row_mask`` is not bool.
        ValueError: shapes do not fit.
    """
    _validate(rows, row_mask)
    if basis.ndim != 2 or basis.shape[0] != rows.shape[-1]:
        raise ValueError(f"basis: expected shape ({rows.shape[-1]}, q), got {tuple(basis.shape)}")
    return projected_reference(rows, basis, row_mask, dtype)


def _validate(rows: Tensor, row_mask: Tensor | None) -> None:
    if not rows.dtype.is_floating_point:
        raise TypeError(f"rows: expected a floating-point dtype, got {rows.dtype}")
    if rows.ndim == 0:
        raise ValueError("rows: expected a tensor of rows (..., a), got a scalar")
    if row_mask is None:
        return
    if row_mask.dtype != torch.bool:
        raise TypeError(f"row_mask: expected dtype torch.bool, got {row_mask.dtype}")
    if row_mask.shape != rows.shape[:-1]:
        raise ValueError(f"row_mask: expected shape {tuple(rows.shape[:-1])}, got {tuple(row_mask.shape)}")
