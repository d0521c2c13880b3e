"""The eigensolver on a CPU: csrc/cpu/symmetric_eigen_form.h."""

import torch
from torch import Tensor

from .._build import cpu_form, use_core
from .._memory import address
from .reference import symmetric_eigen_reference

CORE_MAX_SIZE = 128  # beyond it LAPACK's divide and conquer is as fast


def core_runs(matrix: Tensor) -> bool:
    """Whether there is compiled code for these matrices on this machine."""
    is_small = matrix.numel() > 0 and matrix.shape[-1] <= CORE_MAX_SIZE
    if matrix.device.type != "cpu" or matrix.dtype != torch.float64 or not is_small:
        return False
    return use_core("auto") is not None and cpu_form() is not None


def symmetric_eigen_core(
    matrix: Tensor,  # (..., k, k) float64
) -> tuple[Tensor, Tensor]:  # (..., k), (..., k, k)
    """As the reference, which is also left what this does not solve: NaN and Inf."""
    flat = matrix.reshape(-1, *matrix.shape[-2:]).contiguous()
    batch, n, _ = flat.shape
    values, vectors = flat.new_empty(batch, n), flat.new_empty(batch, n, n)
    solved = flat.new_zeros(batch, dtype=torch.bool)
    use_core("core").symmetric_eigen(
        matrices=address("matrix", flat, torch.float64, (batch, n, n)), batch=batch, n=n,
        values=address("values", values, torch.float64, (batch, n)),
        vectors=address("vectors", vectors, torch.float64, (batch, n, n)),
        solved=address("solved", solved, torch.bool, (batch,)), threads=torch.get_num_threads(),
    )  # fmt: skip
    if not bool(solved.all()):
        return symmetric_eigen_reference(matrix)
    return values.reshape(matrix.shape[:-1]), vectors.reshape(matrix.shape)
