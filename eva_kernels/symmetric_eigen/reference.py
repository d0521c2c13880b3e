"""The eigensolver in plain PyTorch."""

import torch
from torch import Tensor


def symmetric_eigen_reference(
    matrix: Tensor,  # (..., k, k)
) -> tuple[Tensor, Tensor]:  # (..., k), (..., k, k)
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(-1), vectors.flip(-1)


def leading_eigen_reference(
    matrix: Tensor,  # (..., k, k)
    count: int,
) -> tuple[Tensor, Tensor]:  # (..., count), (..., k, count)
    values, vectors = torch.linalg.eigh(matrix)
    return values[..., -count:].flip(-1), vectors[..., -count:].flip(-1)
