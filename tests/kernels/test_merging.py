"""Two statistics of different rows become one of all rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eva_kernels import GramStatistic, SubspaceStatistic, refresh_
from eva_kernels._rows import CHUNK_ROWS
from support.bounds import gamma, orthonormality
from support.streams import EXACTLY, KINDS, loss, run, scatter, stream


def assert_total(statistic, batches):
    """Chunks are summed in float32, about a shift, and added up in float64."""
    about = sum((batch.double() - statistic.shift.double()).square().sum() for batch in batches)
    allowed = 2 * gamma(CHUNK_ROWS * len(statistic.shift)) * float(about)
    assert float(statistic.total_scatter()) == pytest.approx(float(scatter(batches).trace()), rel=0, abs=allowed)


@pytest.mark.parametrize("means", [(0, 0), (3, -40)])
def test_merged_gram_equals_one_stream(means):
    parts = [stream(3, 100, 24, decay=2, mean=mean, seed=seed) for seed, mean in enumerate(means)]
    merged, other = (run(GramStatistic, part, 8, dtype=torch.float64) for part in parts)
    merged.merge_(other)
    merged.finish_()
    whole = run(GramStatistic, [*parts[0], *parts[1]], 8, dtype=torch.float64)
    assert merged.num_rows == whole.num_rows == 600
    # Both add up the same rows in float64, one of them about a shift that is up to 43 away.
    size = float(merged.square_sum + whole.square_sum) + 600 * sum(mean**2 for mean in means) * 24
    rounding = 2 * gamma(600 + 24, torch.float64) * size
    torch.testing.assert_close(merged.eigenvalues, whole.eigenvalues, rtol=0, atol=rounding)
    torch.testing.assert_close(merged.total_scatter(), whole.total_scatter(), rtol=0, atol=rounding)
    gaps = -torch.diff(torch.linalg.eigvalsh(scatter([*parts[0], *parts[1]])).flip(0))[:8]
    apart = torch.minimum(gaps, torch.cat([torch.tensor([torch.inf], dtype=torch.float64), gaps[:-1]]))
    cosines = (merged.basis * whole.basis).sum(0).abs()
    assert (cosines >= 1 - (rounding / apart) ** 2 - orthonormality(24, 8, torch.float64)).all()


@pytest.mark.parametrize("means", [(0, 0), (3, -40)])
def test_merged_subspace_captures_what_one_stream_does(means):
    parts = [stream(6, 200, 64, decay=2, mean=mean, seed=seed) for seed, mean in enumerate(means)]
    merged, other = (run(SubspaceStatistic, part, 32, **EXACTLY) for part in parts)
    before = other.basis.clone()
    merged.merge_(other)
    batches = [*parts[0], *parts[1]]
    exact = scatter(batches)
    whole = run(SubspaceStatistic, batches, 32, **EXACTLY)
    assert loss(merged, exact, 16) <= 2 * loss(whole, exact, 16) + gamma(2400 + 64)
    assert_total(merged, batches)
    assert torch.equal(other.basis, before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_statistic_goes_on(kind):
    first, second, rest = (stream(4, 150, 32, decay=2, mean=2, seed=seed) for seed in range(3))
    merged = run(kind, first, 16, **EXACTLY)
    merged.merge_(run(kind, second, 16, **EXACTLY))
    for batch in rest:
        merged.accumulate_(batch)
        refresh_([merged])
    merged.finish_()
    batches = [*first, *second, *rest]
    exact = scatter(batches)
    whole = run(kind, batches, 16, **EXACTLY)
    assert loss(merged, exact, 8) <= 2 * loss(whole, exact, 8) + gamma(1800 + 32)
    assert_total(merged, batches)


@given(kind=st.sampled_from(KINDS), sizes=st.tuples(st.integers(0, 5), st.integers(0, 5)), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_statistics_of_few_rows_or_none_merge(kind, sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in sizes]
    parts = [kind(6, 3, dtype=torch.float64, **EXACTLY) for _ in rows]
    for part, x in zip(parts, rows, strict=True):
        part.accumulate_(x)
    refresh_(parts)
    parts[0].merge_(parts[1])
    everything = torch.cat(rows)
    assert parts[0].num_rows == len(everything)
    exact = (everything - everything.mean(0)).square().sum() if len(everything) else torch.zeros(())
    size = sum(float(part.square_sum) + part.num_rows * float((part.shift.double() ** 2).sum())
               for part in parts if part.shift is not None)  # fmt: skip
    rounding = gamma(64, torch.float64) * size
    torch.testing.assert_close(parts[0].total_scatter(), exact.double(), rtol=0, atol=rounding)
    assert parts[0].basis.isfinite().all()


def test_what_cannot_merge_is_named():
    gram, subspace = GramStatistic(4, 2), SubspaceStatistic(4, 2)
    with pytest.raises(ValueError, match=r"^other: expected .* \('gram', 4, 2\), got \('subspace', 4, 2\)"):
        gram.merge_(subspace)
    pending = SubspaceStatistic(4, 2)
    pending.accumulate_(torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"^other: expected no rows since the last refresh, got 3"):
        subspace.merge_(pending)
    assert subspace.num_rows == 0
    assert subspace.shift is None
