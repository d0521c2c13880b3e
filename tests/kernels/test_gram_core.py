"""The compiled Gram update against float64, in every form that this machine runs."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eva_kernels import GramStatistic, gram_accumulate_
from eva_kernels._build import cpu_form
from eva_kernels._rows import CHUNK_ROWS
from eva_kernels.gram import core, gram_add_, mirror_
from support.bounds import ROUNDING_FORMS, gamma

pytestmark = pytest.mark.usefixtures("cpu_form")


def problem(n, d, dtype, seed, masked=True):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(n, d, generator=generator) + 3).to(dtype)
    shift = 3 + 0.1 * torch.randn(d, generator=generator)
    return x, shift, torch.rand(n, generator=generator) < 0.7 if masked else None


def results(d):
    return torch.zeros(d, d), torch.zeros(d, dtype=torch.float64), torch.zeros((), dtype=torch.float64)


def allowed(x, shift, mask):
    """What entries may be off by. Chunks of rows are multiplied and then added up.

    Of z in float32 a product has two roundings, and its sum one a row. Where rows are multiplied as they are, each of
    the four terms of Σ x xᵀ − s (c + n s)ᵀ − c sᵀ has its own: of sums over a chunk, and at most eight besides.
    """
    n, as_they_are = len(x), x.dtype == torch.bfloat16 and cpu_form() in ROUNDING_FORMS
    x = x.double() if mask is None else x.double()[mask]
    z, s = (x - shift.double()).abs(), shift.double().abs()
    size = z.T @ z
    if as_they_are:
        size = x.abs().T @ x.abs() + torch.outer(s, z.sum(0) + len(x) * s) + torch.outer(z.sum(0), s)
    return gamma(min(n, CHUNK_ROWS) + -(-n // CHUNK_ROWS) + 8) * size


def assert_matches_float64(x, shift, mask):
    gram, sums, squares = results(x.shape[-1])
    assert core.core_runs(x, gram)
    core.gram_core(gram, sums, squares, x, shift, mask, 1.0)
    assert not gram.triu(1).any()
    z = x.double() - shift.double() if mask is None else (x.double() - shift.double())[mask]
    assert ((gram - (z.T @ z).tril()).abs() <= allowed(x, shift, mask)).all()
    rounding = gamma(CHUNK_ROWS + 2)  # z and, in float32, the sum over a chunk of its rows; for squares in lanes
    assert ((sums - z.sum(0)).abs() <= rounding * z.abs().sum(0)).all()
    assert abs(squares - z.square().sum()) <= rounding * z.square().sum()


@given(
    n=st.sampled_from([0, 1, 2, 31, 33, 256, 257, 300]),
    d=st.sampled_from([1, 2, 15, 16, 17, 32, 33, 97, 130]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=30)
def test_matches_float64_within_the_rounding_of_float32(n, d, dtype, masked, seed):
    assert_matches_float64(*problem(n, d, dtype, seed, masked))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_many_chunks_and_panels_leave_nothing_out(dtype):
    assert_matches_float64(*problem(1030, 331, dtype, 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_whole_numbers_come_out_exactly(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (300, 70), generator=generator).to(dtype)
    gram, sums, squares = results(70)
    core.gram_core(gram, sums, squares, x, torch.ones(70), None, -1.0)
    z = 1 - x.double()
    assert torch.equal(gram.double(), -(z.T @ z).tril())
    assert torch.equal(sums, z.sum(0))
    assert squares == -z.square().sum()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_masked_rows_enter_nothing_and_others_are_not_hidden(poison):
    x, shift, mask = problem(150, 20, torch.bfloat16, 1)
    clean, dirty = results(20), results(20)
    core.gram_core(*clean, x, shift, mask, 1.0)
    core.gram_core(*dirty, torch.where(mask[:, None], x, poison), shift, mask, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    core.gram_core(*dirty, torch.full_like(x, poison), shift, mask, 1.0)
    assert not dirty[0][torch.ones(20, 20).tril().bool()].isfinite().any()


def test_strides_views_and_offsets_are_read_as_they_are():
    x, shift, _ = problem(120, 32, torch.bfloat16, 2, masked=False)
    wide = torch.randn(120, 100).to(torch.bfloat16)
    wide[:, 7:39] = x
    expected = results(32)
    core.gram_core(*expected, x, shift, None, 1.0)
    for layout in (wide[:, 7:39], x.T.contiguous().T):
        got = results(32)
        core.gram_core(*got, layout, shift, None, 1.0)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    cube = x.reshape(4, 30, 32).transpose(0, 1).contiguous().transpose(0, 1)
    got = results(32)
    core.gram_core(*got, cube, shift, None, 1.0)  # walked in other chunks
    assert ((got[0] - expected[0]).abs() <= 2 * allowed(x, shift, None)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_neither_threads_nor_reruns_change_a_bit(dtype):
    x, shift, mask = problem(600, 200, dtype, 3)
    before = torch.get_num_threads()
    outcomes = []
    try:
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            outcomes.append(results(200))
            core.gram_core(*outcomes[-1], x, shift, mask, 1.0)
    finally:
        torch.set_num_threads(before)
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))


def test_the_op_leaves_a_whole_matrix_and_a_statistic_mirrors_when_it_is_asked():
    x, shift, mask = problem(60, 24, torch.bfloat16, 4)
    whole, half = results(24), results(24)
    gram_accumulate_(*whole, x, shift, mask)
    assert not gram_add_(*half, x, shift, mask)
    assert torch.equal(half[0], whole[0].tril())
    mirror_(half[0])
    assert torch.equal(half[0], whole[0])
    assert torch.equal(whole[0], whole[0].T)
    statistic = GramStatistic(24, 8)
    statistic.accumulate_(x, mask)
    assert not statistic.is_symmetric
    copy = statistic.clone()
    assert torch.equal(statistic.gram, statistic.gram.T)
    assert statistic.is_symmetric
    statistic.accumulate_(x, mask)
    copy.accumulate_(x, mask)  # asked for no matrix in between
    assert torch.equal(statistic.gram, copy.gram)


@pytest.mark.parametrize("d", [1, 31, 33, 100])
def test_a_mirrored_triangle_is_symmetric_and_as_it_was_below(d):
    given = torch.randn(d, d)
    for matrix in (given.clone(), given.T.contiguous().T):
        mirror_(matrix)
        assert torch.equal(matrix.tril(), given.tril())
        assert torch.equal(matrix, matrix.T)


def test_rows_can_be_taken_out_again():
    x, shift, mask = problem(100, 20, torch.float32, 4)
    gram, sums, squares = results(20)
    core.gram_core(gram, sums, squares, x, shift, mask, 1.0)
    core.gram_core(gram, sums, squares, x, shift, mask, -1.0)
    assert not gram.any()  # of one chunk: what was added is subtracted
    assert np.abs(float(squares)) == 0


def test_auto_takes_it_and_reference_does_not(monkeypatch):
    x, shift, mask = problem(50, 20, torch.bfloat16, 5)
    taken = []
    monkeypatch.setattr("eva_kernels.gram.gram_core", lambda *arguments: taken.append(arguments))
    gram_accumulate_(*results(20), x, shift, mask, impl="reference")
    assert not taken
    gram_accumulate_(*results(20), x, shift, mask)
    assert len(taken) == 1
