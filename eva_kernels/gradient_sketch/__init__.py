"""The leading singular vectors of a gradient G = Σ δ xᵀ that is never formed: from G Ω and Gᵀ Ψ, pass after pass."""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from .._dispatch import choose_impl
from .core import core_runs, outer_core, projected_core
from .power import LowRank, leading_part, random_basis, range_basis
from .reference import outer_reference, projected_reference

__all__ = ["LowRank", "leading_part", "outer_add_", "projected", "random_basis", "range_basis"]


def outer_add_(
    product: Tensor,  # (a, q) float32 or float64
    rows: Tensor,  # (..., a) floating point
    weights: Tensor,  # (..., q) floating point
    row_mask: Tensor | None = None,  # (...) bool, False rows are left out
    *,
    impl: str = "auto",
) -> None:
    """``product`` += Σ row weightᵀ over the rows where ``row_mask`` is True (all if None), in place and in its dtype.

    With rows δ and weights x Ω it becomes G Ω, with rows x and weights δ Ψ it becomes Gᵀ Ψ. Both are sums: those of
    several batches or processes add up.

    Raises:
        TypeError: ``rows`` or ``weights`` are not floating point, ``row_mask`` is not bool, or ``impl`` has no kernel
            for a dtype.
        ValueError: shapes do not fit, or ``impl`` is unknown or cannot run here.
    """
    _validate(rows, row_mask)
    if not weights.dtype.is_floating_point:
        raise TypeError(f"weights: expected a floating-point dtype, got {weights.dtype}")
    if weights.ndim == 0 or weights.shape[:-1].numel() != rows.shape[:-1].numel():
        raise ValueError(f"weights: expected as many rows as {tuple(rows.shape)} has, got {tuple(weights.shape)}")
    if product.shape != (rows.shape[-1], weights.shape[-1]):
        wanted = (rows.shape[-1], weights.shape[-1])
        raise ValueError(f"product: expected shape {wanted}, got {tuple(product.shape)}")
    if choose_impl(impl, rows, product) == "triton":
        _outer_op(product, rows, weights, row_mask)
    elif impl == "auto" and core_runs(rows, weights.shape[-1], product.dtype):
        outer_core(product, rows, weights.to(product.dtype), row_mask)
    else:
        outer_reference(product, rows, weights, row_mask)


def projected(
    rows: Tensor,  # (..., a) floating point
    basis: Tensor,  # (a, q) floating point
    row_mask: Tensor | None = None,  # (...) bool, False rows become zero
    dtype: torch.dtype = torch.float32,
    *,
    impl: str = "auto",
) -> Tensor:  # (rows, q) dtype
    """rows · basis, in ``dtype``: what is kept of a layer's inputs in place of them.

    Raises:
        TypeError: ``rows`` are not floating point, ``row_mask`` is not bool, or ``impl`` has no kernel for a dtype.
        ValueError: shapes do not fit, or ``impl`` is unknown or cannot run here.
    """
    _validate(rows, row_mask)
    if basis.ndim != 2 or basis.shape[0] != rows.shape[-1]:
        raise ValueError(f"basis: expected shape ({rows.shape[-1]}, q), got {tuple(basis.shape)}")
    if choose_impl(impl, rows, rows.new_empty(0, dtype=dtype)) == "triton":
        return _projected_op(rows, basis, row_mask)
    if impl == "auto" and core_runs(rows, basis.shape[1], dtype, basis.dtype):
        return projected_core(rows, basis, row_mask)
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


@cache
def _kernels() -> ModuleType:
    """Triton is imported when it is needed, and looked up once."""
    from . import triton

    return triton


@torch.library.custom_op("eva_kernels::outer_add_", mutates_args=("product",))
def _outer_op(product: Tensor, rows: Tensor, weights: Tensor, row_mask: Tensor | None) -> None:
    """The kernel as ``torch.compile`` and fake tensors see it; Triton is imported when it runs."""
    _kernels().outer_triton(product, rows, weights, row_mask)


@_outer_op.register_fake
def _(*_arguments: object) -> None:
    """Nothing is returned, and what is mutated keeps its shape."""


@torch.library.custom_op("eva_kernels::projected", mutates_args=())
def _projected_op(rows: Tensor, basis: Tensor, row_mask: Tensor | None) -> Tensor:
    """As :func:`_outer_op`."""
    found: Tensor = _kernels().projected_triton(rows, basis, row_mask)
    return found


@_projected_op.register_fake
def _(rows: Tensor, basis: Tensor, row_mask: Tensor | None) -> Tensor:
    return rows.new_empty(rows.shape[:-1].numel(), basis.shape[1], dtype=torch.float32)
