"""The two accumulating ops against float64, over shapes, dtypes, masks and strides."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eva_kernels import gram_accumulate_, subspace_accumulate_
from eva_kernels._rows import CHUNK_ROWS
from support.bounds import gamma

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rows_float64(x, shift, mask):
    rows = x.reshape(-1, x.shape[-1])
    keep = torch.ones(len(rows), dtype=torch.bool) if mask is None else mask.reshape(-1)
    return rows[keep].double().numpy() - shift.double().numpy()


def totals(d, dtype=torch.float32):
    return torch.zeros(d, d, dtype=dtype), torch.zeros(d, dtype=torch.float64), torch.zeros((), dtype=torch.float64)


@given(
    n=st.sampled_from([0, 1, 3, 255, 256, 257, 600]),
    d=st.sampled_from([1, 2, 7, 64, 130]),
    dtype=st.sampled_from(DTYPES),
    masked=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None, max_examples=60)
def test_the_references_match_float64(n, d, dtype, masked, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator).to(dtype)
    shift = torch.randn(d, generator=generator)
    mask = torch.rand(n, generator=generator) < 0.6 if masked else None
    q = min(d, 5)
    basis = torch.randn(d, q, generator=generator)
    gram, sums, squares = totals(d)
    product, sums2, squares2 = torch.zeros(d, q), torch.zeros_like(sums), torch.zeros_like(squares)
    gram_accumulate_(gram, sums, squares, x, shift, mask, impl="reference")
    subspace_accumulate_(product, sums2, squares2, x, basis, shift, mask, impl="reference")

    z = rows_float64(x, shift, mask)
    size = np.abs(z).T @ np.abs(z)  # the sum of magnitudes bounds rounding entry by entry
    # A row's shift is subtracted twice in a product; chunks are added to what there is.
    chunks = -(-n // CHUNK_ROWS)
    steps = min(n, CHUNK_ROWS) + chunks + 2
    assert np.all(np.abs(gram.numpy() - z.T @ z) <= gamma(steps) * size)
    bound = gamma(steps + d) * (size @ np.abs(basis.numpy()))
    assert np.all(np.abs(product.numpy() - z.T @ (z @ basis.numpy().astype(np.float64))) <= bound)
    for total in (sums, sums2):
        assert np.all(np.abs(total.numpy() - z.sum(0)) <= gamma(steps) * np.abs(z).sum(0))
    for total in (squares, squares2):
        assert abs(float(total) - (z**2).sum()) <= gamma(steps * d) * (z**2).sum()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_masked_rows_enter_nothing(poison):
    x = torch.randn(4, 9, 6)
    mask = torch.rand(4, 9) < 0.5
    poisoned = torch.where(mask[..., None], x, poison)
    shift = torch.randn(6)
    clean, dirty = totals(6), totals(6)
    gram_accumulate_(*clean, x, shift, mask)
    gram_accumulate_(*dirty, poisoned, shift, mask)
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(clean, dirty, strict=True))


def test_strides_do_not_matter():
    x = torch.randn(5, 7, 12)
    shift, mask = torch.zeros(12), torch.rand(5, 7) < 0.7
    layouts = [
        x,
        x.transpose(0, 1).contiguous().transpose(0, 1),  # leading dimensions that fold into no single stride
        torch.randn(5, 7, 24)[..., ::2].copy_(x),
        x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    ]
    results = []
    for layout in layouts:
        results.append(totals(12))
        gram_accumulate_(*results[-1], layout, shift, mask)
    for result in results[1:]:
        size = torch.einsum("abi,abj,ab->ij", x.abs(), x.abs(), mask.float())
        assert ((result[0] - results[0][0]).abs() <= 2 * gamma(35) * size).all()


def test_taking_rows_out_again_leaves_the_rest():
    a, b, shift = torch.randn(40, 8), torch.randn(30, 8), torch.randn(8)
    only_a, both = totals(8, torch.float64), totals(8, torch.float64)
    gram_accumulate_(*only_a, a.double(), shift.double())
    gram_accumulate_(*both, a.double(), shift.double())
    gram_accumulate_(*both, b.double(), shift.double())
    gram_accumulate_(*both, b.double(), shift.double(), sign=-1)
    rows = torch.cat([a, b]).double() - shift.double()
    sizes = rows.abs().T @ rows.abs(), rows.abs().sum(0), rows.square().sum()
    for x, y, size in zip(only_a, both, sizes, strict=True):
        assert ((x - y).abs() <= 4 * gamma(30 * 8, torch.float64) * size).all()


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"x": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "x"),
        ({"row_mask": torch.ones(3)}, TypeError, "row_mask"),
        ({"row_mask": torch.ones(4, dtype=torch.bool)}, ValueError, "row_mask"),
        ({"shift": torch.zeros(5)}, ValueError, "shift"),
        ({"gram": torch.zeros(3, 3)}, ValueError, "gram"),
        ({"impl": "fast"}, ValueError, "impl"),
    ],
)
def test_bad_arguments_are_named(change, error, name):
    gram, sums, squares = totals(4)
    arguments = {"gram": gram, "column_sum": sums, "square_sum": squares, "x": torch.ones(3, 4)}
    arguments |= {"shift": torch.zeros(4), **change}
    with pytest.raises(error, match=f"^{name}: expected"):
        gram_accumulate_(**arguments)
    assert not gram.any()


def test_subspace_names_bad_basis_and_product():
    _, sums, squares = totals(4)
    with pytest.raises(ValueError, match=r"^basis: expected shape \(4, q\)"):
        subspace_accumulate_(torch.zeros(4, 2), sums, squares, torch.ones(3, 4), torch.zeros(3, 2), torch.zeros(4))
    with pytest.raises(ValueError, match=r"^product: expected shape \(4, 2\)"):
        subspace_accumulate_(torch.zeros(4, 3), sums, squares, torch.ones(3, 4), torch.zeros(4, 2), torch.zeros(4))
