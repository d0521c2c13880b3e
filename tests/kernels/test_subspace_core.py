"""The compiled subspace product against float64, in every form that this machine runs."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eva_kernels import subspace_accumulate_
from eva_kernels._build import cpu_form
from eva_kernels._rows import CHUNK_ROWS
from eva_kernels.subspace import core
from support.bounds import ROUNDING_FORMS, UNIT_ROUNDOFF, gamma

pytestmark = pytest.mark.usefixtures("cpu_form")


def operand_rounding():
    """The unit roundoff of what the form that runs rounds its operands to: bfloat16, or nothing."""
    return UNIT_ROUNDOFF[torch.bfloat16] if cpu_form() in ROUNDING_FORMS else 0


def problem(n, d, q, dtype, seed, masked=True):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(n, d, generator=generator) + 3).to(dtype)
    shift = 3 + 0.1 * torch.randn(d, generator=generator)
    basis = torch.randn(d, q, generator=generator)
    mask = torch.rand(n, generator=generator) < 0.7 if masked else None
    return x, shift, basis, mask


def results(d, q):
    return torch.zeros(d, q), torch.zeros(d, dtype=torch.float64), torch.zeros((), dtype=torch.float64)


def assert_matches_float64(x, shift, basis, mask):
    product, sums, squares = results(*basis.shape)
    assert core.core_runs(x, product)
    core.subspace_core(product, sums, squares, x, basis, shift, mask, 1.0)
    keep = slice(None) if mask is None else mask
    z = (x.double() - shift.double())[keep].numpy()
    b = basis.double().numpy()
    # Four roundings of operands: z twice, the basis, and the projection; sums over features and rows in float32, of z
    # that was rounded to it.
    u = operand_rounding()
    share = (4 + 6 * u) * u + gamma(sum(x.shape) + 2)
    assert np.all(np.abs(product.numpy() - z.T @ (z @ b)) <= share * (np.abs(z).T @ (np.abs(z) @ np.abs(b))))
    rounding = gamma(CHUNK_ROWS + 2)  # z and, in float32, the sum over a chunk of its rows; for squares in lanes
    assert np.all(np.abs(sums.numpy() - z.sum(0)) <= rounding * np.abs(z).sum(0))
    assert abs(float(squares) - (z**2).sum()) <= rounding * (z**2).sum()


@given(
    n=st.sampled_from([0, 1, 2, 63, 64, 65, 300]),
    d=st.sampled_from([1, 2, 15, 16, 17, 130]),
    q=st.sampled_from([1, 15, 16, 17, 96, 100]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=50)
def test_matches_float64_within_the_rounding_of_its_operands(n, d, q, dtype, masked, seed):
    assert_matches_float64(*problem(n, d, q, dtype, seed, masked))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("n", "d", "q"), [(1030, 767, 17), (300, 1601, 16), (600, 70, 97)])
def test_chunks_of_rows_and_blocks_of_features_leave_nothing_out(n, d, q, threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert_matches_float64(*problem(n, d, q, torch.bfloat16, n))
    finally:
        torch.set_num_threads(before)


def test_operands_that_bfloat16_holds_exactly_give_the_float32_result():
    generator = torch.Generator().manual_seed(0)
    x, basis = (torch.randint(-2, 3, shape, generator=generator).float() for shape in ((200, 40), (40, 24)))
    product, sums, squares = results(40, 24)
    core.subspace_core(product, sums, squares, x, basis, torch.zeros(40), None, 1.0)
    projected = x.double() @ basis.double()
    projected = projected.to(torch.bfloat16).double() if operand_rounding() else projected
    assert torch.equal(product.double(), x.double().T @ projected)
    assert torch.equal(sums, x.double().sum(0))
    assert squares == x.double().square().sum()


def test_what_vanishes_in_a_product_is_missed_by_no_more():
    """Dot products of bfloat16 take denormals for zeros, and give zeros for them."""
    tiny = torch.finfo(torch.float32).tiny
    x, shift, basis, _ = problem(70, 40, 16, torch.float32, 6, masked=False)
    x, shift, basis = x * 2**-60, shift * 2**-60, basis * 2**-67
    product, sums, squares = results(40, 16)
    core.subspace_core(product, sums, squares, x, basis, shift, None, 1.0)
    z, b = x.double() - shift.double(), basis.double()
    n, d = x.shape
    u = operand_rounding()
    relative = ((4 + 6 * u) * u + gamma(n + d + 2)) * (z.abs().T @ (z.abs() @ b.abs()))
    # Each of the products and sums of an entry of P, and P as it is rounded; then those of an entry of Y.
    absolute = (2 * d + 1) * tiny * z.abs().sum(0)[:, None] + 2 * n * tiny
    assert ((product - z.T @ (z @ b)).abs() <= relative + absolute).all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_masked_rows_enter_nothing_and_others_are_not_hidden(poison):
    x, shift, basis, mask = problem(150, 20, 16, torch.bfloat16, 1)
    clean, dirty = results(20, 16), results(20, 16)
    core.subspace_core(*clean, x, basis, shift, mask, 1.0)
    core.subspace_core(*dirty, torch.where(mask[:, None], x, poison), basis, shift, mask, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    core.subspace_core(*dirty, torch.full_like(x, poison), basis, shift, mask, 1.0)
    assert not dirty[0].isfinite().any()


def test_strides_views_and_offsets_are_read_as_they_are():
    x, shift, basis, _ = problem(120, 32, 16, torch.bfloat16, 2, masked=False)
    wide = torch.randn(120, 100).to(torch.bfloat16)
    wide[:, 7:39] = x
    cube = x.reshape(4, 30, 32).transpose(0, 1).contiguous().transpose(0, 1)
    expected = results(32, 16)
    core.subspace_core(*expected, x, basis, shift, None, 1.0)
    for layout in (wide[:, 7:39], cube, x.T.contiguous().T):
        got = results(32, 16)
        core.subspace_core(*got, layout, basis, shift, None, 1.0)
        # A view may be walked in other chunks: a projection may then round to the next bfloat16.
        z = (x.double() - shift.double()).abs()
        size = z.T @ (z @ basis.double().abs())
        assert ((got[0] - expected[0]).abs() <= (2 * operand_rounding() + 2 * gamma(120 + 32)) * size).all()
        torch.testing.assert_close(got[2], expected[2], rtol=2 * gamma(CHUNK_ROWS + 2), atol=0)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing_but_rounding_and_reruns_nothing_at_all(threads):
    x, shift, basis, mask = problem(1000, 48, 40, torch.bfloat16, 3)
    before = torch.get_num_threads()
    outcomes = []
    try:
        for count in (1, threads, threads):
            torch.set_num_threads(count)
            outcomes.append(results(48, 40))
            core.subspace_core(*outcomes[-1], x, basis, shift, mask, 1.0)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(outcomes[1], outcomes[2], strict=True))
    z = (x.double() - shift.double())[mask].abs()
    size = z.T @ (z @ basis.double().abs())  # a projection may round to the next bfloat16
    assert ((outcomes[1][0] - outcomes[0][0]).abs() <= (2 * operand_rounding() + 2 * gamma(1000 + 48)) * size).all()
    assert ((outcomes[1][1] - outcomes[0][1]).abs() <= 2 * gamma(CHUNK_ROWS + 2) * z.sum(0)).all()


def test_rows_can_be_taken_out_again():
    x, shift, basis, mask = problem(100, 20, 16, torch.float32, 4)
    product, sums, squares = results(20, 16)
    core.subspace_core(product, sums, squares, x, basis, shift, mask, 1.0)
    z = (x.double() - shift.double())[mask].abs()
    core.subspace_core(product, sums, squares, x, basis, shift, mask, -1.0)
    # The same products and sums are added and subtracted again: what is left is the rounding of adding them.
    assert (product.abs() <= 2 * gamma(100) * (z.T @ (z @ basis.double().abs()))).all()
    assert squares.abs() <= 2 * gamma(2, torch.float64) * z.square().sum()


def test_auto_takes_it_and_reference_does_not(monkeypatch):
    x, shift, basis, mask = problem(50, 20, 16, torch.bfloat16, 5)
    taken = []
    monkeypatch.setattr("eva_kernels.subspace.subspace_core", lambda *arguments: taken.append(arguments))
    subspace_accumulate_(*results(20, 16), x, basis, shift, mask, impl="reference")
    assert not taken
    subspace_accumulate_(*results(20, 16), x, basis, shift, mask)
    assert len(taken) == 1
