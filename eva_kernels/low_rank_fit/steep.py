"""Leading left singular vectors of M R, with R = F Fᵀ + t I that is large in few directions."""

import torch
from torch import Tensor

from .._double import double, like
from ..orthonormal import APART, orthonormalize, orthonormalize_apart
from ..symmetric_eigen import symmetric_eigen
from .moment import SecondMoment

BLOCKS = 2  # at least, beside M F
MAX_BLOCKS = 8
MISSING = 1e-7  # of a direction: what the next block must still promise to bring


def principal_axes(moment: SecondMoment) -> tuple[Tensor, Tensor]:  # (n, k), (k,) float64
    """F in orthogonal columns, F Fᵀ as it was, and their squared lengths, descending."""
    factor = double(moment.factor)
    squares, axes = torch.linalg.eigh(factor.mT @ factor)
    return like(factor @ axes.flip(-1), moment.factor), squares.flip(-1).clamp_min(0)


def steep_directions(
    matrices: Tensor,  # (b, m, n)
    rest: Tensor,  # () float64: t
    product: Tensor,  # (b, m, k): M F′, with R² = F′ F′ᵀ + t² I
    rank: int,
) -> tuple[Tensor, Tensor] | None:  # (b, m, r), (b, r) float64
    """The leading eigenvectors and eigenvalues of M R² Mᵀ = Y Yᵀ + t² M Mᵀ, with Y = M F′.

    All of Y's columns are searched (Rayleigh and Ritz), and with them what of t² M Mᵀ leads out of them from the
    directions that are wanted: a block of M Mᵀ times those, then of M Mᵀ times that block, and so on, a Krylov space of
    the small part alone. What is wanted has coefficients on the last block that are smaller than those on the block
    before by some factor, by which the next one's are smaller again or more: it ends where they would be less than
    ``MISSING``.

    Products are in the matrices' own precision, which columns of a length of their own are exact to each, the small
    algebra is in float64.

    Returns:
        None where ``MAX_BLOCKS`` are not enough, or there is no room for another: t is no small part then.
    """
    space = orthonormalize(product)
    rows, seen = space.mT @ matrices, double(space).mT @ double(product)  # (b, c, n), (b, c, k)

    def solved() -> tuple[Tensor, Tensor]:
        y = seen
        projected = y @ y.mT + rest.square() * double(rows @ rows.mT)
        return symmetric_eigen((projected + projected.mT) / 2)

    block = like(solved()[1][..., :rank], space).mT @ rows  # (b, r, n), the next one's image under Mᵀ
    for count in range(1, MAX_BLOCKS + 1):
        if space.shape[-1] + rank > min(matrices.shape[1:]):
            return None
        new = orthonormalize_apart((block @ matrices.mT).mT, space)
        block = new.mT @ matrices
        space, rows = torch.cat([space, new], -1), torch.cat([rows, block], -2)
        seen = torch.cat([seen, double(new).mT @ double(product)], -2)
        if count < BLOCKS:
            continue
        values, vectors = solved()
        last, before = (
            torch.linalg.matrix_norm(vectors[..., end - rank : end, :rank])
            for end in (space.shape[-1], space.shape[-1] - rank)
        )
        if bool((last.square() <= MISSING * before.clamp_min(APART * torch.finfo(space.dtype).eps)).all()):
            return orthonormalize(space @ like(vectors[..., :rank], space)), values[..., :rank].clamp_min(0)
    return None
