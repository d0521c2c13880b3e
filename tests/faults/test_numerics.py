"""Numerical faults: outliers, degenerate inputs, means far from zero, very many rows; against float64."""

import math
import sys
from pathlib import Path

import pytest
import torch

from eva_kernels import GramStatistic, SubspaceStatistic, refresh_

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from drift import BATCH, D, Q, drift, pool

KINDS = pytest.mark.parametrize("kind", [GramStatistic, SubspaceStatistic])
IMPLS = pytest.mark.parametrize("impl", ["auto", "reference"])


def streamed(kind, batches, columns, impl="auto"):
    statistic = kind(batches[0].shape[1], columns, impl=impl)
    for batch in batches:
        statistic.accumulate_(batch)
        assert all(result.finite for result in refresh_([statistic]))
    statistic.finish_()
    return statistic


def scatter(batches):
    rows = torch.cat([batch.double() for batch in batches])
    rows = rows - rows.mean(0)
    return rows.T @ rows


def loss(statistic, exact, rank):
    basis = statistic.basis.double()[:, :rank]
    return float(1 - torch.trace(basis.T @ exact @ basis) / torch.linalg.eigvalsh(exact)[-rank:].sum())


def assert_sound(statistic, allowance=2e-6):
    basis = statistic.basis.double()
    assert basis.isfinite().all()
    assert statistic.eigenvalues.isfinite().all()
    assert (statistic.eigenvalues >= 0).all()
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64), rtol=0, atol=allowance)
    assert 0 <= float(statistic.explained_variance_ratio().sum()) <= 1 + 1e-9


def gaussian(seed=0, count=10, rows=300, d=32, decay=0.8):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, d, generator=generator) * decay ** torch.arange(d) for _ in range(count)]


@KINDS
@IMPLS
def test_one_huge_column_costs_the_others_nothing(kind, impl):
    """The rest of the spectrum is found as well as without the outlier, whose variance is 10⁸ times theirs."""
    batches = gaussian()
    plain = loss(streamed(kind, batches, 16, impl), scatter(batches), 4)
    for batch in batches:
        batch[:, 31] = 1e4 * torch.randn(300, generator=torch.Generator().manual_seed(int(batch[0, 0] * 1e6) % 1000))
    exact = scatter(batches)
    statistic = streamed(kind, batches, 16, impl)
    assert_sound(statistic)
    assert abs(float(statistic.basis[31, 0])) == pytest.approx(1, abs=1e-4)
    assert loss(statistic, exact, 1) < 1e-6
    # What the next four directions capture once the outlier's is taken out of both.
    direction = torch.linalg.eigh(exact)[1][:, -1:]
    rest, own = exact - direction @ (direction.T @ exact), statistic.basis.double()[:, 1:5]
    basis = torch.linalg.qr(own - direction @ (direction.T @ own)).Q
    missed = float(1 - torch.trace(basis.T @ rest @ basis) / torch.linalg.eigvalsh(rest)[-4:].sum())
    assert missed < max(2 * plain, 1e-3)


@KINDS
@IMPLS
@pytest.mark.parametrize("value", [0.0, 1.0, -3e4, 1e-30, 1e15])
def test_constant_rows_have_no_variance(kind, impl, value):
    statistic = streamed(kind, [torch.full((50, 12), value)] * 4, 6, impl)
    assert_sound(statistic)
    assert float(statistic.total_scatter()) <= 1e-12 * max(value * value, 1) * 200 * 12
    assert statistic.explained_variance_ratio().sum() <= 1


@KINDS
@IMPLS
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_rank_one_rows_have_one_direction(kind, impl, offset):
    generator = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(12, generator=generator), dim=0)
    batches = [torch.randn(50, 1, generator=generator) * direction + offset for _ in range(4)]
    statistic = streamed(kind, batches, 6, impl)
    assert_sound(statistic)
    assert abs(float(statistic.basis[:, 0] @ direction)) == pytest.approx(1, abs=1e-5)
    rounding = 2 * 2**-9 if impl == "auto" else 1e-5  # the compiled kernel's rows are bfloat16, its totals are not
    assert float(statistic.explained_variance_ratio()[0]) == pytest.approx(1, abs=rounding)


@KINDS
@IMPLS
def test_rows_that_come_twice_count_twice(kind, impl):
    batches = gaussian(1)
    once, twice = streamed(kind, batches, 16, impl), streamed(kind, [b.repeat(2, 1) for b in batches], 16, impl)
    torch.testing.assert_close(twice.eigenvalues[:4], 2 * once.eigenvalues[:4], rtol=1e-4, atol=0)
    assert loss(twice, scatter(batches), 4) < 2 * max(loss(once, scatter(batches), 4), 1e-6)
    same = streamed(kind, [batches[0][:1].repeat(64, 1)] * 3, 16, impl)
    assert_sound(same)


@KINDS
@IMPLS
@pytest.mark.parametrize("sigmas", [5, 100, 1e4])
def test_means_far_from_zero_cost_float32_rows_nothing(kind, impl, sigmas):
    """All d columns are kept, so that what is seen is arithmetic alone."""
    batches = [batch + sigmas for batch in gaussian(2, rows=400, d=16, decay=0.7)]
    exact = scatter(batches)
    statistic = streamed(kind, batches, 16, impl)
    values = torch.linalg.eigvalsh(exact).flip(0)
    assert float((statistic.eigenvalues - values).abs().max() / values[0]) <= 1e-3
    assert abs(float(statistic.total_scatter() / exact.trace()) - 1) <= 1e-3
    assert loss(statistic, exact, 4) <= 1e-3


@KINDS
@IMPLS
@pytest.mark.parametrize("sigmas", [0, 5, 100, 1e4])
def test_bfloat16_rows_cost_at_most_twice_their_own_rounding(kind, impl, sigmas):
    """Against the rows before they were rounded; float64 arithmetic on the rounded rows is the measure."""
    true = [batch.double() + sigmas for batch in gaussian(3, rows=400, d=16, decay=0.7)]
    rounded = [batch.bfloat16() for batch in true]
    exact, own = scatter(true), scatter(rounded)
    statistic = streamed(kind, rounded, 16, impl)
    scale = torch.linalg.norm(exact)
    basis, values = statistic.basis.double(), statistic.eigenvalues
    found = basis @ torch.diag(values) @ basis.T
    assert float(torch.linalg.norm(found - exact) / scale) <= 2 * float(torch.linalg.norm(own - exact) / scale)


@pytest.mark.parametrize(
    ("rows", "number"), [(10**6, 10**6), pytest.param(10**8, 10**8, marks=pytest.mark.slow)], ids=["1e6", "1e8"]
)
def test_drift_over_many_rows_is_bounded(rows, number):
    """Each of n additions to the Gram rounds it by at most 2⁻²⁴; were they independent, by √n of that together.

    A matrix product may add row by row, so n is the number of rows. Four times that is allowed for.
    """
    (result,) = drift(GramStatistic(D, Q), pool(), rows, [number])
    assert result.scatter <= 4 * math.sqrt(result.rows) * 2**-24
    assert result.eigenvalues <= 4 * math.sqrt(result.rows) * 2**-24
    assert result.total <= 1e-6
    assert abs(result.loss) <= 1e-6


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_history_of_the_subspace_does_not_drift(impl):
    """From 10⁵ rows to 10⁶, through 230 more refreshes, the loss stays what it was."""
    early, late = drift(SubspaceStatistic(D, Q, impl=impl), pool(), 10**6, [10**5, 10**6 - BATCH])
    assert late.loss <= max(2 * early.loss, 1e-6)
    assert late.total <= 1e-6
