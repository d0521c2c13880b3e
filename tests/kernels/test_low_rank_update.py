"""A matrix of low rank added to a weight in place: every form of compiled code, and plain PyTorch, against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eva_kernels.low_rank_update import Scratch, add_low_rank_, core, reference
from support.bounds import UNIT_ROUNDOFF, gamma

pytestmark = pytest.mark.usefixtures("cpu_form")
DTYPES = (torch.float32, torch.bfloat16)


def problem(m, n, r, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((m, r), (r, n)))
    return torch.randn(m, n, generator=generator).to(dtype), left, right


def assert_added(before, left, right, impl, dtype):
    """Rounded once from a sum in float64, and the figure is that of what was rounded off."""
    after = before.clone()
    lost = add_low_rank_(after, left, right, impl=impl)
    exact = before.double() + left @ right
    size = before.double().abs() + left.abs() @ right.abs()
    of_sum = gamma(left.shape[1] + 1, torch.float64) * size  # which may round to another neighbour
    by_way = UNIT_ROUNDOFF[torch.float32] if dtype == torch.bfloat16 else 0  # of float32
    bound = (UNIT_ROUNDOFF[dtype] + by_way) * exact.abs() * (1 + 2**-7) + 2 * of_sum
    difference = after.double() - exact
    assert (difference.abs() <= bound).all()
    norm = float(torch.linalg.vector_norm(before.double()))
    slack = (float(of_sum.norm()) / norm) + gamma(before.numel() + 2, torch.float64)
    assert lost == pytest.approx(float(difference.norm()) / norm, rel=1e-12, abs=2 * slack)
    return after


@given(
    m=st.sampled_from([1, 2, 3, 5, 31, 32, 33, 64, 130]),
    n=st.sampled_from([1, 7, 16, 17, 191, 192, 193, 400]),
    r=st.sampled_from([1, 3, 16, 97]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=40)
def test_matches_float64(m, n, r, dtype, seed):
    before, left, right = problem(m, n, r, dtype, seed)
    found = [assert_added(before, left, right, impl, dtype) for impl in ("core", "reference")]
    # Both round the same sums but for their own roundings in float64, which are rarely felt.
    assert float((found[0] != found[1]).double().mean()) <= max(2 / before.numel(), 1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_entry_is_rounded_to_its_nearest(dtype):
    """Sums that float64 holds exactly, half of them halfway between two neighbours: those go to the even one."""
    generator = torch.Generator().manual_seed(1)
    before = torch.randint(-64, 65, (70, 210), generator=generator).to(dtype)
    bits = {torch.float32: 24, torch.bfloat16: 8}[dtype]
    left = torch.randint(-3, 4, (70, 5), generator=generator).double()
    right = torch.randint(-3, 4, (5, 210), generator=generator).double() * 2.0 ** (2 - bits)
    exact = before.double() + left @ right
    after = before.clone()
    add_low_rank_(after, left, right, impl="core")
    assert torch.equal(after, exact.to(dtype))
    assert not torch.equal(after.double(), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_place(dtype, value):
    before, left, right = problem(40, 200, 3, dtype)
    before[5, 7] = value
    found = {}
    for impl in ("core", "reference"):
        found[impl] = before.clone()
        add_low_rank_(found[impl], left, right, impl=impl)
        others = torch.ones(40, 200, dtype=torch.bool)
        others[5, 7] = False
        assert found[impl][others].isfinite().all()
        assert torch.equal(found[impl][5, 7], before[5, 7]) or (value != value and found[impl][5, 7].isnan())
    assert torch.equal(found["core"].isnan(), found["reference"].isnan())


def test_no_bit_depends_on_the_number_of_threads():
    threads, found = torch.get_num_threads(), []
    before, left, right = problem(333, 450, 16, torch.float32)
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            after = before.clone()
            found.append((after, add_low_rank_(after, left, right, impl="core")))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(after, found[0][0]) and lost == found[0][1] for after, lost in found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.float32])
def test_what_is_not_compiled_is_plain_pytorch(dtype, monkeypatch):
    """Other dtypes, and memory that is not dense; convolutions' kernels are taken for matrices."""
    before, left, right = problem(24, 30, 4, dtype)
    cube = before.reshape(24, 5, 6).transpose(1, 2).contiguous().transpose(1, 2)
    monkeypatch.setattr(reference, "PIECE", 60)  # two rows
    assert not core.core_runs(cube, left, "auto")
    scratch = Scratch()
    for _ in range(2):
        after = cube.clone()
        add_low_rank_(after, left, right, scratch=scratch)
        assert (after.flatten(1).double() - before.double() - left @ right).abs().max() <= 32 * torch.finfo(dtype).eps


@pytest.mark.parametrize("impl", ["core", "reference"])
def test_kernels_of_convolutions_are_matrices(impl):
    before, left, right = problem(12, 18, 2, torch.float32)
    after, flat = before.clone().view(12, 2, 3, 3), before.clone()
    add_low_rank_(after, left, right, impl=impl)
    add_low_rank_(flat, left, right, impl=impl)
    assert torch.equal(after.view(12, 18), flat)


@pytest.mark.parametrize(("m", "n", "r"), [(0, 3, 2), (3, 0, 2), (3, 4, 0)])
def test_nothing_to_add_is_nothing(m, n, r):
    before, left, right = problem(m, n, r, torch.float32)
    after = before.clone()
    assert add_low_rank_(after, left, right) == 0
    assert torch.equal(after, before)


def test_zeros_have_no_rounding_to_speak_of():
    matrix, (_, left, right) = torch.zeros(3, 4), problem(3, 4, 2, torch.float32)
    assert add_low_rank_(matrix, left, right) == 0
    assert torch.equal(matrix, (left @ right).float())


def test_a_failure_half_way_leaves_the_matrix_but_for_a_rounding(monkeypatch):
    before, left, right = problem(24, 30, 4, torch.float64)
    real, calls = reference._norm, []

    def failing(x):
        calls.append(x)
        if len(calls) == 6:
            raise MemoryError("no more")
        return real(x)

    monkeypatch.setattr(reference, "PIECE", 60)
    monkeypatch.setattr(reference, "_norm", failing)
    after = before.clone()
    with pytest.raises(MemoryError):
        add_low_rank_(after, left, right, impl="reference")
    assert (after - before).abs().max() <= 8 * UNIT_ROUNDOFF[torch.float64] * float((left.abs() @ right.abs()).max())
    assert len(calls) == 6


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"matrix": torch.zeros(3, 4, dtype=torch.int8)}, TypeError, "matrix: expected floating point"),
        ({"matrix": torch.zeros(12)}, TypeError, r"matrix: expected floating point, \(m, …\), got torch.float32"),
        ({"left": torch.zeros(3, 2)}, TypeError, "left: expected float64, got torch.float32"),
        ({"left": torch.zeros(4, 2).double()}, ValueError, r"left: expected shape \(3, 2\), got \(4, 2\)"),
        ({"right": torch.zeros(2, 5).double()}, ValueError, r"right: expected shape \(2, 4\), got \(2, 5\)"),
        ({"right": torch.zeros(2, 4).double().to("meta")}, ValueError, "right: expected it on cpu, got meta"),
        ({"impl": "fast"}, ValueError, "impl: expected 'auto', 'core' or 'reference', got 'fast'"),
        ({"matrix": torch.zeros(3, 4).half(), "impl": "core"}, RuntimeError, "impl='core': expected a contiguous"),
    ],
)
def test_bad_arguments_are_named(wrong, error, message):
    _, left, right = problem(3, 4, 2, torch.float32)
    with pytest.raises(error, match=f"^{message}"):
        add_low_rank_(**{"matrix": torch.zeros(3, 4), "left": left, "right": right, **wrong})
