"""The Gram kernels in Triton's interpreter, against float64."""

import importlib.util
import mmap
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import eva_kernels.gram.triton as gram_triton
from eva_kernels import gram_accumulate_
from eva_kernels.gram.triton import SMALL_TILE, _tile_origin, plan_gram
from support.bounds import gamma

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def zeros(d):
    return torch.zeros(d, d), torch.zeros(d, dtype=torch.float64), torch.zeros((), dtype=torch.float64)


def run(x, shift, mask=None, sign=1.0):
    state = zeros(x.shape[-1])
    gram_accumulate_(*state, x, shift, mask, sign=sign, impl="triton")
    return state


def check(state, x, shift, mask=None):
    """Float32 accumulation in any order: γ times the sum of the magnitudes that were added, entry by entry.

    The magnitudes are those of the raw rows and of the fold where the shift is subtracted afterwards. Of float16, what
    rounding z to it brings is added, which happens where rows are not aligned.
    """
    gram, column_sum, square_sum = (t.double().numpy() for t in state)
    rows = x.reshape(-1, x.shape[-1])
    if mask is not None:
        rows = rows[mask.reshape(-1)]
    raw, s = rows.double().numpy(), shift.double().numpy()
    z = raw - s
    c, rounding = np.abs(z.sum(0)), gamma(len(z) + 3)  # the shift, the fold, and what was there before
    size = np.abs(raw).T @ np.abs(raw) + np.outer(abs(s), c) + np.outer(c, abs(s)) + len(z) * np.outer(abs(s), abs(s))
    bound = rounding * size
    if x.dtype == torch.float16:
        off = 2.0**-11 * np.abs(z) + 2.0**-23  # halved before
        bound = 2 * bound + np.abs(z).T @ off + off.T @ (np.abs(z) + off)
    assert np.all(np.abs(gram - z.T @ z) <= bound)
    assert np.array_equal(gram, gram.T)
    single = np.abs(raw).sum(0) + len(z) * np.abs(s)
    assert np.all(np.abs(column_sum - z.sum(0)) <= rounding * single)
    assert abs(square_sum - (z**2).sum()) <= gamma(z.size + 3) * ((np.abs(raw) + np.abs(s)) ** 2).sum()


def rows_like(n, d, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(n, d, generator=generator) + 1).to(dtype)
    shift = 1 + torch.randn(d, generator=generator) / 8
    return x, shift, torch.rand(n, generator=generator) < 0.6


OTHERS = [pytest.param(*shape, marks=pytest.mark.slow) for shape in ((16, 40), (300, 24))]


@pytest.mark.usefixtures("nan_workspaces")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), [(0, 8), (1, 1), (1, 8), (17, 7), (5, 33), (257, 40), *OTHERS])
def test_matches_float64(n, d, dtype, masked):
    x, shift, mask = rows_like(n, d, dtype)
    mask = mask if masked else None
    check(run(x, shift, mask), x, shift, mask)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("d", [16, 17])
def test_masked_rows_enter_nothing(d, poison):
    x, shift, mask = rows_like(40, d, torch.bfloat16)
    poisoned = torch.where(mask[:, None], x, poison)
    for clean, dirty in zip(run(x, shift, mask), run(poisoned, shift, mask), strict=True):
        assert torch.equal(clean, dirty)
        assert dirty.isfinite().all()


@pytest.mark.parametrize("aligned", [True, False])
def test_large_float16_rows_do_not_overflow_where_the_shift_is_as_large(aligned):
    x, shift, _ = rows_like(40, 16, torch.float32)
    x, shift = (x.sign() * 60_000).half(), torch.where(torch.arange(16) % 3 == 0, -60_000.0, shift)
    x = x if aligned else torch.empty(40, 17, dtype=x.dtype)[:, :16].copy_(x)
    assert (x.double() - shift).abs().max() > torch.finfo(torch.float16).max
    state = run(x, shift)
    assert all(part.isfinite().all() for part in state)
    check(state, x, shift)


@pytest.fixture
def tf32():
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("d", [16, 17])
def test_tensor_cores_get_float32_rows_rounded_to_tf32(d):
    """To nearest: PyTorch's switch says that 10 bits of mantissa are enough, not that the others are cut off."""
    x, _, mask = rows_like(100, d, torch.float32)
    mantissa, exponent = np.frexp(x.double().numpy())
    rounded = torch.from_numpy(np.ldexp(np.round(mantissa * 2**11) / 2**11, exponent)).float()
    assert not torch.equal(rounded, x)
    state = run(x, torch.zeros(d), mask)
    check((state[0], *run(rounded, torch.zeros(d), mask)[1:]), rounded, torch.zeros(d), mask)
    x[0, 0], mask[0] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32), True  # a GPU's own NaN
    assert run(x, torch.zeros(d), mask)[0][0].isnan().all()


def test_no_row_left_by_the_mask():
    x, shift, mask = rows_like(20, 16, torch.bfloat16)
    assert not any(t.any() for t in run(x, shift, torch.zeros_like(mask)))


LAYOUTS = {
    "wide rows": lambda x: torch.empty(*x.shape[:-1], x.shape[-1] + 8, dtype=x.dtype)[..., : x.shape[-1]].copy_(x),
    "every other column": lambda x: torch.empty(*x.shape[:-1], x.shape[-1] * 2, dtype=x.dtype)[..., ::2].copy_(x),
    "columns first": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "batch second": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "odd base": lambda x: torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x),
    "reversed batch": lambda x: x.flip(0).contiguous().flip(0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides(layout, dtype):
    x, shift, mask = rows_like(42, 24, dtype)
    x, mask = x.view(6, 7, 24), mask.view(6, 7)
    laid = LAYOUTS[layout](x)
    assert torch.equal(laid, x)
    check(run(laid, shift, mask), x, shift, mask)


def test_one_row_repeated_by_a_zero_stride():
    x, shift, _ = rows_like(1, 16, torch.bfloat16)
    x = x.expand(50, 16)
    check(run(x, shift), x, shift)


def test_rows_can_be_taken_out_again():
    x, shift, mask = rows_like(90, 24, torch.float16)
    state = run(x, shift)
    gram_accumulate_(*state, x, shift, mask, sign=-1, impl="triton")
    scale = (x.double() - shift).square().sum()
    kept = run(x, shift, ~mask)
    for left, direct in zip(state, kept, strict=True):
        assert (left - direct).abs().max() <= 2 * gamma(2 * 90) * scale


def test_two_runs_are_bit_equal():
    x, shift, mask = rows_like(600, 40, torch.bfloat16)
    for first, second in zip(run(x, shift, mask), run(x, shift, mask), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("mean", [1.0, 64.0])
@pytest.mark.parametrize("aligned", [False, True])
def test_error_at_large_means_is_what_the_readme_says(aligned, mean):
    """Folded afterwards it is that of sums of raw rows; subtracted on loading there is none, since everything that is
    added is a multiple of 1/256 below 2¹⁶, as raw rows at the smaller mean are too.
    """
    d, n = 16, 400
    generator = torch.Generator().manual_seed(1)
    unit = torch.randn(n, d, generator=generator).mul(16).round() / 16  # exact in float16 at both means
    x, shift = (unit + mean).half(), torch.full((d,), mean)
    x = x if aligned else torch.empty(n, 2 * d, dtype=x.dtype)[:, ::2].copy_(x)
    state = run(x, shift)
    exact = unit.double().T @ unit.double()
    assert torch.equal(state[0].double(), exact) == (not aligned or mean == 1)
    check(state, x, shift)


@triton.jit
def _origins_kernel(out_ptr, d, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BAND: tl.constexpr):
    row, column = _tile_origin(tl.program_id(0), d, BLOCK_M, BLOCK_N, BAND)
    tl.store(out_ptr + 2 * tl.program_id(0), row)
    tl.store(out_ptr + 2 * tl.program_id(0) + 1, column)


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("band", [1, 2, 8])
@pytest.mark.parametrize("squares", [1, 2, 5, *(pytest.param(n, marks=pytest.mark.slow) for n in (7, 16))])
def test_tile_order_visits_the_triangle_once(squares, band, pieces):
    block = 16 * pieces
    tiles = squares * (squares + 1) // 2 * pieces
    out = torch.full((tiles, 2), -1, dtype=torch.int32)
    _origins_kernel[(tiles,)](out, squares * block - 3, BLOCK_M=16, BLOCK_N=block, BAND=band)
    expected = {(row, column) for row in range(0, squares * block, 16) for column in range(0, row + 1, block)}
    assert {(row, column) for row, column in out.tolist()} == expected
    assert len(expected) == tiles


@pytest.mark.parametrize("processors", [4, 108, 132, 148])
@pytest.mark.parametrize("d", [8, 384, 896, 4096, 28672])
@pytest.mark.parametrize("n", [1, 2048, 16384])
def test_plan_covers_all_rows_and_never_starts_a_second_partial_wave(n, d, processors):
    plan = plan_gram(n, d, SMALL_TILE, processors)
    squares = -(-d // SMALL_TILE.block_n)
    assert plan.tiles == squares * (squares + 1) // 2
    if plan.split:
        assert plan.whole % processors == 0
        assert plan.split < processors
        assert plan.split_rows % SMALL_TILE.block_k == 0
        assert plan.split_rows * (plan.splits - 1) < n <= plan.split_rows * plan.splits


def sparse_rows():
    """Three rows 2³⁰ elements apart, in the upper half of memory that is reserved and hardly touched."""
    d, stride, offset = 16, 2**30 + 8, 2**31
    memory = mmap.mmap(-1, 2 * (offset + 2 * stride + d), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    flat = torch.frombuffer(memory, dtype=torch.float16)
    return flat.as_strided((3, d), (stride, 1), offset).copy_(rows_like(3, d, torch.float16)[0])


@pytest.mark.skipif(sys.platform != "linux", reason="reserves address space the Linux way (MAP_NORESERVE)")
def test_offsets_beyond_31_bits_and_the_same_kernels_narrowed_fail(tmp_path):
    x, shift = sparse_rows(), torch.zeros(16)
    check(run(x, shift), x, shift)

    source = Path(gram_triton.__file__).read_text()
    narrowed = source.replace(".to(tl.int64)", "").replace("tl.full((), BLOCK_K, tl.int64)", "BLOCK_K")
    assert narrowed != source
    path = tmp_path / "narrow.py"
    path.write_text(narrowed)
    spec = importlib.util.spec_from_file_location("eva_kernels.gram.narrow", path)
    narrow = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = narrow
    try:
        spec.loader.exec_module(narrow)
        state = zeros(16)
        narrow.gram_triton(*state, x, shift, None, 1.0)
    finally:
        del sys.modules[spec.name]
    with pytest.raises(AssertionError):
        check(state, x, shift)
