"""The Gram update on a CPU: csrc/cpu."""

import torch
from torch import Tensor

from .._build import cpu_form, use_core
from .._memory import address, readable
from .._rows import row_views


def core_runs(x: Tensor, gram: Tensor) -> bool:
    """Whether there is a compiled kernel for these rows on this machine."""
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float32) or gram.dtype != torch.float32:
        return False
    return gram.numel() > 0 and use_core("auto") is not None and cpu_form() is not None


def gram_core(
    gram: Tensor,  # (d, d) float32, of which the lower triangle is added to
    column_sum: Tensor,  # (d,) float64
    square_sum: Tensor,  # () float64
    x: Tensor,  # (..., d) bfloat16 or float32
    shift: Tensor,  # (d,) float32
    row_mask: Tensor | None,  # (...) bool
    sign: float,
) -> None:
    """Products accumulate in float32; the totals are those of float32 rows.

    Where the processor multiplies bfloat16, rows in it are multiplied as they are, and the shift is taken out of the
    products: this folder's README has the error.
    """
    core, d = use_core("core"), len(gram)
    target, sums, shift = gram.contiguous(), column_sum.contiguous(), shift.contiguous()
    dtype = torch.float32 if x.dtype == torch.float32 else torch.bfloat16
    for rows, mask in row_views(x, row_mask):
        rows, n = readable(rows), rows.shape[0]
        mask = None if mask is None else mask.contiguous()
        core.gram(
            x=address("x", rows, dtype, (n, d), rows_apart=True), is_float32=dtype == torch.float32, n=n, d=d,
            row_stride=rows.stride(0),
            mask=0 if mask is None else address("row_mask", mask, torch.bool, (n,)),
            shift=address("shift", shift, torch.float32, (d,)), sign=sign,
            gram=address("gram", target, torch.float32, (d, d)),
            column_sum=address("column_sum", sums, torch.float64, (d,)),
            square_sum=address("square_sum", square_sum, torch.float64, ()), threads=torch.get_num_threads(),
        )  # fmt: skip
    if target is not gram:
        gram.copy_(target)
    if sums is not column_sum:
        column_sum.copy_(sums)


def mirror_core(
    gram: Tensor,  # (d, d) float32
) -> None:
    """Copy the lower triangle onto the upper one."""
    target, d = gram.contiguous(), len(gram)
    use_core("core").mirror(matrix=address("gram", target, torch.float32, (d, d)), d=d)
    if target is not gram:
        gram.copy_(target)
