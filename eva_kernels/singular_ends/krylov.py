"""Leading eigenvectors of M Mᵀ from a block Krylov space."""

import torch
from torch import Tensor

from .._double import double, home_of
from ..orthonormal import orthonormalize, orthonormalize_apart

DEPTH = 6  # blocks at least: README.md
GAIN = 3e-4  # of the leading energy: more from the last block, and another one follows
PIECES = 4  # of a matrix's rows: products of each with those before it are 5/8 of all


def leading_vectors(
    matrices: Tensor,  # (b, m, n), m ≤ n
    rank: int,
    width: int,
    seed: int,
) -> tuple[Tensor, Tensor]:  # (b, m, r), (b, r) float64
    """The leading left singular vectors and values, from blocks of ``width`` columns: M Mᵀ times the block before, made
    orthogonal to all before and orthonormal (block Lanczos), all of which together are searched (Rayleigh and Ritz).

    There are ``DEPTH`` of them, and more as long as what is found has more than ``GAIN`` of its energy in the last one:
    that is no less than the last one brought, and what is still missing is less by about the factor that each block
    takes off. M Mᵀ is formed where that costs less than the products with M that it spares. All of it is in the
    matrices' own precision: neighbouring directions that its rounding turns into each other hold the same energy.
    """
    m, n = matrices.shape[1:]
    columns = (DEPTH + 1) * width  # that are multiplied with M Mᵀ: the noise, and each block
    share = (PIECES + 1) / (2 * PIECES)
    square = _square(matrices) if share * m * n + m * columns < 2 * n * columns else None

    def times(x: Tensor) -> Tensor:  # (b, m, c) -> (b, m, c)
        return square @ x if square is not None else matrices @ (matrices.mT @ x)

    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(m, width, generator=generator, dtype=torch.float32, device="cpu").to(matrices)
    block = times(noise.expand(len(matrices), -1, -1))
    space = images = matrices.new_empty(len(matrices), m, 0)
    while True:
        block = orthonormalize_apart(block, space)
        space, images = torch.cat([space, block], -1), torch.cat([images, times(block)], -1)
        block = images[..., -width:]
        full = space.shape[-1] + width > m
        if space.shape[-1] < DEPTH * width and not full:
            continue
        projected = (space.mT @ images).to(home_of(space.device))  # where there is an eigensolver, too
        values, vectors = torch.linalg.eigh((projected + projected.mT) / 2)
        energy = values[..., -rank:]
        gained = (energy * vectors[..., -width:, -rank:].square().sum(-2)).sum(-1)
        if full or bool((gained <= GAIN * energy.sum(-1)).all()):
            break
    best = vectors[..., -rank:].flip(-1).to(space)
    return orthonormalize(space @ best), double(values[..., -rank:].flip(-1).clamp_min(0)).sqrt()


def _square(matrices: Tensor) -> Tensor:  # (b, m, n) -> (b, m, m)
    """M Mᵀ, of whose two equal halves one is computed."""
    m = matrices.shape[1]
    product = matrices.new_empty(len(matrices), m, m)
    for i in range(PIECES):
        start, end = m * i // PIECES, m * (i + 1) // PIECES
        product[:, start:end, :end] = matrices[:, start:end] @ matrices[:, :end].mT
        product[:, :start, start:end] = product[:, start:end, :start].mT
    return product
