"""Block Lanczos iteration with restarts on M R Mᵀ, of which only products are made."""

import torch
from torch import Tensor

from .._double import double
from ..orthonormal import orthonormalize, orthonormalize_apart
from ..symmetric_eigen import symmetric_eigen
from .moment import SecondMoment

DEPTH = 4  # blocks between two restarts
MAX_RESTARTS = 30
TOLERANCE = 1e-7  # of what is left of the total: what a restart must still promise to gain


def leading_directions(
    matrices: Tensor,  # (b, m, n)
    moment: SecondMoment,
    rank: int,
    width: int,
    product: Tensor,  # (b, m, k): M F
    total: Tensor,  # (b,) float64
    seed: int,
) -> tuple[Tensor, Tensor]:  # (b, m, r), (b, r) float64
    """The leading eigenvectors and eigenvalues of M R Mᵀ, from blocks of ``width`` columns.

    The first block is that of the leading eigenvectors of M F Fᵀ Mᵀ, which is most of it; where F is too narrow for
    that, M times noise of covariance R. From there on two blocks fewer do.

    Between restarts the space grows by the product of its last block, orthonormalised against all before; a restart
    keeps the best ``width`` directions in it. It ends where a restart gains no more than ``TOLERANCE`` of what is left,
    or where residuals say that the next one would not: what directions x with values θ miss is about Σ ‖A x − θ x‖²
    over the gap to those that are not kept (Parlett 1998, The Symmetric Eigenvalue Problem, theorem 11.7.1).
    """

    def times(x: Tensor) -> Tensor:  # (b, m, c) -> (b, m, c)
        return (moment.times((x.mT @ matrices).mT).mT @ matrices.mT).mT  # few long rows: faster than few columns

    if product.shape[-1] >= width:
        # A start: in the matrix's own dtype, of which nothing is left in the result, and scaled so that squares fit it.
        scaled = product / total.sqrt().clamp_min(torch.finfo(product.dtype).tiny).to(product)[:, None, None]
        start = scaled @ symmetric_eigen(double(scaled.mT @ scaled))[1][..., :width].to(scaled)
    else:
        start = matrices @ _noise(moment, width, seed)
    space, total = orthonormalize(start), double(total)
    energies = total.new_zeros(len(matrices), rank)
    for _ in range(MAX_RESTARTS):
        grown, images = (space.new_empty(*space.shape[:2], DEPTH * width) for _ in range(2))
        grown[..., :width], images[..., :width] = space, times(space)
        for end in range(width, DEPTH * width, width):
            block = orthonormalize_apart(images[..., end - width : end], grown[..., :end])
            grown[..., end : end + width], images[..., end : end + width] = block, times(block)
        projected = double(grown).mT @ double(images)
        values, vectors = symmetric_eigen((projected + projected.mT) / 2)
        best = vectors[..., :width].to(space)
        before, energies = energies.sum(-1), values[..., :rank].clamp_min(0)
        kept = grown @ best
        residuals = double(images @ best[..., :rank] - kept[..., :rank] * values[:, None, :rank].to(space))
        gap = (values[:, rank - 1] - values[:, width]).clamp_min(torch.finfo(torch.float64).tiny)
        missing = torch.minimum(energies.sum(-1) - before, residuals.square().sum((-2, -1)) / gap)
        space = orthonormalize(kept)
        if bool((missing <= TOLERANCE * (total - energies.sum(-1)).clamp_min(0)).all()):
            break
    return space[..., :rank].contiguous(), energies


def _noise(moment: SecondMoment, count: int, seed: int) -> Tensor:  # (n, count)
    """Columns of covariance R."""
    factor, rest = moment.factor, moment.rest.sqrt()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(sum(factor.shape), count, generator=generator, dtype=torch.float32, device="cpu").to(factor)
    n = len(factor)
    return factor @ drawn[n:] + (rest[:, None] if rest.ndim else rest) * drawn[:n]
