"""Two statistics of different rows become one of all rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eva_kernels import GramStatistic, SubspaceStatistic, refresh_
from support.streams import EXACTLY, KINDS, loss, run, scatter, stream


@pytest.mark.parametrize("means", [(0, 0), (3, -40)])
def test_merged_gram_equals_one_stream(means):
    parts = [stream(3, 100, 24, decay=2, mean=mean, seed=seed) for seed, mean in enumerate(means)]
    merged, other = (run(GramStatistic, part, 8, dtype=torch.float64) for part in parts)
    merged.merge_(other)
    merged.finish_()
    whole = run(GramStatistic, [*parts[0], *parts[1]], 8, dtype=torch.float64)
    assert merged.num_rows == whole.num_rows == 600
    assert ((merged.basis * whole.basis).sum(0).abs() >= 1 - 1e-9).all()
    torch.testing.assert_close(merged.eigenvalues, whole.eigenvalues, rtol=1e-9, atol=0)
    torch.testing.assert_close(merged.total_scatter(), whole.total_scatter(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("means", [(0, 0), (3, -40)])
def test_merged_subspace_captures_what_one_stream_does(means):
    parts = [stream(6, 200, 64, decay=2, mean=mean, seed=seed) for seed, mean in enumerate(means)]
    merged, other = (run(SubspaceStatistic, part, 32, **EXACTLY) for part in parts)
    before = other.basis.clone()
    merged.merge_(other)
    batches = [*parts[0], *parts[1]]
    exact = scatter(batches)
    whole = run(SubspaceStatistic, batches, 32, **EXACTLY)
    assert loss(merged, exact, 16) <= max(2 * loss(whole, exact, 16), 1e-4)
    assert float(merged.total_scatter()) == pytest.approx(float(exact.trace()), rel=1e-5)
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
    exact = scatter([*first, *second, *rest])
    assert loss(merged, exact, 8) <= 1e-3
    assert float(merged.total_scatter()) == pytest.approx(float(exact.trace()), rel=1e-5)


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
    torch.testing.assert_close(parts[0].total_scatter(), exact.double(), rtol=1e-9, atol=1e-9)
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
