"""Leading eigenvectors of M Mᵀ from a block Krylov space."""

import torch
from torch import Tensor

from .._double import double
from ..orthonormal import orthonormalize

DEPTH = 6  # blocks: README.md


def leading_vectors(
    matrices: Tensor,  # (b, m, n), m ≤ n
    rank: int,
    width: int,
    seed: int,
) -> tuple[Tensor, Tensor]:  # (b, m, r), (b, r) float64
    """The leading left singular vectors and values, from ``DEPTH`` blocks of ``width`` columns: the powers of M Mᵀ on
    noise, each made orthonormal before the next, all of which together are searched (Rayleigh and Ritz).

    M Mᵀ is formed where that costs less than the products with M that it spares.
    """
    m = matrices.shape[1]
    square = matrices @ matrices.mT if m < 4 * DEPTH * width else None

    def times(x: Tensor) -> Tensor:  # (b, m, c) -> (b, m, c)
        return square @ x if square is not None else matrices @ (matrices.mT @ x)

    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(m, width, generator=generator, dtype=torch.float32, device="cpu").to(matrices)
    blocks = [torch.linalg.qr(times(noise.expand(len(matrices), -1, -1))).Q]
    for _ in range(min(DEPTH, m // width) - 1):
        blocks.append(torch.linalg.qr(times(blocks[-1])).Q)
    space = torch.linalg.qr(torch.cat(blocks, -1)).Q
    projected = double(space).mT @ double(times(space))
    values, vectors = torch.linalg.eigh((projected + projected.mT) / 2)
    best = vectors[..., -rank:].flip(-1).to(space.device, space.dtype)
    return orthonormalize(space @ best), values[..., -rank:].flip(-1).clamp_min(0).sqrt()
