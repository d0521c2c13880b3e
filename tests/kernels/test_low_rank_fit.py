"""The best matrix of a rank for inputs of a known second moment, against dense float64 solutions."""

import numpy as np
import pytest
import torch

from eva_kernels.low_rank_fit import PrincipalMoment, SecondMoment, fit_image, fit_low_rank, principal_moment
from eva_kernels.low_rank_fit.steep import MISSING
from eva_kernels.orthonormal import APART
from support.bounds import deviation, orthonormality
from support.models import load_minilm

UNIT = 2.0**-24  # of float32


def dense(moment):
    """R as a float64 matrix."""
    rest = moment.rest.double().expand(len(moment.factor))
    return (moment.factor.double() @ moment.factor.double().T + rest.diag()).numpy()


def objective(error, r):
    return float(np.einsum("ij,jk,ik->", error, r, error))


def least(matrix, r, rank):
    """The objective's minimum over matrices of a rank: what the smaller eigenvalues of M R Mᵀ leave."""
    values = np.linalg.eigvalsh(matrix @ r @ matrix.T)
    return float(values[: len(values) - rank].sum())


def require_least(matrix, moment, u):
    """The objective is least to 1e-6 of it; where so little is left that a dtype's products no longer tell, as near
    as by PyTorch's eigenvectors of a product in that dtype. What columns that are ``APART`` from orthonormal miss is
    the square of that."""
    m, full, rank = matrix.double().numpy(), dense(moment), u.shape[1]
    outputs = matrix @ torch.from_numpy(full).to(matrix) @ matrix.T
    plain = torch.linalg.eigh((outputs + outputs.T) / 2)[1][:, -rank:]
    best = least(m, full, rank)
    got, allowed = (objective(m - v @ (v.T @ m), full) for v in (u.double().numpy(), plain.double().numpy()))
    rounding = (APART * torch.finfo(matrix.dtype).eps) ** 2 + len(full) ** 2 * torch.finfo(torch.float64).eps
    assert got - best <= 1e-6 * best + 2 * (allowed - best) + rounding * objective(m, full)


def decaying(n, k, seed=0):
    """Leading directions whose variances fall by three powers of ten, and little in the others."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, k, generator=generator)).Q
    return SecondMoment(basis * torch.logspace(1, -2, k), torch.tensor(1e-3))


MOMENTS = {
    "streamed": lambda n: decaying(n, n // 4),
    "exact": lambda n: SecondMoment(decaying(n, n).factor, torch.zeros(())),
    "singular": lambda n: SecondMoment(decaying(n, n // 4).factor, torch.zeros(())),
    "diagonal": lambda n: SecondMoment(torch.zeros(n, 0), torch.logspace(0, -3, n)),
    "none": lambda n: SecondMoment(torch.zeros(n, 0), torch.ones(())),
}
SHAPES = [(96, 96), (300, 64), (64, 300), (257, 129)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("rank", [1, 7, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_reaches_the_minimum(moment, shape, rank, dtype):
    matrix = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    r = SecondMoment(*(part.to(dtype) for part in MOMENTS[moment](shape[1])))
    fit = fit_low_rank(matrix, r, rank)
    require_least(matrix, r, fit.left)
    assert fit.left.dtype == dtype
    assert deviation(fit.left).abs().max() <= orthonormality(shape[0], rank, dtype)


@pytest.mark.parametrize("moment", MOMENTS)
def test_says_what_each_direction_gives_back(moment):
    matrix = torch.randn(200, 96, generator=torch.Generator().manual_seed(2))
    r = MOMENTS[moment](96)
    fit = fit_low_rank(matrix, r, 12)
    values = np.linalg.eigvalsh(matrix.double().numpy() @ dense(r) @ matrix.double().numpy().T)[::-1]
    rounding = 2 * 96 * UNIT * values.sum()  # of the products that the projection is made of
    np.testing.assert_allclose(fit.energies, values[:12], rtol=0, atol=max(rounding, 1e-6 * values.sum()))
    np.testing.assert_allclose(float(fit.total), values.sum(), rtol=2 * 96 * UNIT)
    assert (fit.energies.diff() <= 0).all()


def test_without_preference_it_is_the_truncated_svd():
    matrix = torch.randn(220, 80, generator=torch.Generator().manual_seed(3))
    matrix *= torch.logspace(0, -1, 80)  # gaps between singular values
    fit = fit_low_rank(matrix, MOMENTS["none"](80), 5)
    u, s, vt = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    expected = (u[:, :5] * s[:5]) @ vt[:5]
    assert np.linalg.norm((fit.left @ fit.right).numpy() - expected) <= 1e-5 * np.linalg.norm(expected)


def test_right_is_the_projection():
    matrix = torch.randn(130, 70, generator=torch.Generator().manual_seed(4))
    fit = fit_low_rank(matrix, decaying(70, 20), 6)
    exact = fit.left.double().T @ matrix.double()
    bound = 130 * UNIT * fit.left.abs().double().T @ matrix.abs().double()
    assert ((fit.right - exact).abs() <= bound).all()


def test_several_matrices_at_once_are_each_fitted():
    matrices = torch.randn(2, 3, 150, 40, generator=torch.Generator().manual_seed(6))
    moment = decaying(40, 12)
    together = fit_low_rank(matrices, moment, 5)
    assert together.left.shape == (2, 3, 150, 5)
    assert together.right.shape == (2, 3, 5, 40)
    assert together.energies.shape == (2, 3, 5)
    for i in range(2):
        for j in range(3):
            require_least(matrices[i, j], moment, together.left[i, j])


def test_reruns_are_bit_equal_and_leave_the_generators_alone():
    matrix, moment = torch.randn(300, 60), decaying(60, 20)
    state = torch.get_rng_state()
    first, second = (fit_low_rank(matrix, moment, 4) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("case", ["zero", "one row", "one column", "rank one", "one entry", "tiny", "huge"])
def test_edges(case):
    generator = torch.Generator().manual_seed(7)
    matrix = {
        "zero": torch.zeros(100, 20), "one row": torch.randn(1, 20, generator=generator),
        "one column": torch.randn(100, 1, generator=generator),
        "rank one": torch.outer(torch.randn(100, generator=generator), torch.randn(20, generator=generator)),
        "one entry": torch.zeros(100, 20).index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(1.0)),
        "tiny": 1e-15 * torch.randn(100, 20, generator=generator),
        "huge": 1e15 * torch.randn(100, 20, generator=generator),
    }[case]  # fmt: skip
    rank = min(3, *matrix.shape)
    moment = decaying(matrix.shape[1], matrix.shape[1])
    fit = fit_low_rank(matrix, moment, rank)
    assert fit.left.isfinite().all()
    assert deviation(fit.left).abs().max() <= orthonormality(len(matrix), rank)
    require_least(matrix, moment, fit.left)


def test_a_quantiser_s_error_of_real_weights_is_fitted_to_the_minimum():
    """It is nearly white: neighbouring singular values differ by a per cent."""
    weight = load_minilm().get_submodule("encoder.layer.1.intermediate.dense").weight.detach()
    groups = weight.reshape(len(weight), -1, 64)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (high - low) / 15
    error = weight - (((groups - low) / step).round() * step + low).reshape(weight.shape)
    for moment in (decaying(384, 40), MOMENTS["none"](384)):
        u = fit_low_rank(error, moment, 16).left.double().numpy()
        m = error.double().numpy()
        # M R Mᵀ has the eigenvalues of the smaller Rᐟ Mᵀ M Rᐟ, with Rᐟ a root of R.
        values, vectors = np.linalg.eigh(dense(moment))
        root = vectors * np.sqrt(values.clip(0))
        best = np.linalg.eigvalsh(root.T @ m.T @ m @ root)[:-16].sum()
        assert objective(m - u @ (u.T @ m), dense(moment)) <= (1 + 1e-6) * best


@pytest.mark.parametrize(
    ("matrix", "moment", "rank", "error", "message"),
    [
        (torch.zeros(4, 4).half(), decaying(4, 2), 1, TypeError, "matrix: expected float32 or float64"),
        (torch.zeros(4), decaying(4, 2), 1, ValueError, r"matrix: expected shape \(..., m, n\), got \(4,\)"),
        (torch.zeros(4, 4), decaying(4, 2), 0, ValueError, "rank: expected 1 to 4"),
        (torch.zeros(4, 3), decaying(3, 2), 4, ValueError, r"rank: expected 1 to 3 for shape \(4, 3\), got 4"),
        (torch.zeros(4, 3), decaying(4, 2), 1, ValueError, r"moment: expected a factor \(3, k\)"),
        (torch.zeros(4, 3), SecondMoment(torch.zeros(3, 1), torch.zeros(2)), 1, ValueError, "moment: expected"),
    ],
)
def test_mistakes_are_named(matrix, moment, rank, error, message):
    with pytest.raises(error, match=message):
        fit_low_rank(matrix, moment, rank)


def image(matrix, moment):
    """M R in float64."""
    return matrix.double() @ torch.from_numpy(dense(moment))


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (96, 40), (40, 96), (2, 130, 150)], ids=str)
@pytest.mark.parametrize("moment", ["streamed", "exact", "singular", "flat", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_image_s_directions_are_those_of_a_full_decomposition(shape, moment, dtype):
    """Projections differ by what is off over the gap: products' roundings, and what the next block would bring."""
    matrix = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(3))
    flat = SecondMoment(decaying(shape[-1], 12).factor, torch.ones(()))  # t is no small part
    r = flat if moment == "flat" else MOMENTS[moment](shape[-1])
    r = SecondMoment(*(part.to(dtype) for part in r))
    fit = fit_image(matrix, r, 6)
    assert fit.left.dtype == dtype
    flats = [part.reshape(-1, *part.shape[-2:]) for part in (matrix, fit.left, fit.right)]
    for i, (m, left, right) in enumerate(zip(*flats, strict=True)):
        u, s, _ = torch.linalg.svd(image(m, r), full_matrices=False)
        u, q = u[:, :6], left.double()
        rounding = 4 * shape[-1] * torch.finfo(dtype).eps
        gap = float(1 - s[6] / s[5])
        # fit_low_rank's way, for moments that are not steep, is bounded in energy: 1e-7 of all.
        steep = moment in ("streamed", "exact", "singular")
        allowed = (rounding + 1e-6) / gap if steep else (2e-7 * float(s.square().sum() / s[5].square()) / gap) ** 0.5
        assert torch.linalg.matrix_norm(q - u @ (u.T @ q)) <= allowed
        assert (right.double() - q.T @ m.double()).norm() <= rounding * m.double().norm()
        torch.testing.assert_close(
            fit.energies.reshape(-1, 6)[i], s[:6].square(), rtol=allowed**2 + 4 * rounding, atol=rounding * s[0] ** 2
        )
        total = objective(m.double().numpy(), dense(r))
        assert float(fit.total.reshape(-1)[i]) == pytest.approx(total, rel=rounding)


def test_images_of_zeros_and_of_few_directions_still_give_orthonormal_columns():
    r = decaying(200, 50)
    low = torch.randn(150, 3, generator=torch.Generator().manual_seed(4)) @ torch.ones(3, 200).cumsum(1).sin()
    for matrix in (torch.zeros(150, 200), low):
        fit = fit_image(matrix, r, 8)
        assert deviation(fit.left).abs().max() <= orthonormality(150, 8, torch.float32)
        assert (matrix - fit.left @ fit.right).norm() <= 1e-5 * matrix.norm()


@pytest.mark.parametrize("share", [0.05, 0.15, 0.35])
@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (150, 600)], ids=str)
def test_what_leads_out_of_the_known_directions_is_followed_until_it_is_less_than_is_asked(shape, share):
    """With t ‖M‖ up to a third of the last singular value, as real layers have it; of each direction ``MISSING``, over
    the gap to the next one that is left out, where what is off turns them."""
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    factor, rank = decaying(shape[1], 24).factor.double(), 8
    strength = torch.linalg.svdvals(matrix @ factor @ factor.T)[rank - 1] / torch.linalg.matrix_norm(matrix, 2)
    moment = SecondMoment(factor, share * strength)
    u, s, _ = torch.linalg.svd(image(matrix, moment), full_matrices=False)
    q, gap = fit_image(matrix, moment, rank).left, float(1 - s[rank] / s[rank - 1])
    assert torch.linalg.matrix_norm(q - u[:, :rank] @ (u[:, :rank].T @ q)) <= rank**0.5 * MISSING / min(gap, 0.5)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (2, 130, 150)], ids=str)
def test_neighbours_that_float32_would_turn_into_each_other_are_told_apart(shape):
    """Singular values of M R that differ by 10⁻⁴ where the last one is taken: float32 rounds to 10⁻³ of that."""
    n = shape[-1]
    generator, rank = torch.Generator().manual_seed(6), 8
    v = torch.linalg.qr(torch.randn(n, 24, generator=generator, dtype=torch.float64)).Q
    u = torch.linalg.qr(torch.randn(*shape[:-1], 24, generator=generator, dtype=torch.float64)).Q
    values = 1 / (1 + torch.arange(24, dtype=torch.float64))
    values[rank] = values[rank - 1] * (1 - 1e-4)
    factor = torch.linspace(3, 1, 24, dtype=torch.float64).sqrt()
    moment = SecondMoment((v * factor).float(), torch.zeros(()))
    matrix = (u * (values / factor.square()) @ v.mT).float()
    matrix += 1e-5 * torch.randn(shape, generator=generator) / n**0.5
    fit = fit_image(matrix, moment, rank)
    assert fit.left.dtype == fit.right.dtype == torch.float32
    for w, left, right in zip(*(part.reshape(-1, *part.shape[-2:]) for part in (matrix, *fit[:2])), strict=True):
        u, s, _ = torch.linalg.svd(image(w, moment), full_matrices=False)
        assert 1e-5 < float(1 - s[rank] / s[rank - 1]) < 1e-3
        exact = u[:, :rank] @ (u[:, :rank].T @ w.double())
        assert (left.double() @ right.double() - exact).norm() <= 1e-6 * exact.norm()


def test_principal_columns_are_orthogonal_longest_first_and_made_once():
    moment = MOMENTS["streamed"](80)
    turned = SecondMoment(moment.factor @ torch.linalg.qr(torch.randn(20, 20)).Q, moment.rest)
    found = principal_moment(turned)
    np.testing.assert_allclose(dense(found), dense(turned), rtol=0, atol=20 * UNIT * 100)  # the longest is 10
    gram = (found.factor.mT @ found.factor).double()
    lengths = gram.diagonal().sqrt()
    assert (lengths.diff() <= 0).all()
    assert (gram / torch.outer(lengths, lengths) - torch.eye(20)).abs().max() <= 80 * UNIT
    assert principal_moment(found) is found
    assert isinstance(principal_moment(SecondMoment(torch.zeros(5, 0), torch.ones(()))), PrincipalMoment)


def test_an_image_takes_one_rest_for_all_directions():
    with pytest.raises(ValueError, match=r"moment: expected one rest for all directions, got \(30,\)"):
        fit_image(torch.zeros(20, 30), SecondMoment(torch.zeros(30, 2), torch.ones(30)), 2)
