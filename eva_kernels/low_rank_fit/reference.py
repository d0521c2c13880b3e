"""All directions at once, in float64."""

import torch
from torch import Tensor

from .._double import double
from .moment import SecondMoment


def dense_directions(
    matrices: Tensor,  # (b, m, n)
    moment: SecondMoment,
    rank: int,
) -> tuple[Tensor, Tensor]:  # (b, m, r), (b, r) float64
    """The leading eigenvectors and eigenvalues of M R Mᵀ, by a full eigendecomposition."""
    m, factor, rest = double(matrices), double(moment.factor), double(moment.rest)
    product = m @ factor
    outputs = product @ product.mT + (m * rest) @ m.mT
    values, vectors = torch.linalg.eigh(outputs)
    left = vectors[..., -rank:].flip(-1).to(matrices.device, matrices.dtype)
    return left, values[..., -rank:].flip(-1).clamp_min(0)
