"""Numerical faults: outliers, degenerate inputs, means far from zero, very many rows; against float64."""

import math
import sys
from pathlib import Path

import pytest
import torch

from eva_kernels import GramStatistic, SubspaceStatistic, refresh_

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from drift import BATCH, D, Q, drift, pool
from eva_kernels._rows import CHUNK_ROWS
from support.bounds import UNIT_ROUNDOFF, deviation, gamma, orthonormality, product_rounding

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


def assert_sound(statistic):
    assert statistic.basis.isfinite().all()
    assert statistic.eigenvalues.isfinite().all()
    assert (statistic.eigenvalues >= 0).all()
    assert deviation(statistic.basis).abs().max() <= orthonormality(*statistic.basis.shape)
    ratios = statistic.explained_variance_ratio()
    assert 0 <= float(ratios.sum()) <= 1 + gamma(len(ratios) + 1, torch.float64)


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
    rows, d = sum(map(len, batches)), len(exact)
    # The outlier has all of the variance but 10⁻⁸, so a scatter off by some share of it turns its direction by that.
    direction = torch.linalg.eigh(exact)[1][:, -1:]
    angle = product_rounding(impl, rows, d)
    assert abs(float(direction[:, 0] @ statistic.basis[:, 0].double())) >= 1 - angle**2 - orthonormality(32, 16)
    assert loss(statistic, exact, 1) <= angle**2 + orthonormality(32, 16)
    # What the next four directions capture once the outlier's is taken out of both.
    rest, own = exact - direction @ (direction.T @ exact), statistic.basis.double()[:, 1:5]
    basis = torch.linalg.qr(own - direction @ (direction.T @ own)).Q
    missed = float(1 - torch.trace(basis.T @ rest @ basis) / torch.linalg.eigvalsh(rest)[-4:].sum())
    assert missed <= 2 * plain + 2 * gamma(rows + d)  # float32's own rounding of sums of so many rows


@KINDS
@IMPLS
@pytest.mark.parametrize("value", [0.0, 1.0, -3e4, 1e-30, 1e15])
def test_constant_rows_have_no_variance(kind, impl, value):
    statistic = streamed(kind, [torch.full((50, 12), value)] * 4, 6, impl)
    assert_sound(statistic)
    from_the_shift = gamma(50 + 2) * abs(value)  # the mean of 50 equal rows, summed in float32
    assert float(statistic.total_scatter()) <= 200 * 12 * from_the_shift**2
    assert statistic.explained_variance_ratio().sum() <= 1 + gamma(6 + 1, torch.float64)


@KINDS
@IMPLS
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_rank_one_rows_have_one_direction(kind, impl, offset):
    generator = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(12, generator=generator), dim=0)
    batches = [torch.randn(50, 1, generator=generator) * direction + offset for _ in range(4)]
    statistic = streamed(kind, batches, 6, impl)
    assert_sound(statistic)
    values, vectors = torch.linalg.eigh(scatter(batches))  # of the rows as float32 has them
    assert (
        abs(float(vectors[:, -1] @ direction.double())) >= 1 - 12 * (UNIT_ROUNDOFF[torch.float32] * (offset + 4)) ** 2
    )
    rounding = product_rounding(impl, 200, 12)
    assert abs(float(vectors[:, -1] @ statistic.basis[:, 0].double())) >= 1 - rounding**2 - orthonormality(12, 6)
    ratio = float(values[-1] / values.sum())
    assert float(statistic.explained_variance_ratio()[0]) == pytest.approx(ratio, abs=2 * rounding)


@KINDS
@IMPLS
def test_rows_that_come_twice_count_twice(kind, impl):
    batches = gaussian(1)
    once, twice = streamed(kind, batches, 16, impl), streamed(kind, [b.repeat(2, 1) for b in batches], 16, impl)
    exact = scatter(batches)
    values, rounding = torch.linalg.eigvalsh(exact)[-4:].flip(0), gamma(2 * 3000 + 32)
    error, allowed = ((found - values).abs().max() for found in (twice.eigenvalues[:4] / 2, once.eigenvalues[:4]))
    assert error <= 2 * allowed + rounding * values[0]  # from other signs in the first sketch
    assert loss(twice, exact, 4) <= 2 * loss(once, exact, 4) + rounding
    same = streamed(kind, [batches[0][:1].repeat(64, 1)] * 3, 16, impl)
    assert_sound(same)


@KINDS
@IMPLS
@pytest.mark.parametrize("sigmas", [5, 100, 1e4])
def test_means_far_from_zero_cost_float32_rows_nothing(kind, impl, sigmas):
    """All d columns are kept, so that what is seen is arithmetic alone: twice that of rows about zero at most."""

    def errors(mean):
        batches = [batch + mean for batch in gaussian(2, rows=400, d=16, decay=0.7)]
        exact = scatter(batches)
        statistic = streamed(kind, batches, 16, impl)
        values = torch.linalg.eigvalsh(exact).flip(0)
        total = abs(float(statistic.total_scatter() / exact.trace()) - 1)
        return float((statistic.eigenvalues - values).abs().max() / values[0]), loss(statistic, exact, 4), total

    (values, missed, total), (values_about_zero, missed_about_zero, _) = errors(sigmas), errors(0)
    assert values <= 2 * values_about_zero + gamma(4000 + 16)
    assert missed <= 2 * missed_about_zero + gamma(4000 + 16)
    assert total <= 2 * gamma(CHUNK_ROWS * 16)  # chunks are summed in float32, and added up in float64


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
    assert result.total <= 4 * math.sqrt(CHUNK_ROWS * D) * 2**-24  # chunks are summed in float32, then in float64
    assert abs(result.loss) <= 2 * result.scatter


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_history_of_the_subspace_does_not_drift(impl):
    """From 10⁵ rows to 10⁶, through 55 more refreshes, the loss stays what it was, but for a rounding a refresh."""
    early, late = drift(SubspaceStatistic(D, Q, impl=impl), pool(), 10**6, [10**5, 10**6 - BATCH])
    assert late.loss <= 2 * early.loss + gamma(55)
    assert late.total <= 4 * math.sqrt(CHUNK_ROWS * D) * 2**-24
