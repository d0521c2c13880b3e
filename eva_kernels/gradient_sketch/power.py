"""Subspace iteration of a matrix whose products with few columns are known, one a pass: bases, and what they tell."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._double import double, like
from ..orthonormal import orthonormalize

BASIS_DTYPE = torch.bfloat16  # what a basis is rounded to: the products are those of what it became


class LowRank(NamedTuple):
    """U S Vᵀ.

    Attributes:
        left: U, (b, r): orthonormal columns, in the product's dtype.
        values: S, (r,) float64, descending.
        right: V, (a, r): orthonormal columns, in the product's dtype.
    """

    left: Tensor
    values: Tensor
    right: Tensor


def random_basis(
    features: int,
    columns: int,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:  # (features, columns) bfloat16
    """Noise, drawn from a generator of its own: the same for every ``features`` and ``columns``, on any device."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(features, columns, generator=generator, dtype=torch.float32, device="cpu")
    return noise.to(device, BASIS_DTYPE)


def range_basis(
    product: Tensor,  # (a, q) float32 or float64, a ≥ q
) -> Tensor:  # (a, q) bfloat16
    """A basis, to a rounding, of what the columns of a product span: what G or its transpose is multiplied with next.

    Raises:
        ValueError: fewer rows than columns.
    """
    return orthonormalize(product).to(BASIS_DTYPE)


def leading_part(
    basis: Tensor,  # (a, q) any float dtype, of full rank
    product: Tensor,  # (b, q) float32 or float64: M basis
    rank: int,
) -> LowRank:
    """The leading singular vectors of M P, where P projects on what ``basis`` spans: all that M basis tells of M.

    M is (b, a). Of Gᵀ basis these are the vectors of G, the two sides exchanged. The algebra is float64, with two
    decompositions of q columns; that a basis was rounded costs nothing, as it is made orthonormal here.

    Raises:
        ValueError: a rank out of range, or widths that do not fit.
    """
    if basis.ndim != 2 or product.ndim != 2 or basis.shape[1] != product.shape[1]:
        raise ValueError(f"product: expected {basis.shape[-1]} columns, as basis has, got {tuple(product.shape)}")
    if not 1 <= rank <= min(*basis.shape, len(product)):
        raise ValueError(f"rank: expected 1 to {min(*basis.shape, len(product))}, got {rank}")
    q, r = torch.linalg.qr(double(basis))
    known = torch.linalg.solve_triangular(r, double(product), upper=True, left=False)  # M q
    u, s, vt = torch.linalg.svd(known, full_matrices=False)
    left, right = u[:, :rank], q @ vt[:rank].mT
    return LowRank(like(left, product), s[:rank], like(right, product))
