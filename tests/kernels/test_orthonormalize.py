"""Orthonormal bases of well and badly conditioned columns."""

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

from eva_kernels import orthonormalize


def assert_orthonormal(q, tolerance):
    eye = torch.eye(q.shape[-1], dtype=q.dtype)
    assert (q.mT @ q - eye).abs().max() <= tolerance


@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (3, 40, 8), (2, 2, 17, 1), (200, 96)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_columns_are_orthonormal_and_span_the_same(shape, dtype, tolerance):
    y = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    q = orthonormalize(y)
    assert_orthonormal(q, 10 * tolerance)
    first = slice(0, max(shape[-1] // 2, 1))
    for a, b in zip(y.reshape(-1, *shape[-2:]), q.reshape(-1, *shape[-2:]), strict=True):
        assert np.max(subspace_angles(a[:, first].double().numpy(), b[:, first].double().numpy())) <= 1e3 * tolerance


@pytest.mark.parametrize(
    "spoil",
    [
        lambda y: y * torch.logspace(-15, 15, y.shape[1]),
        lambda y: torch.cat([y[:, :-1], y[:, :1]], 1),
        lambda y: torch.cat([y[:, :-2], torch.zeros_like(y[:, :2])], 1),
        lambda y: torch.zeros_like(y),
        lambda y: y[:, :1] + 1e-7 * y,
        lambda y: y[:, :1].expand_as(y),
    ],
    ids=["scales", "repeated", "zero columns", "all zero", "nearly parallel", "one direction"],
)
def test_any_finite_matrix_gives_orthonormal_columns(spoil):
    y = torch.randn(60, 12, generator=torch.Generator().manual_seed(1))
    q = orthonormalize(torch.stack([spoil(y), y]))
    assert_orthonormal(q, 1e-5)
    assert torch.equal(q[1], orthonormalize(y))  # a bad matrix in the batch does not touch its neighbours


def test_wide_matrices_are_refused():
    with pytest.raises(ValueError, match=r"^y: expected shape \(\.\.\., d, q\) with d ≥ q, got \(3, 4\)"):
        orthonormalize(torch.ones(3, 4))
