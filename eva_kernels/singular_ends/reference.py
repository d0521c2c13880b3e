"""All directions at once, in float64."""

import torch
from torch import Tensor

from .._double import double


def dense_vectors(
    matrices: Tensor,  # (b, m, n)
    rank: int,
    *,
    leading: bool,
) -> tuple[Tensor, Tensor]:  # (b, m, r), (b, r) float64
    """The left singular vectors and values at one end, by a full singular value decomposition."""
    u, s, _ = torch.linalg.svd(double(matrices), full_matrices=False)
    if not leading:
        u, s = u.flip(-1), s.flip(-1)
    return u[..., :rank].to(matrices.device, matrices.dtype).contiguous(), s[..., :rank]
