"""The eigensolver on a CPU: csrc/cpu/symmetric_eigen_form.h."""

import torch
from torch import Tensor

from .._build import cpu_form, use_core
from .._memory import address
from .reference import leading_eigen_reference, symmetric_eigen_reference

CORE_MAX_SIZE = 128  # beyond it LAPACK's divide and conquer is as fast
LEADING_MAX_SIZE = 256  # the same of few eigenpairs


def core_runs(matrix: Tensor) -> bool:
    """Whether there is compiled code for all eigenpairs of these matrices on this machine."""
    return matrix.dtype == torch.float64 and _takes(matrix, CORE_MAX_SIZE)


def leading_core_runs(matrix: Tensor, count: int) -> bool:
    """The same for the leading ones: a quarter of them at most, more take longer than all."""
    return matrix.dtype == torch.float64 and 4 * count <= matrix.shape[-1] and _takes(matrix, LEADING_MAX_SIZE)


def _takes(matrix: Tensor, most: int) -> bool:
    if matrix.device.type != "cpu" or matrix.numel() == 0 or matrix.shape[-1] > most:
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


def leading_eigen_core(
    matrix: Tensor,  # (..., k, k) float64
    count: int,
) -> tuple[Tensor, Tensor]:  # (..., count), (..., k, count)
    """As the reference, which is also left what this does not solve."""
    flat = matrix.reshape(-1, *matrix.shape[-2:]).contiguous()
    batch, n, _ = flat.shape
    values, vectors = flat.new_empty(batch, count), flat.new_empty(batch, count, n)
    solved = flat.new_zeros(batch, dtype=torch.bool)
    use_core("core").leading_eigen(
        matrices=address("matrix", flat, torch.float64, (batch, n, n)), batch=batch, n=n, count=count,
        values=address("values", values, torch.float64, (batch, count)),
        vectors=address("vectors", vectors, torch.float64, (batch, count, n)),
        solved=address("solved", solved, torch.bool, (batch,)), threads=torch.get_num_threads(),
    )  # fmt: skip
    if not bool(solved.all()):
        return leading_eigen_reference(matrix, count)
    outer = matrix.shape[:-2]
    return values.reshape(*outer, count), vectors.mT.reshape(*outer, n, count)
