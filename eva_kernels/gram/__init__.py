"""G += (X − s)ᵀ (X − s) over the unmasked rows of X, with their column sums and sum of squares."""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from .._dispatch import choose_impl
from .._rows import validate_rows
from .core import core_runs, gram_core, mirror_core
from .reference import gram_reference

__all__ = ["gram_accumulate_", "gram_add_", "mirror_"]


def gram_accumulate_(
    gram: Tensor,  # (d, d) float32 or float64
    column_sum: Tensor,  # (d,) float64
    square_sum: Tensor,  # () float64
    x: Tensor,  # (..., d) float32, bfloat16, float16 or float64
    shift: Tensor,  # (d,) gram's dtype
    row_mask: Tensor | None = None,  # (...) bool, False rows are left out
    *,
    sign: float = 1.0,
    impl: str = "auto",
) -> None:
    """Fold the rows of ``x`` into a Gram matrix about a fixed shift, in place.

    ``gram`` += sign · Σ z zᵀ, ``column_sum`` += sign · Σ z, ``square_sum`` += sign · Σ ‖z‖² with
    z = x − shift over the rows where ``row_mask`` is True (all rows if None). ``sign=-1`` takes rows out
    again that were folded in before.

    On a device without float64, which cannot hold these totals, rows are folded in by a statistic.

    Raises:
        TypeError: ``x`` is not floating point, ``row_mask`` not bool, or ``impl`` has no kernel for a dtype.
        ValueError: shapes do not fit, or ``impl`` is unknown or cannot run here.
    """
    _validate(gram, x, shift, row_mask)
    if choose_impl(impl, x, gram) == "triton":
        _gram_op(gram, column_sum, square_sum, x, shift, row_mask, sign)
    elif impl == "auto" and core_runs(x, gram):
        gram_core(gram, column_sum, square_sum, x, shift, row_mask, sign)
        mirror_core(gram)
    else:
        gram_reference(gram, column_sum, square_sum, x, shift, row_mask, sign)


def _validate(gram: Tensor, x: Tensor, shift: Tensor, row_mask: Tensor | None) -> None:
    validate_rows(x, shift, row_mask)
    d = x.shape[-1]
    if gram.shape != (d, d):
        raise ValueError(f"gram: expected shape {(d, d)}, got {tuple(gram.shape)}")


def gram_add_(
    gram: Tensor,  # (d, d) float32 or float64
    column_sum: Tensor,  # (d,) float64
    square_sum: Tensor,  # () float64
    x: Tensor,  # (..., d) float32, bfloat16, float16 or float64
    shift: Tensor,  # (d,) gram's dtype
    row_mask: Tensor | None = None,  # (...) bool, False rows are left out
    *,
    sign: float = 1.0,
    impl: str = "auto",
) -> bool:
    """:func:`gram_accumulate_` for batches that go into one matrix. Returns whether all of it was added to.

    If not, its lower triangle was, and :func:`mirror_` makes the upper one of it. On a GPU kinds of rows are validated
    when they are new. It launches past ``torch.compile``, and with scratch memory that it keeps.

    Raises:
        TypeError, ValueError: as :func:`gram_accumulate_`; or tensors are on different devices.
    """
    if choose_impl(impl, x, gram) == "triton":
        _kernels().add_rows_(gram, column_sum, square_sum, x, shift, row_mask, sign)
        return False
    if impl == "auto" and core_runs(x, gram):
        _validate(gram, x, shift, row_mask)
        gram_core(gram, column_sum, square_sum, x, shift, row_mask, sign)
        return False
    gram_accumulate_(gram, column_sum, square_sum, x, shift, row_mask, sign=sign, impl=impl)
    return True


def mirror_(
    gram: Tensor,  # (d, d) float32
    *,
    impl: str = "auto",
) -> None:
    """Copy the lower triangle onto the upper one, after :func:`gram_add_` with this ``impl`` has left it alone."""
    if choose_impl(impl, gram, gram) == "triton":
        _kernels().mirror_triangle_(gram)
    else:
        mirror_core(gram)


@cache
def _kernels() -> ModuleType:
    """Triton is imported when it is needed, and looked up once."""
    from . import triton

    return triton


@torch.library.custom_op("eva_kernels::gram_accumulate_", mutates_args=("gram", "column_sum", "square_sum"))
def _gram_op(
    gram: Tensor,
    column_sum: Tensor,
    square_sum: Tensor,
    x: Tensor,
    shift: Tensor,
    row_mask: Tensor | None,
    sign: float,
) -> None:
    """The kernel as ``torch.compile`` and fake tensors see it; Triton is imported when it runs."""
    _kernels().gram_triton(gram, column_sum, square_sum, x, shift, row_mask, sign)


@_gram_op.register_fake
def _(*_arguments: object) -> None:
    """Nothing is returned, and what is mutated keeps its shape."""
