"""The compiled refresh, eigensolver and Cholesky QR against PyTorch and NumPy, in every form."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eva_kernels import GramStatistic, SubspaceStatistic, refresh_
from eva_kernels.orthonormal.core import orthonormalize_core
from eva_kernels.orthonormal.reference import householder_qr
from eva_kernels.streaming_svd import refresh
from eva_kernels.streaming_svd.core import extract_core, refresh_core_runs
from eva_kernels.streaming_svd.refresh import RELATIVE_ALIGNMENT
from eva_kernels.symmetric_eigen import symmetric_eigen
from eva_kernels.symmetric_eigen.core import symmetric_eigen_core
from support.bounds import deviation, gamma, orthonormality, refreshed_orthonormality, require_as_near
from support.streams import KINDS, stream

pytestmark = pytest.mark.usefixtures("algebra_form")
ZERO = torch.zeros(())


def fed(kind, d, q, *, batches=3, rows=200, seed=0, **options):
    """A statistic with a past, and rows that it has not been refreshed with."""
    statistic = kind(d, q, seed=seed, **options)
    parts = stream(batches, rows, d, decay=0.5, mean=3, seed=seed)
    for batch in parts[:-1]:
        statistic.accumulate_(batch)
        refresh_([statistic])
    statistic.accumulate_(parts[-1])
    return statistic


def in_float64(members):
    """What the same extraction gives where nothing is rounded to float32: bases and eigenvalues."""
    sample, image, basis = (torch.stack([x.double() for x in m]) for m in zip(
        *((s.sample, s.image(), s.basis) for s in members), strict=True))  # fmt: skip
    mean, difference = type(members[0]).means(members, type(members[0]).counts(members)).double().unbind(1)
    product = image - mean[:, :, None] @ (mean[:, None] @ sample)
    approximation, _ = refresh.nystrom(sample, product)
    return refresh.combine(basis, type(members[0]).past_eigenvalues(members), difference, approximation)


@given(
    kind=st.sampled_from(KINDS),
    sizes=st.sampled_from([(1, 1), (7, 1), (9, 2), (16, 16), (40, 15), (65, 17), (130, 33), (300, 100)]),
    members=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_extraction_equals_that_of_pytorch(kind, sizes, members, seed):
    d, q = sizes
    statistics = [fed(kind, d, q, seed=seed + i, rows=400) for i in range(members)]
    assert all(map(refresh_core_runs, statistics))
    expected = refresh._extract(list(range(members)), statistics)
    before = [s.basis.double() for s in statistics]
    exact = in_float64(statistics)
    (taken,) = extract_core(statistics, refresh._LIMITS)
    assert taken.solved == [code == refresh.SOLVED for code in expected.status.tolist()]
    for i in np.flatnonzero(taken.solved):
        basis, values = exact[0][i], exact[1][i]
        rounding = gamma(d + 3 * q)  # of one of the products that an entry goes through
        largest = values[0]

        require_as_near(taken.eigenvalues[i], expected.eigenvalues[i], values, rounding * largest)
        scatters = [
            (b.double() * v) @ b.double().T
            for b, v in ((taken.bases[i], taken.eigenvalues[i]), (expected.basis[i], expected.eigenvalues[i]))
        ]
        require_as_near(*scatters, (basis * values) @ basis.T, rounding * largest)
        statistics[i].basis, statistics[i].eigenvalues = taken.bases[i], taken.eigenvalues[i]
        assert (deviation(taken.bases[i]).abs() <= refreshed_orthonormality(statistics[i], before[i])).all()
        # What it says of the step, beside what its bases say.
        own, plain = (refresh._agreement((before[i].T @ b.double())[None]) for b in (taken.bases[i], expected.basis[i]))
        require_as_near(taken.cosines[i] - own[0][0], expected.evidence[i, 0] - plain[0][0], ZERO, rounding)
        require_as_near(taken.overlaps[i] - own[1][0], expected.evidence[i, 1] - plain[1][0], ZERO, rounding * q)
        if kind.summarises:
            assert torch.equal(taken.samples[i], taken.bases[i].bfloat16().float())
            assert not statistics[i].pending.any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_refresh_takes_compiled_code_and_gives_what_pytorch_gives(kind, monkeypatch):
    compiled, plain = fed(kind, 96, 24, seed=3), fed(kind, 96, 24, seed=3, impl="reference")
    plain.load_state_(compiled.state())
    calls, nystrom = [], refresh.nystrom
    monkeypatch.setattr(refresh, "nystrom", lambda *args: (calls.append(1), nystrom(*args))[1])
    (ours,) = refresh_([compiled])
    assert not calls
    (theirs,) = refresh_([plain])
    assert calls
    # Each within its rounding of the same: the products' of an entry, through the root and the merge that follow.
    rounding = 2 * gamma(96 + 3 * 24)
    np.testing.assert_allclose(ours.explained_variance_ratio, theirs.explained_variance_ratio, rtol=0, atol=rounding)
    np.testing.assert_allclose(ours.overlaps, theirs.overlaps, rtol=0, atol=rounding * 24)
    assert compiled.num_refreshes == plain.num_refreshes == 3
    assert compiled.pending_rows == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("d", "q"), [(80, 16), (90, 13)])
def test_columns_of_a_steep_spectrum_come_out_orthonormal(kind, d, q):
    statistic = kind(d, q, seed=1)
    scales = torch.cat([torch.logspace(0, -3, q), torch.full((d - q,), 3e-4)])  # 1e-6 of the variance at the q-th
    for seed in range(3):
        batch = torch.randn(300, d, generator=torch.Generator().manual_seed(seed)) * scales * 100
        statistic.accumulate_(batch @ torch.linalg.qr(torch.ones(d, d).tril()).Q)
        if seed < 2:
            refresh_([statistic])
    plain = kind(d, q, seed=1, impl="reference")
    plain.load_state_(statistic.state())
    assert refresh._extract([0], [plain]).status.tolist() == [refresh.OBLIQUE]
    before = statistic.basis.double()
    (taken,) = extract_core([statistic], refresh._LIMITS)
    assert taken.solved == [True]
    basis = taken.bases[0].double()
    assert deviation(basis).abs().max() <= orthonormality(d, q)
    exact, values, _ = in_float64([plain])
    refresh_([plain])
    rounding = gamma(d + 3 * q)
    require_as_near(taken.eigenvalues[0], plain.eigenvalues, values[0], rounding * values[0, 0])
    leading = int((values[0] > refresh.RELATIVE_ORTHOGONAL * values[0, 0]).sum())  # below it float32 tells little apart
    missed, allowed = (
        1 - torch.linalg.svdvals(exact[0, :, :leading].T @ b[:, :leading].double()).min() for b in (basis, plain.basis)
    )
    assert missed <= 2 * allowed + (rounding * values[0, 0] / values[0, leading - 1]) ** 2  # sin², of a turned space
    cosines, overlaps = refresh._agreement((before.T @ basis)[None])
    np.testing.assert_allclose(taken.cosines[0], cosines[0], rtol=0, atol=gamma(d))
    np.testing.assert_allclose(taken.overlaps[0], overlaps[0], rtol=0, atol=2 * q * gamma(d))


@pytest.mark.parametrize(
    ("spoil", "finite"),
    [
        (lambda s: s.pending.fill_(float("nan")), False),
        (lambda s: s.pending[0, 0].fill_(float("inf")), False),
        (lambda s: s.pending.copy_(3e38 * s.sample.sign()), False),
        (lambda s: s.pending.mul_(-1), True),
        (lambda s: s.pending.zero_(), True),
    ],
    ids=["NaN", "Inf", "overflow", "indefinite", "no variance"],
)
def test_what_compiled_code_cannot_solve_is_left_to_pytorch(spoil, finite):
    statistics = [SubspaceStatistic(20, 6, seed=i) for i in range(3)]
    for i, statistic in enumerate(statistics):
        statistic.accumulate_(stream(1, 100, 20, decay=0.5, seed=i)[0])
    expected = [s.clone() for s in statistics]
    spoil(statistics[1])
    before = statistics[1].basis.clone()
    (taken,) = extract_core([s.clone() for s in statistics], refresh._LIMITS)
    assert taken.solved == [True, False, True]
    results = refresh_(statistics)
    assert [result.finite for result in results] == [True, finite, True]
    assert torch.equal(statistics[1].basis, before) or finite
    assert statistics[1].basis.isfinite().all()
    refresh_(expected)
    for i in (0, 2):
        assert torch.equal(statistics[i].basis, expected[i].basis)


def spectra(n, generator):
    """Symmetric matrices that an eigensolver may stumble over, by name."""
    full = torch.randn(n, n + 5, dtype=torch.float64, generator=generator)
    thin = torch.randn(n, max(1, n // 4), dtype=torch.float64, generator=generator)
    steep = torch.logspace(0, -9, n, dtype=torch.float64)
    plain = full @ full.T
    # What rows of lower rank leave, of each direction the rounding of the one before: squares of entries vanish.
    falling = {e: 10.0 ** (-e * torch.arange(n, dtype=torch.float64)) for e in (2, 5, 9, 17, 40)}
    return {
        **{f"falling by 1e-{e}": fall[:, None] * plain * fall for e, fall in falling.items()},
        **{f"rising by 1e-{e}": plain * fall.flip(0)[:, None] * fall.flip(0) for e, fall in falling.items()},
        "plain": plain,
        "steep": steep[:, None] * plain * steep,
        "ascending": plain * steep.flip(0)[:, None] * steep.flip(0),
        "diagonal": torch.diag(torch.rand(n, dtype=torch.float64, generator=generator)),
        "low rank": thin @ thin.T,
        "zero": torch.zeros(n, n, dtype=torch.float64),
        "nearly the identity": torch.eye(n, dtype=torch.float64) + 1e-10 * plain,
        "indefinite": full[:, :n] + full[:, :n].T,
        "huge": 1e200 * plain,
        "tiny": 1e-200 * plain,
    }


@pytest.mark.parametrize("n", [1, 2, 3, 8, 16, 17, 33, 96, 128])
def test_eigenpairs_are_those_of_numpy(n, monkeypatch):
    monkeypatch.delattr(symmetric_eigen_core.__module__ + ".symmetric_eigen_reference")  # all are solved
    matrices = spectra(n, torch.Generator().manual_seed(n))
    values, vectors = symmetric_eigen_core(torch.stack(list(matrices.values())))
    for name, matrix, value, vector in zip(matrices, matrices.values(), values, vectors, strict=True):
        expected = np.linalg.eigvalsh(matrix.numpy())[::-1]
        size = np.abs(expected).max()
        # Backward stable: exact for a matrix that is off by a small multiple of n roundings of the largest eigenvalue.
        rounding = 16 * gamma(n, torch.float64)
        np.testing.assert_allclose(value, expected, atol=rounding * size, rtol=0, err_msg=name)
        np.testing.assert_allclose(vector.T @ vector, np.eye(n), atol=rounding, rtol=0, err_msg=name)
        np.testing.assert_allclose(matrix @ vector, vector * value, atol=rounding * size, rtol=0, err_msg=name)


@pytest.mark.parametrize("kind", [GramStatistic, SubspaceStatistic])
def test_rows_of_lower_rank_have_components_with_numbers(kind):
    """Also where hardly any rows differ, as an embedding's: directions without variance beside those with some."""
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randn(9, 32, generator=generator) * torch.logspace(1, -2, 32)
        batches = [tokens[torch.randint(0, 9, (24,), generator=generator)] for _ in range(3)]
        statistic = kind(32, 32, seed=seed)
        for rows in batches:
            statistic.accumulate_(rows)
            (refreshed,) = refresh_([statistic])
            assert np.isfinite(refreshed.explained_variance_ratio).all()
        z = torch.cat(batches).double()
        z = z - z.mean(0)
        exact = torch.linalg.eigvalsh(z.T @ z).flip(0)
        # README: what rounding may add where rows lack directions.
        assert ((statistic.eigenvalues - exact).abs() <= 32**0.5 * 2**-23 / RELATIVE_ALIGNMENT * exact[0]).all()


def test_eigenpairs_of_nan_are_left_to_lapack():
    with pytest.raises(torch.linalg.LinAlgError):
        symmetric_eigen(torch.full((2, 3, 3), float("nan"), dtype=torch.float64))


def test_a_matrix_without_a_cholesky_factor_takes_householder():
    y = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    y[:, 3] = y[:, 1]
    assert torch.equal(orthonormalize_core(y), householder_qr(y.double()[None])[0].float())
