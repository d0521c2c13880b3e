"""Leading eigenvectors of M Mᵀ from a block Krylov space."""

import torch
from torch import Tensor

from .._double import double, home_of
from ..orthonormal import orthonormalize

DEPTH = 6  # blocks at least: README.md
GAIN = 3e-4  # of the leading energy: more from the last block, and another one follows
PIECES = 4  # of a matrix's rows: products of each with those before it are 5/8 of all


def leading_vectors(
    matrices: Tensor,  # (b, m, n), m ≤ n
    rank: int,
    width: int,
    seed: int,
) -> tuple[Tensor, Tensor]:  # (b, m, r), (b, r) float64
    """The leading left singular vectors and values, from blocks of ``width`` columns: the powers of M Mᵀ on noise, each
    made orthonormal before the next, all of which together are searched (Rayleigh and Ritz).

    There are ``DEPTH`` of them, and more as long as the last has brought more than ``GAIN``: what is still missing is
    less than what the last one brought, by about the factor that each block takes off. M Mᵀ is formed where that costs
    less than the products with M that it spares. All of it is in the matrices' own precision: neighbouring directions
    that its rounding turns into each other hold the same energy.
    """
    m, n = matrices.shape[1:]
    columns = 2 * DEPTH * width  # that are multiplied with M Mᵀ: each block, and all of them at the end
    share = (PIECES + 1) / (2 * PIECES)
    square = _square(matrices) if share * m * n + m * columns < 2 * n * columns else None

    def times(x: Tensor) -> Tensor:  # (b, m, c) -> (b, m, c)
        return square @ x if square is not None else matrices @ (matrices.mT @ x)

    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(m, width, generator=generator, dtype=torch.float32, device="cpu").to(matrices)
    most = m // width
    blocks = [torch.linalg.qr(times(noise.expand(len(matrices), -1, -1))).Q]
    for _ in range(min(DEPTH, most) - 1):
        blocks.append(torch.linalg.qr(times(blocks[-1])).Q)
    space = torch.linalg.qr(torch.cat(blocks, -1)).Q
    images = times(space)
    before: Tensor | None = None
    while True:
        projected = (space.mT @ images).to(home_of(space.device))  # where there is an eigensolver, too
        projected = (projected + projected.mT) / 2
        if before is None:
            before = torch.linalg.eigvalsh(projected[..., :-width, :-width])[..., -rank:].sum(-1)
        values, vectors = torch.linalg.eigh(projected)
        energy = values[..., -rank:].sum(-1)
        if space.shape[-1] + width > m or bool((energy - before <= GAIN * energy).all()):
            break
        block = images[..., -width:]
        for _ in range(2):  # the second time takes what the first one's rounding has left
            block = block - space @ (space.mT @ block)
        block = torch.linalg.qr(block).Q
        space, images = torch.cat([space, block], -1), torch.cat([images, times(block)], -1)
        before = energy
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
