"""Cholesky QR and its fallback in plain PyTorch."""

import torch
from torch import Tensor


def _unit_columns(y: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(y, dim=-2, keepdim=True)
    return y / norm.where(norm > 0, 1)


def cholesky_qr(
    y: Tensor,  # (b, d, q)
) -> tuple[Tensor, Tensor]:  # (b, d, q), (b,) largest |QᵀQ − I|
    """CholeskyQR2 on unit columns; a matrix it cannot handle comes back with a large or NaN error."""
    q = _unit_columns(y)
    eye = torch.eye(y.shape[-1], dtype=torch.float64, device=y.device)
    for _ in range(2):
        factor, info = torch.linalg.cholesky_ex((q.mT @ q).double(), upper=True)
        factor = torch.where((info == 0)[:, None, None], factor, eye)
        inverse = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=True)
        q = q @ inverse.to(q.dtype)
    error = (q.mT @ q - eye.to(q.dtype)).abs().flatten(1).amax(1) if y.shape[-1] else q.new_zeros(len(q))
    return q, error


def householder_qr(
    y: Tensor,  # (b, d, q)
) -> Tensor:  # (b, d, q)
    """Householder QR: orthonormal for any finite input, zero and repeated columns included."""
    return torch.linalg.qr(_unit_columns(y)).Q
