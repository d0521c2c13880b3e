"""Products of rows with few columns in Triton's interpreter, against float64."""

import importlib.util
import mmap
import sys
from pathlib import Path

import pytest
import torch

import eva_kernels.gradient_sketch.triton as sketch_triton
from eva_kernels._workspace import release_workspaces
from eva_kernels.gradient_sketch import outer_add_, projected
from support.bounds import UNIT_ROUNDOFF, gamma

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = {
    "wide rows": lambda x: torch.empty(6, 7, 32, dtype=x.dtype)[..., :24].copy_(x),
    "every other column": lambda x: torch.empty(6, 7, 48, dtype=x.dtype)[..., ::2].copy_(x),
    "columns first": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "batch second": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "odd base": lambda x: torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x),
}


def of_weights(dtype):
    """What share of weights is lost at most: with bfloat16 rows they are two bfloat16, and of half an ulp, which the
    first leaves, half an ulp is left."""
    return UNIT_ROUNDOFF[torch.bfloat16] ** 2 / 2 if dtype == torch.bfloat16 else 0


def rows_like(n, d, q, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, weights, basis = (torch.randn(*shape, generator=generator) for shape in ((n, d), (n, q), (d, q)))
    return x.to(dtype), weights, basis.bfloat16(), torch.rand(n, generator=generator) < 0.6


def check(x, weights, basis, mask=None):
    """Float32 sums in any order: γ times the sum of the magnitudes that were added, entry by entry."""
    flat, own = x.reshape(-1, x.shape[-1]).double(), weights.reshape(-1, weights.shape[-1]).double()
    if mask is not None:
        flat, own = (torch.where(mask.reshape(-1, 1), y, 0) for y in (flat, own))
    start = torch.ones(x.shape[-1], own.shape[-1])
    product = start.clone()
    outer_add_(product, x, weights, mask, impl="triton")
    bound = of_weights(x.dtype) * flat.abs().T @ own.abs() + gamma(len(flat) + 3) * (start + flat.abs().T @ own.abs())
    assert ((product - start - flat.T @ own).abs() <= bound).all()
    found = projected(x, basis, mask, impl="triton")
    assert found.shape == (len(flat), basis.shape[1])
    exact, size = flat @ basis.double(), flat.abs() @ basis.double().abs()
    assert ((found - exact).abs() <= gamma(flat.shape[1] + 2) * size).all()


@pytest.mark.usefixtures("nan_workspaces")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "d", "q"), [(0, 8, 2), (1, 1, 1), (1, 8, 5), (17, 7, 3), (70, 33, 40), (40, 24, 80), (20, 40, 130)]
)
def test_matches_float64_and_masked_rows_enter_nothing(n, d, q, dtype, masked):
    x, weights, basis, mask = rows_like(n, d, q, dtype)
    if masked:
        x[~mask], weights[~mask] = torch.nan, torch.nan
    check(x, weights, basis, mask if masked else None)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides(layout, dtype):
    x, weights, basis, mask = rows_like(42, 24, 6, dtype)
    x, mask = x.view(6, 7, 24), mask.view(6, 7)
    laid = LAYOUTS[layout](x)
    assert torch.equal(laid, x)
    check(laid, weights.T.contiguous().T.view(6, 7, 6), basis.T.contiguous().T, mask)


def test_weights_that_two_bfloat16_hold_lose_nothing():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (60, 24), generator=generator).bfloat16()
    weights = torch.randint(-(2**15), 2**15, (60, 6), generator=generator).float()
    assert not torch.equal(weights.bfloat16().float(), weights)
    product = torch.zeros(24, 6)
    outer_add_(product, x, weights, impl="triton")
    assert torch.equal(product.double(), x.double().T @ weights.double())


def test_other_factors_are_float32():
    x, weights, basis, mask = rows_like(40, 24, 6, torch.bfloat16)
    for other in (torch.float64, torch.float16):
        check(x, weights.to(other), basis, mask)
    found = projected(x, weights[:24], impl="triton")  # a basis in float32 is two bfloat16, too
    exact, size = x.double() @ weights[:24].double(), x.double().abs() @ weights[:24].double().abs()
    assert ((found - exact).abs() <= (of_weights(torch.bfloat16) + gamma(24 + 2)) * size).all()


@pytest.mark.parametrize("d", [40, 33])
def test_two_runs_are_bit_equal_and_shares_are_added_in_order(d):
    x, weights, basis, mask = rows_like(70, d, 20, torch.bfloat16)
    products = torch.zeros(2, d, 20)
    for product in products:
        outer_add_(product, x, weights, mask, impl="triton")
    assert torch.equal(*products)
    assert torch.equal(*(projected(x[:20], basis, mask[:20], impl="triton") for _ in range(2)))


def test_a_tensor_elsewhere_is_named():
    x, weights, _, _ = rows_like(5, 8, 2, torch.float32)
    with pytest.raises(ValueError, match="factor: expected a tensor on cpu, where the rows are, got one on meta"):
        sketch_triton.outer_triton(torch.zeros(8, 2), x, weights.to("meta"), None)


@pytest.mark.skipif(sys.platform != "linux", reason="reserves address space the Linux way (MAP_NORESERVE)")
def test_offsets_beyond_31_bits_and_the_same_kernels_narrowed_fail(tmp_path):
    d, stride, offset = 16, 2**30 + 8, 2**31
    memory = mmap.mmap(-1, 2 * (offset + 2 * stride + d), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    x, weights, basis, _ = rows_like(3, d, 4, torch.float16)
    far = torch.frombuffer(memory, dtype=torch.float16).as_strided((3, d), (stride, 1), offset).copy_(x)
    check(far, weights, basis)

    path = tmp_path / "narrow.py"
    source = Path(sketch_triton.__file__).read_text()
    path.write_text(source.replace(".to(tl.int64)", "").replace("tl.full((), DEPTH, tl.int64)", "DEPTH"))
    spec = importlib.util.spec_from_file_location("eva_kernels.gradient_sketch.narrow", path)
    narrow = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = narrow
    try:
        spec.loader.exec_module(narrow)
        release_workspaces()  # they know how rows of this kind were launched
        found = narrow.projected_triton(far, basis, None)
    finally:
        del sys.modules[spec.name]
        release_workspaces()
    assert not torch.allclose(found, x.float() @ basis.float())
