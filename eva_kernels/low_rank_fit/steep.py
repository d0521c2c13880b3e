"""Leading left singular vectors of M R, with R = F Fᵀ + t I that is large in few directions."""

import torch
from torch import Tensor

from .._double import double, like
from ..orthonormal import orthonormalize, orthonormalize_apart
from ..symmetric_eigen import leading_eigen

MAX_BLOCKS = 8  # beside M F
MISSING = 2e-7  # of a direction: what may lie outside of the space that is searched
NEAR = 0.03  # of the last value, to the next: with less, roundings of float32 turn one into the other
LEAST = 1e-4  # of MISSING, that is asked for where the two are all but equal


def steep_directions(
    matrices: Tensor,  # (b, m, n)
    rest: Tensor,  # () float64: t
    product: Tensor,  # (b, m, k): M F′, with R² = F′ F′ᵀ + t² I
    rank: int,
) -> tuple[Tensor, Tensor, Tensor] | None:  # (b, m, r), (b, r) float64, (b,) float64
    """The leading eigenvectors and eigenvalues, and the next eigenvalue, of M R² Mᵀ = Y Yᵀ + t² M Mᵀ, with Y = M F′.

    All of Y's columns are searched (Rayleigh and Ritz). A direction u with value θ that is found there is wrong by what
    leads out of the space, z = t² (I − S Sᵀ) M Mᵀ u, about ‖z‖ / θ. As long as that is too much, z of the directions
    concerned joins the space (Davidson 1975). What is then left after a last step u + z / θ, for which nothing needs to
    be solved again, is smaller once more by t² M Mᵀ outside of the space over θ, which is told by what joined last.

    In float64 less is allowed where the next value is ``NEAR``, in proportion.

    Products are in the matrices' own precision, which columns of a length of their own are exact to each, the small
    algebra is in float64.

    Returns:
        None where ``MAX_BLOCKS`` are not enough, or there is no room for another: t is no small part then.
    """
    space = orthonormalize(product)
    rows, seen = space.mT @ matrices, double(space).mT @ double(product)  # (b, c, n), (b, c, k)
    projected = seen @ seen.mT + rest.square() * double(rows @ rows.mT)
    outside = None  # (b,) float64: ‖M Mᵀ‖ there
    for _ in range(MAX_BLOCKS + 1):
        values, vectors = leading_eigen(projected, min(rank + 1, projected.shape[-1]))
        after = values[..., rank:].sum(-1)  # 0 where there is none
        values, best = values[..., :rank].clamp_min(0), like(vectors[..., :rank], space)
        told = values > space.shape[-1] * torch.finfo(torch.float64).eps * values[..., :1]  # from rounding
        share = torch.where(told, rest.square() / values.where(told, 1), 0)  # (b, r): t² / θ
        leading = (best.mT @ rows) @ matrices.mT  # (b, r, m)
        leading = leading - (leading @ space) @ space.mT
        missing = share * double(torch.linalg.vector_norm(leading, dim=-1))
        if outside is not None:
            missing = missing * share * outside[:, None]
        apart = ((values[..., -1:] - after[..., None]) / (NEAR * values[..., -1:])).nan_to_num(1.0).clamp(LEAST, 1)
        allowed = MISSING * (apart if space.dtype == torch.float64 else 1)  # float32 could not hold it
        wanted = (missing > allowed).any(0)
        count = int(wanted.sum())
        if not count:
            return orthonormalize(space @ best + (like(share, space)[..., None] * leading).mT), values, after
        if space.shape[-1] + count > min(matrices.shape[1:]):
            return None
        new = orthonormalize_apart(leading[:, wanted].mT, space)
        block = new.mT @ matrices
        space, rows = torch.cat([space, new], -1), torch.cat([rows, block], -2)
        # Y has nothing outside of its own columns.
        beside = double(block @ rows.mT)  # (b, count, c)
        outside = beside[..., -count:].abs().sum(-1).amax(-1)
        beside *= rest.square()
        projected = torch.cat([torch.cat([projected, beside[..., :-count].mT], -1), beside], -2)
    return None
