"""Orthonormal bases of well and badly conditioned columns."""

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

import eva_kernels.orthonormal
from eva_kernels import orthonormalize
from eva_kernels.orthonormal import orthonormalize_or
from eva_kernels.orthonormal.core import core_runs, orthonormalize_core
from support.bounds import UNIT_ROUNDOFF, deviation, gamma, orthonormality


@pytest.fixture(params=["as it comes", "in PyTorch"])
def either_way(request, monkeypatch):
    """Compiled code where there is some, and PyTorch everywhere."""
    if request.param == "in PyTorch":
        monkeypatch.setattr(eva_kernels.orthonormal, "core_runs", lambda y: False)


def assert_orthonormal(q):
    assert deviation(q).abs().max() <= orthonormality(*q.shape[-2:], q.dtype)


def assert_same_span(q, y):
    """Unit columns of ``y`` are met by rounding of Q's entries, and of the float64 algebra times their condition."""
    unit = (y / y.norm(dim=0)).double().numpy()
    columns = y.shape[1]
    algebra = gamma(4 * (len(y) + columns), torch.float64) * columns / np.linalg.svd(unit, compute_uv=False)[-1]
    bound = columns**0.5 * UNIT_ROUNDOFF[q.dtype] + algebra
    assert np.max(subspace_angles(unit, q.double().numpy())) <= bound


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (3, 40, 8), (2, 2, 17, 1), (200, 96), (3000, 80)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_columns_are_orthonormal_and_span_the_same(shape, dtype):
    y = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    q = orthonormalize(y)
    assert (q.dtype, q.shape) == (y.dtype, y.shape)
    assert_orthonormal(q)
    first = slice(0, max(shape[-1] // 2, 1))
    for a, b in zip(y.reshape(-1, *shape[-2:]), q.reshape(-1, *shape[-2:]), strict=True):
        assert_same_span(b[:, first], a[:, first])


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize(
    "spoil",
    [
        lambda y: y * torch.logspace(-15, 15, y.shape[1], dtype=y.dtype),
        lambda y: torch.cat([y[:, :-1], y[:, :1]], 1),
        lambda y: torch.cat([y[:, :-2], torch.zeros_like(y[:, :2])], 1),
        lambda y: torch.zeros_like(y),
        lambda y: y[:, :1] + 1e-3 * y,
        lambda y: y[:, :1] + 1e-7 * y,
        lambda y: y[:, :1].expand_as(y),
        lambda y: 1e38 * y / y.abs().max(),
        lambda y: 1e-38 * y,
    ],
    ids=["scales", "repeated", "zero columns", "all zero", "close", "nearly parallel", "one direction", "huge", "tiny"],
)
def test_any_finite_matrix_gives_orthonormal_columns(spoil):
    y = torch.randn(60, 12, generator=torch.Generator().manual_seed(1))
    q = orthonormalize(torch.stack([spoil(y), y]))
    assert_orthonormal(q)
    assert torch.equal(q[1], orthonormalize(y))  # a bad matrix in the batch does not touch its neighbours
    assert orthonormalize(spoil(y)).is_contiguous()  # rows are multiplied with it, and would wait for a copy


@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (40, 7), (200, 96), (130, 17)])
def test_compiled_columns_are_those_of_pytorch_to_a_rounding(shape, monkeypatch, algebra_form):
    y = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, shape[-1])
    assert core_runs(y)
    ours = orthonormalize_core(y)
    monkeypatch.setattr(eva_kernels.orthonormal, "core_runs", lambda y: False)
    theirs = orthonormalize(y)
    assert torch.equal(orthonormalize_core(y.T.contiguous().T), ours)  # read as it lies, not copied
    assert torch.equal(orthonormalize_core(spread(y)), ours)
    condition = np.linalg.cond((y / y.norm(dim=0)).double().numpy())
    algebra = gamma(4 * sum(shape), torch.float64) * shape[1] * condition
    assert (ours - theirs).abs().max() <= 2 * UNIT_ROUNDOFF[torch.float32] + algebra


def spread(y):
    """The same matrix in every other column of another."""
    return torch.stack([y, torch.full_like(y, torch.nan)], -1)[..., 0]


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("shape", [(1, 1), (9, 9), (40, 7), (300, 130), (130, 17)])
def test_threads_change_no_bit(shape, threads, algebra_form):
    y = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    before, outcomes = torch.get_num_threads(), []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            outcomes.append(orthonormalize_core(y))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*outcomes)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_replaced_by_the_other(poison):
    y, other = torch.randn(2, 60, 12, generator=torch.Generator().manual_seed(3))
    y[59, 11] = poison
    assert torch.equal(orthonormalize_or(y, other), orthonormalize(other))
    assert torch.equal(orthonormalize_or(other.T.contiguous().T, y), orthonormalize(other))


def test_wide_matrices_are_refused():
    with pytest.raises(ValueError, match=r"^y: expected shape \(\.\.\., d, q\) with d ≥ q, got \(3, 4\)"):
        orthonormalize(torch.ones(3, 4))
