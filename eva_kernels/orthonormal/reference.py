"""Cholesky QR and its fallback in plain PyTorch."""

import torch
from torch import Tensor

NEARLY_ORTHOGONAL = 0.1  # |cosine| between columns up to which one pass leaves only rounding


def cholesky_qr(
    y: Tensor,  # (b, d, q)
) -> tuple[Tensor, Tensor]:  # (b, d, q), (b,) bool
    """One pass of Cholesky QR, and whether it was enough: the columns were nearly orthogonal before it.

    Columns are scaled to unit norm inside the q × q matrix, not in the data. A matrix whose Cholesky
    factorisation fails comes back as it was.
    """
    gram = (y.mT @ y).double()
    norms = gram.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(norms > 0, norms.where(norms > 0, 1).rsqrt(), 1)
    gram = scale[:, :, None] * gram * scale[:, None, :]
    eye = torch.eye(y.shape[-1], dtype=torch.float64, device=y.device)
    enough = ((gram - eye).abs() <= NEARLY_ORTHOGONAL).flatten(1).all(1)  # NaN is not enough
    factor, info = torch.linalg.cholesky_ex(gram, upper=True)
    factor = torch.where((info == 0)[:, None, None], factor, eye)
    inverse = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=True)
    return y @ (scale[:, :, None] * inverse).to(y.dtype), enough


def householder_qr(
    y: Tensor,  # (b, d, q)
) -> Tensor:  # (b, d, q)
    """Householder QR: orthonormal for any finite input, zero and repeated columns included."""
    norm = torch.linalg.vector_norm(y, dim=-2, keepdim=True)
    return torch.linalg.qr(y / norm.where(norm > 0, 1)).Q
