"""Eigenvalues so far apart that solvers, which err by a rounding of the largest, tell little of the last."""

import torch
from torch import Tensor

STEEP = 1e-7  # of the largest value: of those below, less is told than is asked for
APART = 1e-4  # of the largest: those below are solved for again, without those above


def is_steep(values: Tensor) -> bool:  # (..., count) descending
    """Whether the last of any matrix's eigenvalues is that far below its first."""
    return bool((values[..., -1] < STEEP * values[..., 0]).any())


def refined(
    matrix: Tensor,  # (..., k, k) float64, symmetric positive semidefinite
    values: Tensor,  # (..., k) descending
    vectors: Tensor,  # (..., k, k)
    count: int,
) -> tuple[Tensor, Tensor]:  # as given
    """The eigenpairs, of which those far below the largest are solved for anew in the coordinates of their own vectors,
    and so on as long as there are such among the leading ``count``.

    With V what was found, Vᵀ A V is diagonal but for the solver's error. Of a graded A its entries (i, j) are as small
    as (λᵢ λⱼ)^½, and rounded likewise, since V's entries are small where A's are large. Rows of far larger values turn
    the others by what couples them over those values, which is nothing.
    """
    flat, k = matrix.reshape(-1, *matrix.shape[-2:]), matrix.shape[-1]
    found = values.reshape(-1, k).clone(), vectors.reshape(-1, k, k).clone()
    for a, theta, v in zip(flat, *found, strict=True):
        first = 0
        while first < count and bool(theta[count - 1] < STEEP * theta[first]):
            first += max(1, int((theta[first:] > APART * theta[first]).sum()))
            if first >= count:
                break
            below = v[:, first:]
            inner = below.mT @ a @ below
            own, turn = torch.linalg.eigh((inner + inner.mT) / 2)
            theta[first:], v[:, first:] = own.flip(-1), below @ turn.flip(-1)
    return found[0].reshape(values.shape), found[1].reshape(vectors.shape)
