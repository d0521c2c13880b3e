"""Leading eigenvectors of M Mᵀ from a block Krylov space."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..gram import gram_accumulate_
from ..orthonormal import orthonormalize
from ..symmetric_eigen import leading_eigen

DEPTH = 7  # blocks at least: README.md
LOST = 1e-5  # of the leading energy: more that may be missing, and blocks go on
TURNED = 2e-3  # 1 − cosine² of the subspace, and the same
GAP = 0.02  # of the last value's energy, to the next one: with less, no subspace is the answer
TOLD = {torch.float32: 1e-6, torch.float64: 1e-12}  # of the first value: M Mᵀ's own rounding hides smaller ones
STRAYED = 1e-3  # from orthonormal: vectors of a space that is not one
STEEP = 25.0  # mean squares of entries: with less energy in a value, rounding entries to bfloat16 is felt
SHARE = 0.25  # of M Mᵀ's operations in float32: what half of them take in bfloat16


def leading_vectors(
    matrices: Tensor,  # (b, m, n), m ≤ n
    rank: int,
    width: int,
    seed: int,
    *,
    rounds: bool = True,
) -> Tensor | None:  # (b, m, r)
    """The leading left singular vectors, from blocks of ``width`` columns: M Mᵀ times the block before, made
    orthogonal to all before and orthonormal (block Lanczos), all of which together are searched (Rayleigh and Ritz).

    There are ``DEPTH`` of them, and more as long as what is missing may be more than ``LOST`` of the energy, or turn
    the subspace by more than ``TURNED``. The last block brought no more than vectors lose without their part in it, and
    each takes off the same factor or more: what is missing is the rest of that series at most. How many blocks it asks
    for is reckoned from it, so that vectors are sought two or three times.

    M Mᵀ is formed where that costs less than the products with M that it spares; of a float32 matrix on a CPU its
    entries are rounded to bfloat16, unless singular values fall so far that it would be felt (``STEEP``). Blocks
    are rows in memory: few rows times a matrix cost less than a matrix times few columns.

    Args:
        rounds: Whether entries may be rounded.

    Returns:
        Columns that are orthonormal but for rounding. None where blocks could not be kept orthogonal, as of matrices
        of fewer directions than are asked for; where the last value is so small beside the first that M Mᵀ tells little
        of it; or where another block that is asked for has no room.
    """
    b, m, n = matrices.shape
    rounds = rounds and matrices.dtype == torch.float32 and matrices.device.type == "cpu"
    columns = (DEPTH + 3) * width  # that are multiplied with M Mᵀ, about
    forms = (SHARE if rounds else 1) * m * n + m * columns < 2 * n * columns
    square = None if not forms else _rounded_square(matrices) if rounds else torch.bmm(matrices, matrices.mT)

    def times(x: Tensor) -> Tensor:  # (b, c, m) -> (b, c, m): of each row
        return torch.bmm(x, square) if square is not None else torch.bmm(torch.bmm(x, matrices), matrices.mT)

    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(width, m, generator=generator, dtype=torch.float32, device="cpu").to(matrices)
    block = times(noise.expand(b, -1, -1))
    space = matrices.new_empty(b, min(m, 3 * DEPTH * width), m)
    size, sought, images = 0, DEPTH * width, []
    while True:
        if size:
            before = space[:, :size]
            block = torch.baddbmm(block, torch.bmm(block, before.mT), before, alpha=-1)
        if size + width > space.shape[1]:
            space = torch.cat([space, torch.empty_like(space)], 1)
        own = space[:, size : size + width]
        own.copy_(orthonormalize(block.mT).mT)
        recent = space[:, max(0, size - width) : size + width]  # of earlier ones the next block has rounding alone
        block, size = times(own), size + width
        images.append(torch.bmm(block, recent.mT))
        if size >= sought or size + width > m:
            projected = _assembled(images)
            values, vectors = leading_eigen(projected, rank + 1)
            blocks = _blocks_to_come(projected, values, vectors, rank, width)
            if not blocks or size == m:
                break
            if size + width > m:
                return None
            sought = size + width * blocks
        block = torch.baddbmm(block, images[-1], recent, alpha=-1)
    if bool((values[:, rank - 1] < TOLD[matrices.dtype] * values[:, 0]).any()):
        return None
    if square is not None and rounds:
        mean = square.diagonal(dim1=-2, dim2=-1).sum(-1) / (m * n)
        if bool((values[..., rank - 1] < STEEP * mean).any()):
            return leading_vectors(matrices, rank, width, seed, rounds=False)
    found = vectors[..., :rank].mT @ space[:, :size]
    strayed = found @ found.mT - torch.eye(rank, dtype=found.dtype, device=found.device)
    if not bool((strayed.abs() <= STRAYED).all()):
        return None
    return found.mT


def _blocks_to_come(
    projected: Tensor,  # (b, q, q): M Mᵀ in the space
    values: Tensor,  # (b, r + 1) descending
    vectors: Tensor,  # (b, q, r + 1)
    rank: int,
    width: int,
) -> int:
    """How many more blocks are asked for, by what vectors have in the last two: 0 where nothing is."""
    top, both = values[:, :rank], vectors[:, -2 * width :, :rank]
    last, own = both[:, width:], projected[:, -width:, -width:]
    held = (both.square() @ top[..., None]).view(-1, 2, width).sum(-1)
    kept = (last * (own @ last)).sum((1, 2))
    seen = torch.cat([values, held, kept[:, None]], 1)
    most = 0
    for *others, least, after, before, now, stays in seen.tolist():
        energy, gap = least + sum(others), least - after
        allowed = LOST * energy if gap <= GAP * least else min(LOST * energy, TURNED * gap)
        factor = min(now / before, 0.9) if before > 0 else 0.0
        missing = (now - stays) * factor / (1 - factor)
        if missing > allowed:
            most = max(most, 1, round(math.log(allowed / missing) / math.log(factor)))
    return most


def _assembled(images: Sequence[Tensor]) -> Tensor:  # (b, c, c), (b, c, 2 c), … -> (b, q, q)
    """M Mᵀ in a space, of which each block's image has parts in itself and the block before: the lower triangle, which
    is all that is read."""
    width, size = images[0].shape[1], images[0].shape[1] * len(images)
    whole = images[0].new_zeros(len(images[0]), size, size)
    for i, image in enumerate(images):
        whole[:, i * width : (i + 1) * width, max(0, i - 1) * width : (i + 1) * width] = image
    return whole


def _rounded_square(matrices: Tensor) -> Tensor:  # (b, m, n) float32 -> (b, m, m)
    """M Mᵀ of entries in bfloat16."""
    b, m, _ = matrices.shape
    squares, shift = matrices.new_zeros(b, m, m), matrices.new_zeros(m)
    totals = torch.zeros(m, dtype=torch.float64, device="cpu"), torch.zeros((), dtype=torch.float64, device="cpu")
    for square, matrix in zip(squares, matrices, strict=True):
        gram_accumulate_(square, *totals, matrix.bfloat16().mT.contiguous(), shift)
    return squares
