"""The subspace kernels in Triton's interpreter, against float64."""

import importlib.util
import mmap
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import eva_kernels.subspace.triton as subspace_triton
from eva_kernels import subspace_accumulate_
from eva_kernels.subspace.triton import SubspaceTile, plan_subspace
from support.bounds import gamma

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def zeros(d, q):
    return torch.zeros(d, q), torch.zeros(d, dtype=torch.float64), torch.zeros((), dtype=torch.float64)


def run(x, basis, shift, mask=None, sign=1.0):
    state = zeros(*basis.shape)
    subspace_accumulate_(*state, x, basis, shift, mask, sign=sign, impl="triton")
    return state


def check(state, x, basis, shift, mask=None):
    """Float32 accumulation in any order: γ times the sum of the magnitudes that were added, entry by entry.

    Of float16, what the roundings of z, Q and P to it bring is added; bfloat16 is multiplied in float32 here.
    """
    product, column_sum, square_sum = (t.double().numpy() for t in state)
    rows = x.reshape(-1, x.shape[-1])
    if mask is not None:
        rows = rows[mask.reshape(-1)]
    raw, s, q = rows.double().numpy(), shift.double().numpy(), basis.double().numpy()
    z = raw - s
    size = np.abs(raw) + np.abs(s)  # of one entry of z before the shift cancels
    rows, d = z.shape
    bound = gamma(rows + d + 3) * (size.T @ (size @ np.abs(q)))
    if x.dtype == torch.float16:
        bound = 2 * bound + half_roundings(np.abs(z), np.abs(q))
    assert np.all(np.abs(product - z.T @ (z @ q)) <= bound)
    assert np.all(np.abs(column_sum - z.sum(0)) <= gamma(rows + 3) * size.sum(0))
    assert abs(square_sum - (z**2).sum()) <= gamma(rows * d + 3) * (size**2).sum()


def half_roundings(z, q):
    """How far Zᵀ Z Q is off at most where Z, Q and their product P are rounded to float16: magnitudes in, and out.

    P is divided by the least power of two that brings the largest of it to half of what float16 holds.
    """
    unit, smallest = 2.0**-11, 2.0**-24  # z is halved before it is rounded
    z_off, q_off = unit * z + 2 * smallest, unit * q + smallest
    p = z @ q
    p_off = z_off @ (q + q_off) + z @ q_off
    largest = max((p + p_off).max(initial=0), 2**15)
    p_off += unit * (p + p_off) + smallest * 2.0 ** np.ceil(np.log2(largest / 2**15))
    return z_off.T @ (p + p_off) + z.T @ p_off


def rows_like(n, d, q, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(n, d, generator=generator) + 1).to(dtype)
    basis = torch.randn(d, q, generator=generator)
    shift = 1 + torch.randn(d, generator=generator) / 8
    return x, basis, shift, torch.rand(n, generator=generator) < 0.6


@pytest.mark.usefixtures("nan_workspaces")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "d", "q"),
    [
        (0, 8, 2),
        (1, 1, 1),
        pytest.param(1, 8, 8, marks=pytest.mark.slow),
        (17, 7, 3),
        pytest.param(16, 40, 33, marks=pytest.mark.slow),
        (130, 33, 5),
        (257, 24, 24),
    ],
)
def test_matches_float64(n, d, q, dtype, masked):
    x, basis, shift, mask = rows_like(n, d, q, dtype)
    mask = mask if masked else None
    check(run(x, basis, shift, mask), x, basis, shift, mask)


@pytest.mark.parametrize("q", [128, *(pytest.param(q, marks=pytest.mark.slow) for q in (256, 300))])
def test_wide_bases(q):
    x, basis, shift, mask = rows_like(40, 320, q, torch.bfloat16)
    check(run(x, basis, shift, mask), x, basis, shift, mask)


@pytest.mark.parametrize(("q", "used"), [(33, 48), (80, 80)])
def test_of_what_pads_a_basis_nothing_is_read(q, used, monkeypatch):
    x, basis, shift, _ = rows_like(40, 24, q, torch.bfloat16)
    expected, make_operand = run(x, basis, shift), subspace_triton.make_operand

    def spoilt(*arguments):
        operand = make_operand(*arguments)
        assert operand.matrix.shape[1] > used
        operand.matrix[:, used:] = torch.nan
        return operand

    monkeypatch.setattr(subspace_triton, "make_operand", spoilt)
    assert all(map(torch.equal, expected, run(x, basis, shift)))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("d", [16, 17])
def test_masked_rows_enter_nothing(d, poison):
    x, basis, shift, mask = rows_like(40, d, 4, torch.bfloat16)
    poisoned = torch.where(mask[:, None], x, poison)
    for clean, dirty in zip(run(x, basis, shift, mask), run(poisoned, basis, shift, mask), strict=True):
        assert torch.equal(clean, dirty)
        assert dirty.isfinite().all()


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: torch.empty(6, 7, 32, dtype=x.dtype)[..., :24].copy_(x),
        lambda x: torch.empty(6, 7, 48, dtype=x.dtype)[..., ::2].copy_(x),
        lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x),
    ],
    ids=["wide rows", "every other column", "columns first", "batch second", "odd base"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides(layout, dtype):
    x, basis, shift, mask = rows_like(42, 24, 6, dtype)
    x, mask = x.view(6, 7, 24), mask.view(6, 7)
    basis = torch.empty(6, 24).T.copy_(basis)
    laid = layout(x)
    assert torch.equal(laid, x)
    check(run(laid, basis, shift, mask), x, basis, shift, mask)


@pytest.mark.usefixtures("nan_workspaces")
@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("aligned", [True, False])
def test_the_product_of_large_float16_rows_does_not_overflow(aligned, few, masked):
    """Z Q is beyond what float16 holds though X is not; where few rows are large, in few blocks of rows alone."""
    x, basis, shift, mask = rows_like(150, 40, 6, torch.float32)
    large = torch.arange(150) % 64 == 3 if few else torch.full((150,), True)
    x = torch.where(large[:, None], x.sign() * 60_000, x).half()
    shift = torch.where(torch.arange(40) % 7 == 0, -60_000.0, shift)  # z, too, is
    if not aligned:
        x = torch.empty(150, 41, dtype=x.dtype)[:, :40].copy_(x)
    mask = mask if masked else None
    z = x.double() - shift
    assert (z @ basis.double()).abs().max() > 8 * torch.finfo(torch.float16).max
    state = run(x, basis, shift, mask)
    assert all(part.isfinite().all() for part in state)
    check(state, x, basis, shift, mask)


def test_rows_can_be_taken_out_again():
    x, basis, shift, mask = rows_like(90, 24, 6, torch.float16)
    state = run(x, basis, shift)
    subspace_accumulate_(*state, x, basis, shift, mask, sign=-1, impl="triton")
    scale = (x.double() - shift).square().sum() * basis.norm()
    for left, direct in zip(state, run(x, basis, shift, ~mask), strict=True):
        assert (left - direct).abs().max() <= 2 * gamma(2 * 90 + 24) * scale


def test_two_runs_are_bit_equal():
    x, basis, shift, mask = rows_like(300, 40, 20, torch.bfloat16)
    for first, second in zip(run(x, basis, shift, mask), run(x, basis, shift, mask), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("mean", [1.0, 1024.0])
def test_error_at_large_means_grows_no_faster_than_the_mean(mean):
    """Folding costs here one factor of mean / sigma, not two: the shift cancels in a sum, not in its square.

    What an entry of X Q − 1 sᵀQ is off by meets shifted rows: Σ p is of the same P that raw rows are multiplied with.
    """
    d, n, q = 16, 24, 4
    generator = torch.Generator().manual_seed(1)
    unit = torch.randn(n, d, generator=generator).round()  # exact in float16 at both means
    basis = torch.linalg.qr(torch.randn(d, q, generator=generator)).Q.half().float()  # as it is multiplied
    x, shift = (unit + mean).half(), torch.full((d,), mean)
    z, size = unit.double(), x.double().abs() + mean
    product = z @ basis.double()
    off = gamma(d + 3) * (size @ basis.double().abs())
    off += 2.0**-11 * (product.abs() + off) + 2.0**-24  # P in float16
    bound = gamma(n + 3) * (size.T @ (product.abs() + off)) + z.abs().T @ off
    assert ((run(x, basis, shift)[0] - z.T @ product).abs() <= bound).all()


@pytest.mark.parametrize("processors", [4, 108, 132, 148])
@pytest.mark.parametrize("d", [8, 384, 896, 4096, 28672])
@pytest.mark.parametrize("n", [1, 2048, 16384])
def test_plan_covers_all_rows_and_columns_from_the_cache(n, d, processors):
    tile, cache = SubspaceTile(64, 64, 64, 8, 3), 40 * 2**20
    plan = plan_subspace(n, d, 2, tile, processors, cache)
    assert plan.chunk % tile.rows == plan.split_rows % tile.rows == plan.split_columns % tile.columns == 0
    assert plan.split_rows * (plan.row_splits - 1) < plan.chunk <= plan.split_rows * plan.row_splits
    assert plan.split_columns * (plan.column_splits - 1) < d <= plan.split_columns * plan.column_splits
    assert plan.chunk == tile.rows or plan.chunk * d * 2 <= cache // 2


@pytest.mark.skipif(sys.platform != "linux", reason="reserves address space the Linux way (MAP_NORESERVE)")
def test_offsets_beyond_31_bits_and_the_same_kernels_narrowed_fail(tmp_path):
    d, stride, offset = 16, 2**30 + 8, 2**31
    memory = mmap.mmap(-1, 2 * (offset + 2 * stride + d), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    x, basis, shift, _ = rows_like(3, d, 4, torch.float16)
    far = torch.frombuffer(memory, dtype=torch.float16).as_strided((3, d), (stride, 1), offset).copy_(x)
    check(run(far, basis, shift), x, basis, shift)

    source = Path(subspace_triton.__file__).read_text()
    path = tmp_path / "narrow.py"
    path.write_text(source.replace(".to(tl.int64)", "").replace("tl.full((), ROWS, tl.int64)", "ROWS"))
    spec = importlib.util.spec_from_file_location("eva_kernels.subspace.narrow", path)
    narrow = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = narrow
    try:
        spec.loader.exec_module(narrow)
        state = zeros(d, 4)
        narrow.subspace_triton(*state, far, basis, shift, None, 1.0)
    finally:
        del sys.modules[spec.name]
    with pytest.raises(AssertionError):
        check(state, x, basis, shift)
