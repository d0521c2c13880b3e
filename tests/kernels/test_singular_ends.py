"""Singular vectors from one end of a spectrum, against full decompositions in float64."""

import pytest
import torch

from eva_kernels.singular_ends import leading_singular, trailing_singular
from support.bounds import deviation, orthonormality
from support.models import load_minilm

SHAPES = [(40, 40), (160, 160), (300, 170), (170, 300)]


def matrix_of(shape, dtype=torch.float32, decay=3.0, seed=0):
    """Singular values that fall by so many powers of ten, evenly."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(n, min(shape), generator=generator, dtype=torch.float64)).Q for n in shape)
    return ((u * torch.logspace(0, -decay, min(shape), dtype=torch.float64)) @ v.T).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [1, 6, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_leading_vectors_hold_the_energy_and_the_subspace(shape, rank, dtype):
    matrix = matrix_of(shape, dtype)
    found = leading_singular(matrix, rank)
    u, s, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    best = s[:rank].square().sum()
    assert found.left.dtype == dtype
    assert (found.left.double().T @ matrix.double()).square().sum() >= (1 - 2e-4) * best
    assert torch.linalg.svdvals(u[:, :rank].T @ found.left.double())[-1] >= 0.999
    torch.testing.assert_close(found.values, s[:rank], rtol=1e-3, atol=0)
    assert deviation(found.left).abs().max() <= orthonormality(shape[0], rank, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [1, 6])
def test_trailing_vectors_are_those_of_a_full_decomposition(shape, rank):
    """Of values a thousandth of the largest, in float32: a product with its square would tell them to a tenth."""
    matrix = matrix_of(shape)
    found = trailing_singular(matrix, rank)
    u, s, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    assert torch.linalg.svdvals(u[:, -rank:].T @ found.left.double())[-1] >= 1 - 1e-6
    torch.testing.assert_close(found.values, s.flip(0)[:rank], rtol=1e-9, atol=0)


def test_several_at_once_are_each_decomposed():
    matrices = torch.stack([matrix_of((200, 170), seed=i) for i in range(4)]).reshape(2, 2, 200, 170)
    together = leading_singular(matrices, 5)
    assert together.left.shape == (2, 2, 200, 5)
    assert together.values.shape == (2, 2, 5)
    alone = leading_singular(matrices[1, 0], 5)
    assert torch.linalg.svdvals(together.left[1, 0].double().T @ alone.left.double())[-1] >= 0.999


def test_where_there_are_fewer_directions_than_asked_for_columns_are_still_orthonormal():
    for shape in ((200, 300), (300, 200)):
        matrix = matrix_of((shape[0], 3), decay=0.5) @ matrix_of((3, shape[1]), decay=0.5)
        found = leading_singular(matrix, 8)
        assert deviation(found.left).abs().max() <= 1e-6
        lost = matrix.double() - found.left.double() @ (found.left.double().T @ matrix.double())
        assert lost.norm() <= 1e-5 * matrix.double().norm()


def test_reruns_are_bit_equal_and_leave_the_generators_alone():
    matrix, state = matrix_of((200, 300)), torch.get_rng_state()
    first, second = leading_singular(matrix, 4), leading_singular(matrix, 4)
    assert torch.equal(first.left, second.left)
    assert torch.equal(state, torch.get_rng_state())


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match=r"matrix: expected float32 or float64, got torch\.bfloat16"):
        leading_singular(torch.zeros(3, 3, dtype=torch.bfloat16), 1)
    with pytest.raises(ValueError, match=r"matrix: expected shape \(..., m, n\), got \(3,\)"):
        trailing_singular(torch.zeros(3), 1)
    with pytest.raises(ValueError, match=r"rank: expected 1 to 3 for shape \(3, 4\), got 4"):
        leading_singular(torch.zeros(3, 4), 4)


def test_on_a_real_model_s_weights_it_loses_less_than_randomised_svd():
    """PEFT's ``pissa_niter_16`` is the peer: of the 16 leading directions' energy it loses up to 1 % there."""
    from peft.tuners.lora.layer import svd_lowrank

    torch.manual_seed(0)  # of the peer
    weights = {
        n: p.detach() for n, p in load_minilm().named_parameters() if n.endswith("dense.weight") and "layer." in n
    }
    assert len(weights) == 18
    for name, weight in [*weights.items()][::4]:
        u, s, _ = torch.linalg.svd(weight.double(), full_matrices=False)
        best = s[:16].square().sum()
        ours, theirs = leading_singular(weight, 16).left.double(), svd_lowrank(weight, 16, niter=16)[0].double()
        lost, theirs = (1 - float((left.T @ weight.double()).square().sum() / best) for left in (ours, theirs))
        assert lost <= 2e-4, name
        assert lost < theirs, name
        if s[15] - s[16] > 0.005 * s[15]:
            assert torch.linalg.svdvals(u[:, :16].T @ ours)[-1] >= 0.999, name


def test_flat_spectra_take_more_blocks():
    """Singular values that fall by 0.4 powers of ten over 400: six blocks would lose 3e-3."""
    matrix = matrix_of((400, 500), decay=0.4)
    found = leading_singular(matrix, 16)
    s = torch.linalg.svdvals(matrix.double())
    best = s[:16].square().sum()
    assert (found.left.double().T @ matrix.double()).square().sum() >= (1 - 2e-4) * best


def with_values(values, n=400, seed=0):
    """Of so many singular values: float32."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(size, len(values), generator=generator, dtype=torch.float64)).Q
        for size in (len(values), n)
    )
    return ((u * values) @ v.T).float()


@pytest.mark.parametrize("times", [8, 16, 40])
def test_a_value_that_is_there_more_than_once_is_found_as_often(times):
    values = torch.linspace(1, 0.1, 300, dtype=torch.float64)
    values[:times] = 1.5
    found = leading_singular(with_values(values), 16)
    best = values[:16].square().sum()
    assert found.values.square().sum() >= (1 - 2e-4) * best
    assert deviation(found.left).abs().max() <= orthonormality(300, 16, torch.float32)


def test_where_values_fall_by_orders_of_magnitude_nothing_is_rounded():
    """The first value is 500 times the 16th: rounding entries to bfloat16 would turn the subspace to 0.99 of itself."""
    values = 2e-3 * torch.linspace(1, 0.1, 300, dtype=torch.float64)
    values[0], values[16:] = 1.0, 0.97 * values[16:]
    matrix = with_values(values)
    u = torch.linalg.svd(matrix.double())[0][:, :16]
    assert torch.linalg.svdvals(u.T @ leading_singular(matrix, 16).left.double())[-1] >= 0.999
    rounded = torch.linalg.svd(matrix.bfloat16().double())[0][:, :16]
    assert torch.linalg.svdvals(u.T @ rounded)[-1] < 0.999


@pytest.mark.parametrize(
    ("dtype", "steep"), [(torch.float32, 1e4), (torch.float64, 1e7), (torch.float64, 1e9)], ids=str
)
@pytest.mark.parametrize("shape", [(200, 576), (384, 384)], ids=str)
def test_values_that_squares_do_not_tell_are_found_all_the_same(shape, dtype, steep):
    """Of directions with a gap of 5 %, whose values are that many times below the first, in M's own precision."""
    m, n = shape
    generator = torch.Generator().manual_seed(2)
    u = torch.linalg.qr(torch.randn(m, m, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, m, generator=generator, dtype=torch.float64)).Q
    values = torch.linspace(2, 1, m, dtype=torch.float64) / steep
    values[0], values[16:] = 2.0, 0.95 * values[16:]
    matrix = ((u * values) @ v.mT).to(dtype)
    exact = torch.linalg.svd(matrix.double())[0][:, :16]
    assert torch.linalg.svdvals(exact.mT @ leading_singular(matrix, 16).left.double())[-1] >= 0.999


@pytest.mark.parametrize("shape", [(0,), (2,)], ids=str)
def test_matrices_of_zeros_have_orthonormal_vectors(shape):
    found = leading_singular(torch.zeros(*shape, 200, 300), 8)
    assert not found.values.any()
    assert not found.right.any()
    assert not shape[0] or deviation(found.left).abs().max() <= orthonormality(200, 8, torch.float32)


def test_right_vectors_and_values_are_of_the_matrix_itself():
    """Not of its entries in bfloat16: A and B are made of them."""
    matrix = matrix_of((200, 900), decay=0.5)
    found = leading_singular(matrix, 16)
    right = found.left.double().T @ matrix.double()
    # A sum of 200 products in float32, each of a unit vector's entry and a matrix's: 200 roundings at most.
    assert (found.right - right).abs().max() <= 200 * 2.0**-24 * matrix.norm(dim=0).max()
    torch.testing.assert_close(found.values, right.norm(dim=1), rtol=200 * 2.0**-24, atol=0)
