"""Block Lanczos iteration with restarts on M R Mᵀ, of which only products are made."""

import torch
from torch import Tensor

from .._double import double
from ..orthonormal import orthonormalize
from .moment import SecondMoment

DEPTH = 4  # blocks between two restarts
MAX_RESTARTS = 30
TOLERANCE = 1e-7  # of what is left of the total: what a restart must still gain
APART = 16  # roundings: no more is between columns that are orthonormal


def leading_directions(
    matrices: Tensor,  # (b, m, n)
    moment: SecondMoment,
    rank: int,
    width: int,
    total: Tensor,  # (b,) float64
    seed: int,
) -> tuple[Tensor, Tensor]:  # (b, m, r), (b, r) float64
    """The leading eigenvectors and eigenvalues of M R Mᵀ, from blocks of ``width`` columns.

    Between restarts the space grows by the product of its last block, orthonormalised against all before; a restart
    keeps the best ``width`` directions in it. It ends where a restart gains no more than ``TOLERANCE`` of what is left,
    or nothing but rounding.
    """

    def times(x: Tensor) -> Tensor:  # (b, m, c) -> (b, m, c)
        return matrices @ moment.times(matrices.mT @ x)

    generator = torch.Generator().manual_seed(seed)
    n, k = moment.factor.shape

    def noise(size: int) -> Tensor:
        drawn = torch.randn(size, width, generator=generator, dtype=torch.float32, device="cpu")
        return drawn.to(matrices.device, matrices.dtype)

    # The first block: M times noise of covariance R, so that strong inputs have their say from the start.
    rest = moment.rest.sqrt()
    start = moment.factor @ noise(k) + (rest[:, None] if rest.ndim else rest) * noise(n)
    space, total = orthonormalize(matrices @ start), double(total)
    energies = total.new_zeros(len(matrices), rank)
    for _ in range(MAX_RESTARTS):
        images = times(space)
        for _ in range(DEPTH - 1):
            block = _apart(images[..., -width:], space)
            space, images = torch.cat([space, block], -1), torch.cat([images, times(block)], -1)
        projected = double(space).mT @ double(images)
        values, vectors = torch.linalg.eigh((projected + projected.mT) / 2)
        space = orthonormalize(space @ vectors[..., -width:].flip(-1).to(space))
        gain, energies = -energies.sum(-1), values[..., -rank:].flip(-1).clamp_min(0)
        gain += energies.sum(-1)
        if bool((gain <= TOLERANCE * (total - energies.sum(-1)).clamp_min(0)).all()):
            break
    return space[..., :rank].contiguous(), energies


def _apart(block: Tensor, space: Tensor) -> Tensor:
    """Orthonormal columns that span a block's part outside of a space, and others outside of it where that is less."""
    for _ in range(2):  # the second time takes what the first one's rounding has left
        block = orthonormalize(block - space @ (space.mT @ block))
    if bool((double(space).mT @ double(block)).abs().max() <= APART * torch.finfo(block.dtype).eps):
        return block
    # The space holds all of the block but rounding: columns that were completed know nothing of it.
    return orthonormalize(torch.cat([space, block], -1))[..., space.shape[-1] :]
