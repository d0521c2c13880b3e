"""The kernels on a device: against float64, by twice the error plain PyTorch makes at the same precision."""

import pytest
import torch

from eva_kernels import gram_accumulate_, subspace_accumulate_
from eva_kernels.gradient_sketch import outer_add_, projected
from eva_kernels.kernel_check import check_kernels
from eva_kernels.symmetric_eigen import symmetric_eigen
from support.bounds import UNIT_ROUNDOFF, likely

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
DEVICE = "cuda"


def rows_like(n, d, dtype, seed=0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    x = (torch.randn(n, d, generator=generator, device=DEVICE) + 1).to(dtype)
    return x, torch.ones(d, device=DEVICE), torch.rand(n, generator=generator, device=DEVICE) < 0.6


def zeros(*shape):
    totals = (
        torch.zeros(shape[0], dtype=torch.float64, device=DEVICE),
        torch.zeros((), dtype=torch.float64, device=DEVICE),
    )
    return torch.zeros(*shape, device=DEVICE), *totals


def error(value, exact):
    return float((value.double() - exact).abs().max() / exact.abs().max())


def test_every_kernel_passes_its_own_check():
    failed = [check for check in check_kernels(DEVICE) if not check.passed]
    assert not failed


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), [(1, 1), (1, 8), (17, 7), (300, 384), (2048, 576), (4099, 1027), (2048, 4096)])
def test_gram(n, d, dtype, masked):
    x, shift, mask = rows_like(n, d, dtype)
    mask = mask if masked else None
    state = zeros(d, d)
    gram_accumulate_(*state, x, shift, mask, impl="triton")
    kept = x if mask is None else x[mask]
    z = kept.double() - shift
    if not len(z):
        assert not state[0].any()
        return
    plain = kept - shift.to(dtype)
    allowed = max(2 * error(plain.mT @ plain, z.mT @ z), likely(n))
    assert error(state[0], z.mT @ z) <= allowed
    assert torch.equal(state[0], state[0].mT)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q", [16, 48, 64, 128, 256, 300])
@pytest.mark.parametrize(("n", "d"), [(300, 384), (4099, 1027), (2048, 8192)])
def test_subspace(n, d, q, dtype, masked):
    x, shift, mask = rows_like(n, d, dtype)
    mask = mask if masked else None
    basis = torch.linalg.qr(torch.randn(d, q, device=DEVICE)).Q
    state = zeros(d, q)
    subspace_accumulate_(*state, x, basis, shift, mask, impl="triton")
    kept = x if mask is None else x[mask]
    z, plain = kept.double() - shift, kept - shift.to(dtype)
    exact = z.mT @ (z @ basis.double())
    rough = plain.mT @ (plain @ basis.to(dtype))
    allowed = max(2 * error(rough, exact), likely(n))
    assert error(state[0], exact) <= allowed


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q", [1, 40, 80, 130])
@pytest.mark.parametrize(("n", "d"), [(1, 8), (300, 384), (4099, 1027), (2048, 8192)])
def test_gradient_sketch(n, d, q, dtype, masked):
    x, _, mask = rows_like(n, d, dtype)
    weights, basis = torch.randn(n, q, device=DEVICE), torch.randn(d, q, device=DEVICE).bfloat16()
    own, mask = (mask, mask) if masked else (slice(None), None)
    products = torch.zeros(2, d, q, device=DEVICE)
    z, w = x[own].double(), weights[own].double()
    if masked:
        x[~mask], weights[~mask] = torch.nan, torch.inf
    for product in products:
        outer_add_(product, x, weights, mask, impl="triton")
    assert torch.equal(*products)
    lost = UNIT_ROUNDOFF[torch.bfloat16] ** 2 / 2 if dtype == torch.bfloat16 else 0  # weights are two bfloat16
    assert ((products[0] - z.mT @ w).abs() <= (lost + likely(n)) * (z.abs().mT @ w.abs())).all()
    found = projected(x, basis, mask, impl="triton")
    exact, size = z @ basis.double(), z.abs() @ basis.double().abs()
    assert ((found[own] - exact).abs() <= likely(d) * size).all()
    assert masked is False or not found[~mask].any()


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("d", [384, 1027])
def test_the_product_of_large_float16_rows_does_not_overflow(d, few):
    x, shift, _ = rows_like(1000, d, torch.float32)
    large = torch.arange(1000, device=DEVICE) % 64 == 3 if few else torch.ones(1000, dtype=torch.bool, device=DEVICE)
    x = torch.where(large[:, None], x.sign() * 60_000, x).half()
    basis = torch.linalg.qr(torch.randn(d, 48, device=DEVICE)).Q.half().float()  # as it is multiplied
    state = zeros(d, 48)
    subspace_accumulate_(*state, x, basis, shift, impl="triton")
    z = x.double() - shift
    # Of P, and where rows are not aligned of z in both products, float16's rounding; what float32 adds is far less.
    bound = 4 * 2**-11 * (z.abs().mT @ (z.abs() @ basis.double().abs()))
    assert ((state[0].double() - z.mT @ (z @ basis.double())).abs() <= bound).all()


@pytest.mark.parametrize("d", [384, 1027])
def test_a_rerun_is_bit_equal(d):
    x, shift, mask = rows_like(3000, d, torch.bfloat16)
    basis = torch.randn(d, 64, device=DEVICE)
    for op, arguments in ((gram_accumulate_, (x, shift, mask)), (subspace_accumulate_, (x, basis, shift, mask))):
        states = [zeros(d, d if op is gram_accumulate_ else 64) for _ in range(2)]
        for state in states:
            op(*state, *arguments, impl="triton")
        assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_offsets_beyond_31_bits():
    d, stride = 1024, 2**30 + 8
    free, _ = torch.cuda.mem_get_info()
    if free < 2 * (2 * stride + d) + 2**28:
        pytest.skip("needs 4.3 GB of free device memory")
    x, shift, _ = rows_like(3, d, torch.bfloat16)
    far = torch.empty(2 * stride + d, dtype=x.dtype, device=DEVICE).as_strided((3, d), (stride, 1)).copy_(x)
    near_state, far_state = zeros(d, d), zeros(d, d)
    gram_accumulate_(*near_state, x, shift, impl="triton")
    gram_accumulate_(*far_state, far, shift, impl="triton")
    assert torch.equal(near_state[0], far_state[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 5, 33, 64, 100, 256])
@pytest.mark.parametrize("impl", ["triton", "auto"])
def test_symmetric_eigen(impl, k, dtype):
    root = torch.randn(16, k, k, device=DEVICE, dtype=torch.float64)
    matrix = (root @ root.mT).to(dtype)
    values, vectors = symmetric_eigen(matrix, impl=impl)
    exact = torch.linalg.eigvalsh(matrix.double()).flip(-1)
    largest = matrix.double().abs().amax((1, 2))[:, None]
    eps = torch.finfo(dtype).eps
    assert ((values.double() - exact).abs() <= 4 * k * eps * largest).all()
    gram = vectors.double().mT @ vectors.double()
    assert (gram - torch.eye(k, dtype=torch.float64, device=DEVICE)).abs().max() <= 8 * k * eps


@pytest.mark.parametrize("ratio", [0.5, 0.7, 0.8, 0.9])
@pytest.mark.parametrize("k", [128, 256])
def test_geometric_spectra_converge(k, ratio):
    """They take the most sweeps: 40 at k = 256, where noise takes 13."""
    generator = torch.Generator(DEVICE).manual_seed(k)
    q = torch.linalg.qr(torch.randn(2, k, k, generator=generator, device=DEVICE, dtype=torch.float64)).Q
    spectrum = ratio ** torch.arange(k, device=DEVICE, dtype=torch.float64)
    matrix = (q * spectrum) @ q.mT
    matrix = (matrix + matrix.mT) / 2
    values, vectors = symmetric_eigen(matrix, impl="triton")
    eps = torch.finfo(torch.float64).eps
    assert ((values - torch.linalg.eigvalsh(matrix).flip(-1)).abs() <= 4 * k * eps).all()  # the largest one is 1
    residual = torch.linalg.vector_norm(matrix @ vectors - vectors * values[:, None, :], dim=1)
    assert (residual <= 8 * k * eps).all()
