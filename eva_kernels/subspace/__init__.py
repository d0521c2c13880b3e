"""Y += (X − s)ᵀ ((X − s) Q) over the unmasked rows of X, with their column sums and sum of squares."""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from .._dispatch import choose_impl
from .._rows import validate_rows
from .core import core_runs, subspace_core
from .reference import subspace_reference
from .sample import Sample

__all__ = ["Sample", "subspace_accumulate_", "subspace_add_"]


def subspace_accumulate_(
    product: Tensor,  # (d, q) float32 or float64
    column_sum: Tensor,  # (d,) float64
    square_sum: Tensor,  # () float64
    x: Tensor,  # (..., d) float32, bfloat16, float16 or float64
    basis: Tensor,  # (d, q) product's dtype
    shift: Tensor,  # (d,) product's dtype
    row_mask: Tensor | None = None,  # (...) bool, False rows are left out
    *,
    sign: float = 1.0,
    impl: str = "auto",
) -> None:
    """Fold the rows of ``x`` into the product of their second moment with a basis, in place.

    ``product`` += sign · Σ z (zᵀ basis), ``column_sum`` += sign · Σ z, ``square_sum`` += sign · Σ ‖z‖²
    with z = x − shift over the rows where ``row_mask`` is True (all rows if None). ``sign=-1`` takes rows
    out again that were folded in before.

    On a device without float64, which cannot hold these totals, rows are folded in by a statistic.

    Raises:
        TypeError: ``x`` is not floating point, ``row_mask`` not bool, or ``impl`` has no kernel for a dtype.
        ValueError: shapes do not fit, or ``impl`` is unknown or cannot run here.
    """
    validate_rows(x, shift, row_mask)
    if basis.ndim != 2 or basis.shape[0] != x.shape[-1]:
        raise ValueError(f"basis: expected shape ({x.shape[-1]}, q), got {tuple(basis.shape)}")
    if product.shape != basis.shape:
        raise ValueError(f"product: expected shape {tuple(basis.shape)}, got {tuple(product.shape)}")
    chosen = choose_impl(impl, x, product)
    if chosen == "triton":
        _subspace_op(product, column_sum, square_sum, x, basis, shift, row_mask, sign)
    elif impl == "auto" and core_runs(x, product):
        subspace_core(product, column_sum, square_sum, x, basis, shift, row_mask, sign)
    else:
        subspace_reference(product, column_sum, square_sum, x, basis, shift, row_mask, sign)


def subspace_add_(
    product: Tensor,  # (d, q) the sample's dtype
    column_sum: Tensor,  # (d,) float64
    square_sum: Tensor,  # () float64
    x: Tensor,  # (..., d) float32, bfloat16, float16 or float64
    sample: Sample,  # a basis (d, q)
    row_mask: Tensor | None = None,  # (...) bool, False rows are left out
    *,
    sign: float = 1.0,
    impl: str = "auto",
) -> None:
    """:func:`subspace_accumulate_` for batches that go into one product: what they have in common is made once.

    On a GPU kinds of rows are validated when they are new. It launches past ``torch.compile``, and with scratch memory
    that it keeps.

    Raises:
        TypeError, ValueError: as :func:`subspace_accumulate_`; or tensors are on different devices.
    """
    if choose_impl(impl, x, product) == "triton":
        _kernels().add_rows_(product, column_sum, square_sum, x, sample, row_mask, sign)
    else:
        subspace_accumulate_(
            product, column_sum, square_sum, x, sample.basis, sample.shift, row_mask, sign=sign, impl=impl
        )


@cache
def _kernels() -> ModuleType:
    """Triton is imported when it is needed, and looked up once."""
    from . import triton

    return triton


@torch.library.custom_op("eva_kernels::subspace_accumulate_", mutates_args=("product", "column_sum", "square_sum"))
def _subspace_op(
    product: Tensor,
    column_sum: Tensor,
    square_sum: Tensor,
    x: Tensor,
    basis: Tensor,
    shift: Tensor,
    row_mask: Tensor | None,
    sign: float,
) -> None:
    """The kernel as ``torch.compile`` and fake tensors see it; Triton is imported when it runs."""
    _kernels().subspace_triton(product, column_sum, square_sum, x, basis, shift, row_mask, sign)


@_subspace_op.register_fake
def _(*_arguments: object) -> None:
    """Nothing is returned, and what is mutated keeps its shape."""
