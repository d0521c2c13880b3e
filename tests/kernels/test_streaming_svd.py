"""The two streaming statistics against the exact covariance of the same rows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from eva_kernels import GramStatistic, SubspaceStatistic, refresh_
from eva_kernels._rows import CHUNK_ROWS
from eva_kernels.streaming_svd import finish_, refresh
from support.bounds import deviation, gamma, orthonormality, refreshed_orthonormality
from support.streams import EXACTLY, KINDS, MISSED_AT_2R, MISSED_AT_R, loss, run, scatter, stream

ROUNDING = 2**-8  # of bfloat16


def test_gram_equals_pca_of_the_concatenated_rows():
    batches = stream(6, 200, 40, decay=2, mean=3)
    statistic = run(GramStatistic, batches, 10)
    pca = PCA(10, svd_solver="full").fit(torch.cat(batches).double().numpy())
    cosines = np.abs(np.sum(pca.components_.T * statistic.basis.double().numpy(), axis=0))
    values = pca.explained_variance_ratio_
    rounding = gamma(1200 + 40)  # of the whole scatter
    gaps = -np.diff(np.append(values, np.linalg.eigvalsh(scatter(batches))[-11] / scatter(batches).trace()))
    apart = np.minimum(gaps, np.append(np.inf, gaps[:-1]))
    assert (cosines >= 1 - (rounding / apart) ** 2 - orthonormality(40, 10)).all()  # Davis & Kahan: sin ≤ ‖ΔC‖ / gap
    np.testing.assert_allclose(statistic.explained_variance_ratio().numpy(), values, rtol=0, atol=2 * rounding)


@pytest.mark.parametrize("decay", [1.0, 1.5, 2.0])
def test_subspace_captures_nearly_all_that_can_be_captured(decay):
    batches = stream(40, 300, 192, decay=decay)
    statistic = run(SubspaceStatistic, batches, 48)
    exact = scatter(batches)
    assert loss(statistic, exact, 16) <= MISSED_AT_R
    assert loss(statistic, exact, 32) <= MISSED_AT_2R


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mean", [5, 100, 1e4])
def test_a_mean_far_from_zero_loses_nothing(kind, mean):
    missed = {}
    for offset in (0, mean):
        batches = stream(10, 200, 32, decay=2, mean=offset)
        statistic, exact = run(kind, batches, 16), scatter(batches)
        missed[offset] = loss(statistic, exact, 8)
        total = gamma(CHUNK_ROWS * 32)  # chunks are summed in float32, and added up in float64
        assert float(statistic.total_scatter()) == pytest.approx(float(exact.trace()), rel=2 * total)
    assert missed[mean] <= 2 * missed[0] + gamma(2000 + 32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_offset_changes_no_component(kind):
    batches = stream(5, 200, 24, decay=2)
    plain = run(kind, batches, 8, **EXACTLY)
    moved = run(kind, [batch + 7.5 for batch in batches], 8, **EXACTLY)
    values, vectors = torch.linalg.eigh(scatter(batches))
    values, vectors = values.flip(0)[:8], vectors.flip(1)[:, :8]
    # As near to the components of the rows; the offset has rounded them to float32 once more.
    rounding = 2 * gamma(1000 + 24)
    error, allowed = ((s.eigenvalues - values).abs().max() for s in (moved, plain))
    assert error <= 2 * allowed + rounding * values[0]
    missed, allowed = ((1 - (vectors * s.basis.double()).sum(0).abs())[:4].max() for s in (moved, plain))
    assert missed <= 2 * allowed + rounding


def test_refreshing_together_equals_refreshing_alone():
    def roundings(d, step):
        return 2 * (step + 1) * gamma(100 + d + 3 * 6)

    batches = {d: stream(3, 100, d, seed=d) for d in (16, 24)}
    together = [kind(d, 6) for d in (16, 24, 16) for kind in KINDS]
    alone = [s.clone() for s in together]
    for step in range(3):
        for s in (*together, *alone):
            s.accumulate_(batches[s.num_features][step])
        joint = refresh_(together)
        for s, expected in zip(alone, joint, strict=True):
            (own,) = refresh_([s])
            # A batched product may add in another order than a single one: that of rounding, of columns of one kind.
            np.testing.assert_allclose(own.cosines, expected.cosines, rtol=0, atol=roundings(s.num_features, step))
    for a, b in zip(together, alone, strict=True):
        atol = roundings(a.num_features, 2) * float(a.eigenvalues[0])
        torch.testing.assert_close(a.eigenvalues, b.eigenvalues, rtol=0, atol=atol)


@pytest.fixture
def threads():
    """PyTorch's threads, set back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def many(count=12, **options):
    """Statistics enough for several rounds a thread, each with rows of its own."""
    made = []
    for seed in range(count):
        statistic = KINDS[seed % 2](512, 256, seed=seed, **options)
        statistic.accumulate_(torch.randn(300, 512, generator=torch.Generator().manual_seed(seed)))
        made.append(statistic)
    return made


@pytest.mark.parametrize("impl", ["auto", "reference"])  # compiled code where there is some; PyTorch
def test_threads_change_no_bit_and_are_left_as_they_were(threads, impl):
    threads(1)
    alone = many(impl=impl)
    expected = refresh_(alone)
    side_by_side = many(impl=impl)
    threads(2)
    assert len(list(refresh._rounds(side_by_side, [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]]))) >= 2
    got = refresh_(side_by_side)
    assert torch.get_num_threads() == 2
    assert [torch.equal(a.basis, b.basis) for a, b in zip(alone, side_by_side, strict=True)] == [True] * len(alone)
    assert all(np.array_equal(a.overlaps, b.overlaps) for a, b in zip(expected, got, strict=True))
    finish_(side_by_side)
    threads(1)
    for statistic in alone:
        statistic.finish_()
    assert all(torch.equal(a.basis, b.basis) for a, b in zip(alone, side_by_side, strict=True))
    assert not any(s.basis.requires_grad for s in side_by_side)


def test_an_error_in_one_thread_reaches_the_caller(threads, monkeypatch):
    def fail(_sample, _product):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(refresh, "nystrom", fail)
    threads(2)
    with pytest.raises(RuntimeError, match="out of memory"):
        refresh_(many(4, impl="reference"))
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("kind", KINDS)
def test_cosines_and_overlaps_describe_the_step(kind):
    batches = stream(3, 200, 20, decay=2)
    statistic = kind(20, 6)
    for batch in batches:
        statistic.accumulate_(batch)  # the first one still makes the basis to start from
        before = statistic.basis.double()
        assert ((statistic.sample.double() - before).norm(dim=0) <= ROUNDING * before.norm(dim=0)).all()
        (result,) = refresh_([statistic])
        cross = (before.T @ statistic.basis.double()).numpy()
        # They are taken from the small matrices that the new basis is made of, by a product of q + q + 1 columns.
        rounding = gamma(20 + 3 * 6) + float(deviation(before).abs().max())
        np.testing.assert_allclose(result.cosines, np.abs(np.diag(cross)).clip(max=1), rtol=0, atol=rounding)
        expected = [np.sum(cross[:i, :i] ** 2) for i in range(1, 7)]
        np.testing.assert_allclose(result.overlaps, expected, rtol=0, atol=2 * 6 * rounding)


@pytest.mark.parametrize("kind", KINDS)
def test_gains_are_those_of_the_step_on_rows_unseen_by_it(kind):
    batches = stream(4, 150, 20, decay=1, mean=3)
    statistic = kind(20, 6, watch_gain=True)
    bases = []
    for batch in batches:
        statistic.accumulate_(batch[:100])
        statistic.accumulate_(batch[100:])
        (result,) = refresh_([statistic])
        if len(bases) >= 2:
            centred = batch.double() - batch.double().mean(0)
            before, after = ((centred @ basis).square().sum(0).cumsum(0) for basis in bases[-2:])
            # Projections are float32 products of 20 features; their mean, 3, is about as large as they are.
            rounding = 4 * gamma(20 + 150)
            np.testing.assert_allclose(result.gains, ((after - before) / after).numpy(), rtol=0, atol=rounding)
        bases.append(statistic.basis.double())
    assert not kind(20, 6).watch_gain


@pytest.mark.parametrize("kind", KINDS)
def test_permuting_the_batches_changes_captured_variance_by_little(kind):
    batches = stream(12, 200, 64)
    exact = scatter(batches)
    losses = [loss(run(kind, order, 32), exact, 16) for order in (batches, batches[::-1])]
    assert abs(losses[0] - losses[1]) <= 5e-3  # the project's bar: half a percent of the captured variance


@pytest.mark.parametrize("kind", KINDS)
def test_reruns_are_bit_equal_and_the_global_generator_is_untouched(kind):
    batches = stream(4, 100, 48)
    state = torch.get_rng_state()
    first, second = run(kind, batches, 12, seed=3), run(kind, batches, 12, seed=3)
    assert torch.equal(first.basis, second.basis)
    assert torch.equal(first.eigenvalues, second.eigenvalues)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_can_be_taken_out_before_the_refresh(kind):
    batches = stream(3, 100, 16)
    kept, changed = kind(16, 4, dtype=torch.float64), kind(16, 4, dtype=torch.float64)
    for s in (kept, changed):
        s.accumulate_(batches[0])
    changed.accumulate_(batches[1])
    changed.accumulate_(batches[1], sign=-1)
    refresh_([kept, changed])
    assert changed.num_rows == kept.num_rows == 100
    # The sums are off by the rounding of what came and went, in float64.
    atol = 2 * gamma(300 + 16, torch.float64) * float(changed.square_sum)
    torch.testing.assert_close(changed.eigenvalues, kept.eigenvalues, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nonfinite_rows_are_reported_and_leave_the_basis(kind, poison):
    good, bad = kind(8, 4), kind(8, 4)
    x = torch.randn(50, 8)
    for s in (good, bad):
        s.accumulate_(x)
    refresh_([good, bad])
    before = bad.basis.clone()
    good.accumulate_(x)
    bad.accumulate_(torch.full((50, 8), poison))
    assert [r.finite for r in refresh_([good, bad])] == [True, False]
    assert torch.equal(bad.basis, before)
    assert good.basis.isfinite().all()


SPECTRA = {
    "flat": lambda x: x,
    "steep": lambda x: x * torch.logspace(0, -12, x.shape[1]),
    "rank one": lambda x: x[:, :1] * torch.ones(x.shape[1]),
    "all zero": lambda x: torch.zeros_like(x),
    "constant": lambda x: torch.ones_like(x) * 3,
    "duplicated rows": lambda x: x[:1].expand_as(x),
    "huge outlier column": lambda x: torch.cat([x[:, :1] * 1e4, x[:, 1:]], 1),
    "mean at 1e4 sigma": lambda x: x + 1e4,
}


@given(
    kind=st.sampled_from(KINDS),
    spectrum=st.sampled_from(sorted(SPECTRA)),
    n=st.sampled_from([1, 2, 5, 64, 300]),
    d=st.sampled_from([1, 2, 9, 48]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=150)
def test_any_stream_gives_finite_orthonormal_components_in_range(kind, spectrum, n, d, dtype, masked, seed):
    generator = torch.Generator().manual_seed(seed)
    q = max(1, d // 2)
    statistic = kind(d, q)
    for _ in range(3):
        x = SPECTRA[spectrum](torch.randn(n, d, generator=generator)).to(dtype)
        mask = torch.rand(n, generator=generator) < 0.5 if masked else None
        statistic.accumulate_(x, mask)
        (result,) = refresh_([statistic])
        assert result.finite
        ratio = result.explained_variance_ratio
        assert np.all((ratio >= 0) & (ratio <= 1))
        assert ratio.sum() <= 1 + gamma(q + 1, torch.float64)
        assert np.all((result.cosines >= 0) & (result.cosines <= 1))
        final = statistic.clone()
        final.finish_()
        assert deviation(final.basis).abs().max() <= orthonormality(d, q)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize(("d", "q"), [(1, 1), (9, 2), (64, 16), (300, 60)])
@pytest.mark.parametrize("decay", [0.1, 1, 3, 6])
def test_a_basis_is_as_orthonormal_as_is_promised(kind, impl, d, q, decay):
    """After every refresh and after the end, whatever the spread of the spectrum: the README has the bounds."""
    statistic = kind(d, q, impl=impl)
    for batch in stream(4, 200, d, decay=decay, mean=3):
        statistic.accumulate_(batch)
        before = statistic.basis
        refresh_([statistic])
        assert (deviation(statistic.basis).abs() <= refreshed_orthonormality(statistic, before)).all()
        final = statistic.clone()
        final.finish_()
        assert deviation(final.basis).abs().max() <= orthonormality(d, q)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_rows_of_low_rank_give_no_variance_they_do_not_have(kind, seed):
    """More columns than independent rows: what is left of the spectrum is rounding.

    In each refresh 8 columns are too many. Such a column of Y holds rounding only, of a sum of 200 products of 128, and
    is multiplied by up to the inverse root of the jitter (see the README).
    """
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(40, 128, generator=generator)
    statistic = kind(128, 48, **EXACTLY)
    from_rounding = 8 * gamma(200 + 128) ** 2 / refresh.RELATIVE_JITTER + gamma(1200 + 128)
    for _ in range(6):
        statistic.accumulate_(torch.randn(200, 40, generator=generator) @ factor)
        refresh_([statistic])
        assert float(statistic.eigenvalues.sum() / statistic.total_scatter()) <= 1 + from_rounding


def test_sizes_out_of_range_are_named():
    with pytest.raises(ValueError, match=r"^num_features: expected at least 1, got 0"):
        GramStatistic(0, 1)
    with pytest.raises(ValueError, match=r"^num_components: expected 1 to 4 \(num_features\), got 5"):
        SubspaceStatistic(4, 5)


SHORT_OF_DIRECTIONS = {
    "rows that sum to zero, as a LayerNorm leaves them": lambda x: x - x.mean(1, keepdim=True),
    "a feature of zeros": lambda x: x * (torch.arange(x.shape[1]) != 3),
    "two features alike": lambda x: torch.cat([x[:, :-1], x[:, :1]], 1),
    "a third of the directions": lambda x: x @ torch.eye(x.shape[1])[: x.shape[1] // 3].T @ _mixed(x.shape[1]),
    "small rows of another size": lambda x: 1e-4 * (x - x.mean(1, keepdim=True)),
}


def _mixed(d):
    return torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(5))).Q[: d // 3]


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "PyTorch"])
@pytest.mark.parametrize("lacking", SHORT_OF_DIRECTIONS)
def test_directions_that_inputs_lack_bring_no_variance_from_nowhere(lacking, compiled, monkeypatch):
    """A basis as wide as its inputs are holds directions of which there is nothing but rounding."""
    if not compiled:
        monkeypatch.setattr(refresh, "refresh_core_runs", lambda statistic: False)
    _require_variance_of_rows(lacking)


def test_nor_with_any_form_of_the_compiled_code(cpu_form):
    """What rounding leaves of two features that are alike is another size with each."""
    _require_variance_of_rows("two features alike")


def _require_variance_of_rows(lacking):
    d = 32
    for seed in range(6):
        statistic = SubspaceStatistic(d, d, seed=seed)
        batches = [
            SHORT_OF_DIRECTIONS[lacking](torch.randn(96, d, generator=torch.Generator().manual_seed(100 * seed + i)))
            for i in range(6)
        ]
        for batch in batches:
            statistic.accumulate_(batch)
            refresh_([statistic])
        rows = torch.cat(batches).double()
        exact = torch.linalg.eigvalsh((rows - rows.mean(0)).T @ (rows - rows.mean(0))).flip(0)
        # Of each of the refreshes: products of float32 rows and bases, and what the jitter takes of each direction.
        eps = torch.finfo(torch.float32).eps
        rounding = 6 * d * (eps * exact.sum() + refresh.RELATIVE_JITTER * exact[0])
        # A column whose image is rounding, √d eps of the largest, and which is kept as just not one, adds that over
        # what its diagonal is of it: the limit.
        rounding += d**0.5 * eps * exact[0] / refresh.RELATIVE_ALIGNMENT
        found = statistic.eigenvalues.double()
        assert (found - exact).abs().max() <= rounding
        a = statistic.basis[:, :8].double()
        held = (a.T @ (rows - rows.mean(0)).T).square().sum()
        assert exact[:8].sum() - held <= rounding


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-30, 1e-22, 1e-16, 1e-12])
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "PyTorch"])
def test_rounding_that_looks_like_a_direction_hides_no_other(compiled, size, monkeypatch):
    """The image of a feature of zeros is rounding: as small as it likes, and by chance along the feature itself."""
    if not compiled:
        monkeypatch.setattr(refresh, "refresh_core_runs", lambda statistic: False)
    d, lacking = 16, 5
    x = torch.randn(96, d, generator=torch.Generator().manual_seed(1)) * torch.linspace(3, 1, d)
    x[:, lacking] = 0
    statistic = SubspaceStatistic(d, d)
    statistic.accumulate_(x)
    statistic.basis = statistic._sample = torch.eye(d)
    statistic.eigenvalues = torch.linspace(900, 600, d, dtype=torch.float64)  # of a past, which does not lack it
    rows = x.double() - x.double().mean(0)
    exact = rows.T @ rows
    noise = torch.randn(d, d, generator=torch.Generator().manual_seed(2)) * torch.finfo(torch.float32).eps * exact.max()
    noise[:, lacking] = size * torch.eye(d)[lacking]
    statistic.pending.copy_(exact + noise)
    past = statistic.eigenvalues.diag()
    if refresh.refresh_core_runs(statistic):  # what it cannot solve PyTorch would
        monkeypatch.setattr(refresh, "_refresh_", None)
    refresh_([statistic])
    wanted = torch.linalg.eigvalsh(exact + past).flip(0)
    # Of the noise, which is symmetrised, its norm; half the jitter of each direction's own; the mean in float32.
    bound = noise.double().norm() + refresh.RELATIVE_JITTER * wanted + d * torch.finfo(torch.float32).eps * wanted[0]
    assert ((statistic.eigenvalues - wanted).abs() <= bound).all()
