"""The subspace product on a CPU with AVX-512 BF16: csrc/cpu/subspace.cpp."""

import torch
from torch import Tensor

from .._build import use_core
from .._rows import row_views


def core_runs(x: Tensor, product: Tensor) -> bool:
    """Whether there is a compiled kernel for these rows on this machine."""
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float32) or product.dtype != torch.float32:
        return False
    core = use_core("auto")
    return core is not None and core.has_bf16_subspace()


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
    """x − shift and the basis are rounded to bfloat16 for the products, which accumulate in float32.

    On real activations that changes the loss of captured variance in its third digit (README of
    ``streaming_svd``); the totals are those of float32 rows.
    """
    core = use_core("core")
    basis, shift = basis.contiguous(), shift.contiguous()
    target = product.contiguous()
    for rows, mask in row_views(x, row_mask):
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        mask = None if mask is None else mask.contiguous()
        core.subspace(
            x=rows.data_ptr(), is_float32=rows.dtype == torch.float32, n=rows.shape[0], d=rows.shape[1],
            row_stride=rows.stride(0),
            mask=0 if mask is None else mask.data_ptr(), shift=shift.data_ptr(), basis=basis.data_ptr(),
            q=basis.shape[1], sign=sign, product=target.data_ptr(), column_sum=column_sum.data_ptr(),
            square_sum=square_sum.data_ptr(), threads=torch.get_num_threads(),
        )  # fmt: skip
    if target is not product:
        product.copy_(target)
