"""Sums of outer products, and the singular vectors that come of them, against dense float64."""

import pytest
import torch

from eva_kernels.gradient_sketch import leading_part, outer_add_, projected, random_basis, range_basis
from support.bounds import UNIT_ROUNDOFF, deviation, gamma, orthonormality

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def rows_of(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all rows", "masked"])
@pytest.mark.parametrize("shape", [(700,), (3, 5, 11), (0,)], ids=str)
def test_sums_are_those_of_float64(dtype, masked, shape):
    x, w = rows_of(*shape, 6, dtype=dtype), rows_of(*shape, 4, dtype=dtype, seed=1)
    mask = rows_of(*shape, seed=2) > 0 if masked else None
    exact, size = (
        torch.einsum("ta,tb->ab", *((f(y) if mask is None else f(y[mask])).double().flatten(0, -2) for y in (x, w)))
        for f in (lambda y: y, torch.abs)
    )
    if masked:
        x[~mask], w[~mask] = torch.nan, torch.inf  # what is left out enters nothing
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    product = torch.zeros(6, 4, dtype=kept)
    outer_add_(product, x, w, mask)
    count = shape[0] if len(shape) == 1 else x[..., 0].numel()
    assert ((product - exact).abs() <= gamma(max(count, 1), kept) * size).all()
    outer_add_(product, x, w, mask)
    torch.testing.assert_close(
        product.double(), 2 * exact, rtol=0, atol=float(4 * gamma(max(count, 1), kept) * size.max())
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_projected_and_masked_ones_are_zero(dtype):
    x, basis = rows_of(2, 300, 9, dtype=dtype), random_basis(9, 4)
    mask = rows_of(2, 300, seed=2) > 0
    exact, size = ((f(x).double() @ f(basis).double()).flatten(0, -2) for f in (lambda y: y, torch.abs))
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    assert ((projected(x, basis, dtype=kept) - exact).abs() <= gamma(9, kept) * size).all()
    x[~mask] = torch.nan
    found = projected(x, basis, mask, kept)
    assert not found[~mask.flatten()].any()
    assert ((found - exact)[mask.flatten()].abs() <= gamma(9, kept) * size[mask.flatten()]).all()


def test_rows_in_any_layout():
    x, w = rows_of(7, 5, 6).transpose(0, 1), rows_of(1, 1, 4).expand(5, 7, 4)
    product = torch.zeros(6, 4)
    outer_add_(product, x, w)
    torch.testing.assert_close(
        product.double(), torch.einsum("bta,btq->aq", x.double(), w.double()), rtol=1e-5, atol=1e-5
    )


@pytest.mark.slow  # test_gradient_sketch_core.py asks without PyTorch's compiler whether compiled code is passed by
def test_what_is_compiled_gives_the_same():
    """Traced tensors have no address: what compiled code wrote to one would be lost."""

    def call(product, x, weights, basis):
        outer_add_(product, x, weights)
        return projected(x, basis)

    x, weights, basis = rows_of(70, 20, dtype=torch.bfloat16), rows_of(70, 6, seed=1), random_basis(20, 6)
    products = torch.zeros(2, 20, 6)
    made = torch.compile(call, backend="aot_eager", fullgraph=True)(products[0], x, weights, basis)
    plain, size = call(products[1], x, weights, basis), x.double().abs()
    lost = UNIT_ROUNDOFF[torch.bfloat16] ** 2 / 2  # weights are two bfloat16 in some forms of the compiled code
    assert ((products[0] - products[1]).abs() <= (lost + 2 * gamma(73)) * (size.T @ weights.double().abs())).all()
    assert ((made - plain).abs() <= 2 * gamma(22) * (size @ basis.double().abs())).all()


def test_what_processes_have_summed_adds_up():
    x, w = rows_of(400, 6), rows_of(400, 4, seed=1)
    whole, shares = torch.zeros(6, 4), [torch.zeros(6, 4) for _ in range(3)]
    outer_add_(whole, x, w)
    for share, part in zip(shares, ([0, 100], [100, 350], [350, 400]), strict=True):
        outer_add_(share, x[slice(*part)], w[slice(*part)])
    size = x.abs().T @ w.abs()
    assert ((sum(shares) - whole).abs() <= 2 * gamma(402) * size).all()


# --- singular vectors


def gradient_of(shape, decay, rank, gap=1.1, seed=0):
    """A matrix whose singular values fall like those of a language model's gradients, j^-decay, with a gap."""
    u, v = (torch.linalg.qr(rows_of(n, min(shape), dtype=torch.float64, seed=seed + i)).Q for i, n in enumerate(shape))
    values = torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -decay
    values[:rank] *= gap
    return (u * values) @ v.T


def iterated(g, columns, passes):
    """What passes over a matrix tell of it: products with few columns, each pass with what the one before spans."""
    basis, left = random_basis(g.shape[1], columns), False
    for index in range(passes):
        product = (g.T if left else g) @ basis.to(g.dtype)
        if index < passes - 1:
            basis, left = range_basis(product), not left
    return basis, product, left


@pytest.mark.parametrize("shape", [(192, 576), (576, 192), (300, 300)], ids=str)
@pytest.mark.parametrize("decay", [0.5, 1.0], ids=str)
def test_five_passes_of_five_columns_a_rank_find_the_leading_vectors(shape, decay):
    rank = 8
    g = gradient_of(shape, decay, rank)
    basis, product, left = iterated(g, 5 * rank, 5)
    found = leading_part(basis, product, rank)
    assert not left  # the last product is of G
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    for mine, exact, side in ((found.left, u, g.T), (found.right, vt.T, g)):
        assert torch.linalg.svdvals(exact[:, :rank].T @ mine)[-1] >= 0.99
        assert (side @ mine).square().sum() >= (1 - 1e-3) * s[:rank].square().sum()
        assert deviation(mine).abs().max() <= 100 * len(mine) * UNIT_ROUNDOFF[torch.float64]
    torch.testing.assert_close(found.values, s[:rank], rtol=1e-2, atol=0)


def test_a_matrix_of_no_more_rank_than_columns_is_found_whole():
    g = rows_of(40, 3, dtype=torch.float64) @ rows_of(3, 50, dtype=torch.float64, seed=1)
    basis, product, _ = iterated(g, 6, 2)
    found = leading_part(basis, product, 6)
    # The basis was rounded, but what it spans was multiplied: nothing of G's range beyond that rounding is missing.
    rebuilt = found.right @ (found.values[:, None] * found.left.T)
    assert (rebuilt - g).norm() <= 2 * UNIT_ROUNDOFF[torch.bfloat16] * g.norm()
    assert (found.values[3:] <= 1e-2 * found.values[0]).all()


def test_bases_are_rounded_and_each_is_what_was_multiplied():
    g = gradient_of((60, 40), 1.0, 4).float()
    basis, product, _ = iterated(g, 12, 4)
    assert basis.dtype == torch.bfloat16
    found = leading_part(basis, product, 4)
    q = torch.linalg.qr(basis.double()).Q
    u, s, _ = torch.linalg.svd(g.T.double() @ q, full_matrices=False)
    torch.testing.assert_close(found.values, s[:4], rtol=1e-5, atol=0)
    assert torch.linalg.svdvals(u[:, :4].T @ found.left.double())[-1] >= 1 - 1e-6
    assert deviation(found.left).abs().max() <= orthonormality(40, 4)
    assert torch.equal(random_basis(9, 3, seed=5), random_basis(9, 3, seed=5))


def test_what_does_not_fit_is_named():
    product, x, w = torch.zeros(6, 4), rows_of(5, 6), rows_of(5, 4)
    for call, kind, message in (
        (lambda: outer_add_(product, x.long(), w), TypeError, "rows: expected a floating-point dtype"),
        (lambda: outer_add_(product, x[0, 0], w), ValueError, "rows: expected a tensor of rows"),
        (lambda: outer_add_(product, x, w.long()), TypeError, "weights: expected a floating-point dtype"),
        (lambda: outer_add_(product, x, w[:4]), ValueError, "weights: expected as many rows"),
        (lambda: outer_add_(product.T, x, w), ValueError, r"product: expected shape \(6, 4\)"),
        (lambda: outer_add_(product, x, w, torch.ones(5)), TypeError, "row_mask: expected dtype torch.bool"),
        (lambda: outer_add_(product, x, w, torch.ones(4).bool()), ValueError, r"row_mask: expected shape \(5,\)"),
        (lambda: outer_add_(product, x, w, impl="triton"), ValueError, "impl: expected CUDA or HIP tensors"),
        (lambda: projected(x, w[:0], impl="core"), ValueError, r"basis: expected shape \(6, q\)"),
        (lambda: projected(x, x.T, impl="core"), ValueError, "impl: expected one of"),
        (lambda: projected(x, w), ValueError, r"basis: expected shape \(6, q\)"),
        (lambda: leading_part(x, w, 2), ValueError, "product: expected 6 columns"),
        (lambda: leading_part(w, w, 5), ValueError, "rank: expected 1 to 4, got 5"),
    ):
        with pytest.raises(kind, match=message):
            call()
