"""The compiled count sketch against the plain one, in every form that this machine runs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eva_kernels._rows import CHUNK_ROWS
from eva_kernels.streaming_svd import SubspaceStatistic, statistics
from eva_kernels.streaming_svd.count_sketch import count_sketch_core, count_sketch_reference
from support.bounds import gamma

pytestmark = pytest.mark.usefixtures("algebra_form")

STATED = {"auto": 1, "reference": 0}  # by impl, calls of the compiled sketch


def problem(n, d, dtype, seed, masked=True):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(n, d, generator=generator) + 1).to(dtype)
    signs = torch.randint(0, 2, (n, 1), generator=generator).float() * 2 - 1
    mask = torch.rand(n, generator=generator) < 0.7 if masked else None
    return x, signs if mask is None else signs * mask[:, None], mask


def added(add, q, x, signs, mask, first=0):
    d = x.shape[-1]
    sketch = torch.zeros(q, d), torch.zeros(q, 1), torch.zeros(d, dtype=torch.float64)
    add(*sketch, x, signs, mask, first)
    return sketch


@given(
    n=st.sampled_from([0, 1, 5, 255, 256, 257, 700]),
    d=st.sampled_from([1, 7, 16, 33, 200]),
    q=st.sampled_from([1, 3, 16, 300]),
    first=st.sampled_from([0, 1, 100, 256, 1000]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=80)
def test_sums_are_the_reference_s_bit_by_bit_and_totals_within_rounding(n, d, q, first, dtype, masked, seed):
    x, signs, mask = problem(n, d, dtype, seed, masked)
    sums, tally, total = added(count_sketch_core, q, x, signs, mask, first)
    expected = added(count_sketch_reference, q, x, signs, mask, first)
    assert torch.equal(sums, expected[0])
    assert torch.equal(tally, expected[1])
    kept = x.double() if mask is None else x.double()[mask]
    bound = gamma(CHUNK_ROWS) * kept.abs().sum(0)  # a chunk's rows are summed in float32
    assert torch.all((total - kept.sum(0)).abs() <= bound)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_masked_rows_enter_nothing_and_others_are_not_hidden(poison):
    x, signs, mask = problem(300, 20, torch.bfloat16, 1)
    dirty = torch.where(mask[:, None], x, poison)
    got, clean = (added(count_sketch_core, 8, rows, signs, mask) for rows in (dirty, x))
    assert all(torch.equal(a, b) for a, b in zip(got, clean, strict=True))
    sums, _, total = added(count_sketch_core, 8, torch.full_like(x, poison), signs, mask)
    assert not sums.isfinite().any()
    assert not total.isfinite().any()


def test_strides_views_and_offsets_are_read_as_they_are():
    x, signs, mask = problem(520, 32, torch.bfloat16, 2)
    wide = torch.randn(520, 100).to(torch.bfloat16)
    wide[:, 7:39] = x
    cube = x.reshape(4, 130, 32).transpose(0, 1).contiguous().transpose(0, 1)  # rows with two strides
    for layout in (wide[:, 7:39], cube, x.T.contiguous().T):
        for first in (0, 37):
            rows = mask.reshape(layout.shape[:-1])
            got = added(count_sketch_core, 24, layout, signs, rows, first)
            expected = added(count_sketch_reference, 24, layout, signs, rows, first)
            assert torch.equal(got[0], expected[0])
            assert torch.equal(got[1], expected[1])
            assert ((got[2] - expected[2]).abs() <= 2 * gamma(CHUNK_ROWS) * x.double().abs().sum(0)).all()


def test_threads_change_nothing_at_all():
    x, signs, mask = problem(600, 333, torch.float32, 3)
    before = torch.get_num_threads()
    outcomes = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            outcomes.append(added(count_sketch_core, 50, x, signs, mask))
    finally:
        torch.set_num_threads(before)
    for outcome in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], outcome, strict=True))


def test_auto_takes_it_and_reference_does_not(monkeypatch):
    x, _, mask = problem(300, 40, torch.bfloat16, 4)
    sketches = {i: SubspaceStatistic(40, 8, impl=i).sketch(x, mask, num_rows=int(mask.sum())) for i in STATED}
    assert torch.equal(sketches["auto"].sums, sketches["reference"].sums)
    taken = []
    monkeypatch.setattr(statistics, "count_sketch_core", lambda *arguments: taken.append(arguments))
    for impl, calls in STATED.items():
        taken.clear()
        SubspaceStatistic(40, 8, impl=impl).sketch(x, mask, num_rows=int(mask.sum()))
        assert len(taken) == calls
    taken.clear()
    SubspaceStatistic(40, 8, dtype=torch.float64).sketch(x, mask, num_rows=int(mask.sum()))
    assert not taken


def test_shares_of_the_rows_add_up():
    x, _, mask = problem(700, 48, torch.bfloat16, 5)
    statistic = SubspaceStatistic(48, 12, seed=7)
    whole = statistic.sketch(x, mask, num_rows=int(mask.sum()))
    parts = [
        statistic.sketch(x[start:stop], mask[start:stop], num_rows=int(mask[start:stop].sum()), first=start)
        for start, stop in ((0, 300), (300, 512), (512, 700))
    ]
    size = x[mask].double().abs().sum(0)
    sums, tally, total, num_rows = (sum(field) for field in zip(*parts, strict=True))
    assert ((sums - whole.sums).abs() <= 2 * gamma(700) * size).all()
    assert torch.equal(tally, whole.tally)
    assert ((total - whole.total).abs() <= 2 * gamma(CHUNK_ROWS) * size).all()
    assert num_rows == whole.num_rows
    blocks = [statistic.sketch(x[:, part], mask, num_rows=1).sums for part in (slice(0, 20), slice(20, 48))]
    assert torch.equal(torch.cat(blocks, 1), whole.sums)
