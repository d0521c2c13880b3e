"""The subspace product on a CPU: csrc/cpu."""

import torch
from torch import Tensor

from .._build import cpu_form, use_core
from .._memory import address, readable
from .._rows import row_views


def core_runs(x: Tensor, product: Tensor) -> bool:
    """Whether there is a compiled kernel for these rows on this machine."""
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float32) or product.dtype != torch.float32:
        return False
    if product.numel() == 0:
        return False
    return use_core("auto") is not None and cpu_form() is not None


def subspace_core(
    product: Tensor,  # (d, q) float32
    column_sum: Tensor,  # (d,) float64
    square_sum: Tensor,  # () float64
    x: Tensor,  # (..., d) bfloat16 or float32
    basis: Tensor,  # (d, q) float32
    shift: Tensor,  # (d,) float32
    row_mask: Tensor | None,  # (...) bool
    sign: float,
) -> None:
    """Products accumulate in float32; the totals are those of float32 rows.

    Where the processor multiplies bfloat16, x − shift and the basis are rounded to it for the products. On real
    activations that changes the loss of captured variance in its third digit (README of ``streaming_svd``).
    """
    core, (d, q) = use_core("core"), product.shape
    basis, shift = basis.contiguous(), shift.contiguous()
    target, sums = product.contiguous(), column_sum.contiguous()
    dtype = torch.float32 if x.dtype == torch.float32 else torch.bfloat16
    for rows, mask in row_views(x, row_mask):
        rows, n = readable(rows), rows.shape[0]
        mask = None if mask is None else mask.contiguous()
        core.subspace(
            x=address("x", rows, dtype, (n, d), rows_apart=True), is_float32=dtype == torch.float32, n=n, d=d,
            row_stride=rows.stride(0),
            mask=0 if mask is None else address("row_mask", mask, torch.bool, (n,)),
            shift=address("shift", shift, torch.float32, (d,)), basis=address("basis", basis, torch.float32, (d, q)),
            q=q, sign=sign, product=address("product", target, torch.float32, (d, q)),
            column_sum=address("column_sum", sums, torch.float64, (d,)),
            square_sum=address("square_sum", square_sum, torch.float64, ()), threads=torch.get_num_threads(),
        )  # fmt: skip
    if target is not product:
        product.copy_(target)
    if sums is not column_sum:
        column_sum.copy_(sums)
