"""The compiled products of bfloat16 rows with few columns against float64, in every form that this machine runs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eva_kernels import gradient_sketch
from eva_kernels._build import cpu_form
from eva_kernels.gradient_sketch import core, outer_add_, projected
from support.bounds import ROUNDING_FORMS, UNIT_ROUNDOFF, gamma

pytestmark = pytest.mark.usefixtures("cpu_form")
TINY = torch.finfo(torch.float32).tiny


def of_weights():
    """What share of weights is lost at most: some forms make two bfloat16 of them, and of half an ulp, which the first
    leaves, half an ulp is left."""
    return UNIT_ROUNDOFF[torch.bfloat16] ** 2 / 2 if cpu_form() in ROUNDING_FORMS else 0


def problem(n, d, q, seed, masked=True):
    generator = torch.Generator().manual_seed(seed)
    x, weights, basis = (torch.randn(*shape, generator=generator) for shape in ((n, d), (n, q), (d, q)))
    mask = torch.rand(n, generator=generator) < 0.7 if masked else None
    return x.bfloat16(), weights, basis.bfloat16(), mask


def assert_matches_float64(x, weights, basis, mask, scale=1.0):
    """Sums in float32, in any order; dot products of bfloat16 take denormals for zeros, and give zeros for them."""
    n, d = x.shape
    z, w = x.double(), weights.double()
    if mask is not None:
        z, w = (torch.where(mask[:, None], y, 0) for y in (z, w))
    product = torch.full((d, basis.shape[1]), scale)
    core.outer_core(product, x, weights, mask)
    size = z.abs().T @ w.abs()
    bound = of_weights() * size + gamma(n + 3) * (scale + size) + 4 * n * TINY * (1 + z.abs().sum(0)[:, None])
    assert ((product - scale - z.T @ w).abs() <= bound).all()
    found = core.projected_core(x, basis, mask)
    b = basis.double()
    assert ((found - z @ b).abs() <= gamma(d + 2) * (z.abs() @ b.abs()) + 2 * d * TINY).all()


@given(
    n=st.sampled_from([0, 1, 2, 63, 64, 65, 300]),
    d=st.sampled_from([1, 2, 15, 16, 17, 33, 130]),
    q=st.sampled_from([1, 5, 15, 16, 40, 80, 130]),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=25)
def test_matches_float64(n, d, q, masked, seed):
    assert_matches_float64(*problem(n, d, q, seed, masked))


@pytest.mark.parametrize(("n", "d", "q"), [(530, 1100, 17), (100, 2100, 5), (600, 70, 97)])
def test_blocks_of_rows_and_features_leave_nothing_out_whatever_the_number_of_threads(n, d, q):
    x, weights, basis, mask = problem(n, d, q, n)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3, 5):
            torch.set_num_threads(threads)
            product = torch.zeros(d, q)
            core.outer_core(product, x, weights, mask)
            found.append((product, core.projected_core(x, basis, mask)))
    finally:
        torch.set_num_threads(before)
    assert_matches_float64(x, weights, basis, mask)
    assert all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))


def test_weights_that_two_bfloat16_hold_lose_nothing():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (200, 40), generator=generator).bfloat16()
    weights = torch.randint(-(2**13), 2**13, (200, 24), generator=generator).float()
    assert not torch.equal(weights.bfloat16().float(), weights)
    product = torch.zeros(40, 24)
    core.outer_core(product, x, weights, None)
    assert torch.equal(product.double(), x.double().T @ weights.double())


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_masked_rows_enter_nothing_and_others_are_not_hidden(poison):
    x, weights, basis, mask = problem(150, 20, 16, 1)
    clean, dirty = torch.zeros(2, 20, 16)
    bad = [torch.where(mask[:, None], y, poison) for y in (x, weights)]
    core.outer_core(clean, x, weights, mask)
    core.outer_core(dirty, *bad, mask)
    assert torch.equal(clean, dirty)
    found = core.projected_core(bad[0], basis, mask)
    assert torch.equal(found, core.projected_core(x, basis, mask))
    assert not found[~mask].any()
    core.outer_core(dirty, *bad, None)
    assert not dirty.isfinite().any()
    assert not core.projected_core(bad[0], basis, None)[~mask].isfinite().any()


def test_strides_views_and_offsets_are_read_as_they_are():
    x, weights, basis, _ = problem(120, 32, 16, 2, masked=False)
    wide = torch.randn(120, 101).bfloat16()
    wide[:, 7:39] = x
    cube = x.reshape(4, 30, 32).transpose(0, 1).contiguous().transpose(0, 1)
    expected = torch.zeros(32, 16)
    core.outer_core(expected, x, weights, None)
    size = x.double().abs().T @ weights.double().abs()
    for layout in (wide[:, 7:39], cube, x.T.contiguous().T):
        product = torch.zeros(16, 32).T
        core.outer_core(product, layout, weights.T.contiguous().T, None)
        assert ((product - expected).abs() <= 2 * gamma(123) * size).all()  # a view may be walked in parts
        found = core.projected_core(layout, basis.T.contiguous().T, None)
        assert torch.equal(found, core.projected_core(x, basis, None))


def test_it_is_taken_of_bfloat16_rows_alone_and_where_it_rounds_nothing(monkeypatch):
    x, weights, basis, mask = problem(50, 20, 16, 5)
    taken = []
    monkeypatch.setattr(gradient_sketch, "outer_core", lambda *arguments: taken.append("outer"))
    monkeypatch.setattr(gradient_sketch, "projected_core", lambda *arguments: taken.append("projected"))
    product = torch.zeros(20, 16)
    outer_add_(product, x, weights, mask, impl="reference")
    projected(x, basis, mask, impl="reference")
    for dtype in (torch.float32, torch.float16, torch.float64):
        outer_add_(product, x.to(dtype), weights, mask)
        projected(x.to(dtype), basis, mask)
    outer_add_(product.double(), x, weights, mask)
    projected(x, basis, mask, torch.float64)
    projected(x, basis.float(), mask)
    with monkeypatch.context() as traced:
        traced.setattr(torch.compiler, "is_compiling", lambda: True)
        outer_add_(product, x, weights, mask)
        projected(x, basis, mask)
    assert not taken
    outer_add_(product, x, weights, mask)
    projected(x, basis, mask)
    assert taken == ["outer", "projected"]
