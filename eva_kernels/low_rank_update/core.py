"""The sum on a CPU, in one walk over the matrix: csrc/cpu/low_rank_form.h."""

import math

import torch
from torch import Tensor

from .._build import cpu_form, use_core
from .._memory import address


def core_runs(matrix: Tensor, left: Tensor, impl: str) -> bool:
    """Whether there is compiled code for it on this machine.

    Raises:
        ValueError: another ``impl``.
        RuntimeError: it was asked for and there is none.
    """
    core = use_core(impl)
    takes = matrix.device.type == "cpu" and matrix.dtype in (torch.float32, torch.bfloat16) and matrix.is_contiguous()
    runs = core is not None and cpu_form() is not None and takes and matrix.numel() > 0 and left.shape[1] > 0
    if impl == "core" and not runs:
        raise RuntimeError("impl='core': expected a contiguous matrix in float32 or bfloat16 on a CPU with AVX2")
    return runs


def add_core(
    matrix: Tensor,  # (m, …) float32 or bfloat16, contiguous
    left: Tensor,  # (m, r) float64
    right: Tensor,  # (r, n) float64
) -> tuple[float, float]:
    """The norms of the matrix as it was and of what is rounded off. It is done, or not begun."""
    (m, r), n = left.shape, right.shape[1]
    left, right, flat = left.contiguous(), right.contiguous(), matrix.view(m, n)
    squares = use_core("core").low_rank(
        matrix=address("matrix", flat, matrix.dtype, (m, n)), is_float32=matrix.dtype == torch.float32, m=m, n=n,
        left=address("left", left, torch.float64, (m, r)), r=r, right=address("right", right, torch.float64, (r, n)),
        threads=torch.get_num_threads(),
    )  # fmt: skip
    norm, rounding = map(math.sqrt, squares)
    return norm, rounding
