"""The leading eigenpairs of symmetric matrices, in every form of the compiled code, against LAPACK in float64."""

import pytest
import torch

from eva_kernels import symmetric_eigen as package
from eva_kernels.symmetric_eigen import core, leading_eigen
from eva_kernels.symmetric_eigen.reference import leading_eigen_reference

pytestmark = pytest.mark.usefixtures("cpu_form")
EPS = torch.finfo(torch.float64).eps

#: Eigenvalues of so many: apart, falling steeply, in pairs, all but equal, few, negative, of any size.
SPECTRA = {
    "even": lambda n: 1 + torch.arange(n),
    "inverse": lambda n: 1 / (1 + torch.arange(n)),
    "steep": lambda n: 0.5 ** torch.arange(n).double(),
    "pairs": lambda n: torch.arange(n) // 2,
    "equal": torch.ones,
    "all but equal": lambda n: 1 + 1e-12 * torch.arange(n).double(),
    "close": lambda n: 1 + 1e-7 * torch.arange(n).double(),
    "three": lambda n: torch.arange(n) < 3,
    "negative": lambda n: -1 - torch.arange(n),
    "both signs": lambda n: torch.arange(n) - n // 2,
    "huge": lambda n: 1e300 * (1 + torch.arange(n).double()) / n,
    "tiny": lambda n: 1e-300 * (1 + torch.arange(n).double()),
}


def matrix_of(values, seed=0):
    n = len(values)
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    matrix = (q * values.double()) @ q.T
    return (matrix + matrix.T) / 2


def assert_leading(matrix, count, values, vectors):
    """Backward stable: eigenvalues, residuals and orthonormality to a small multiple of the rounding."""
    n, scale = len(matrix), float(matrix.abs().max())
    expected = torch.linalg.eigvalsh(matrix).flip(0)[:count]
    assert ((values - expected).abs() <= 8 * n * EPS * scale).all()
    assert ((matrix / scale @ vectors - vectors * (values / scale)).abs() <= 8 * n * EPS).all()
    assert ((vectors.T @ vectors - torch.eye(count)).abs() <= 8 * n * EPS).all()


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("n", "count"), [(4, 1), (5, 1), (33, 8), (64, 16), (112, 17), (130, 30), (256, 17)])
def test_matches_lapack(n, count, spectrum, monkeypatch):
    matrix = matrix_of(SPECTRA[spectrum](n), seed=n)
    monkeypatch.setattr(core, "leading_eigen_reference", None)  # nothing falls back
    assert core.leading_core_runs(matrix, count)
    assert_leading(matrix, count, *leading_eigen(matrix, count))


@pytest.mark.parametrize("n", [8, 40, 200])
def test_tridiagonals_that_come_apart_and_diagonals(n, monkeypatch):
    monkeypatch.setattr(core, "leading_eigen_reference", None)
    apart = torch.diag(torch.arange(n).double() % 5) + torch.diag((torch.arange(n - 1) % 3).double(), -1)
    for matrix in (apart + apart.tril(-1).T, torch.diag(torch.arange(n).double())):
        assert_leading(matrix, n // 4, *leading_eigen(matrix, n // 4))


@pytest.mark.parametrize("n", [20, 64, 112])  # the first is not compiled
def test_graded_matrices_have_all_digits_of_their_small_eigenvalues(n):
    """D H D with H well conditioned and D falling by 10⁶, whose eigenvalues are known to a few roundings each (Barlow
    and Demmel 1990, Computing accurate eigensystems of scaled diagonally dominant matrices), and which Jacobi's method
    finds as its Cholesky factor's singular values."""
    generator = torch.Generator().manual_seed(n)
    scale = 10 ** torch.linspace(0, -6, n, dtype=torch.float64)
    rest = torch.randn(n, n, generator=generator, dtype=torch.float64) / (8 * n)
    matrix = (torch.eye(n) + rest @ rest.T) * torch.outer(scale, scale)
    count = n // 4 * 3
    values, vectors = leading_eigen(matrix, count)
    exact, axes = one_sided_jacobi(torch.linalg.cholesky(matrix))
    assert ((values - exact[:count]).abs() <= 1e-10 * exact[:count]).all()
    assert ((vectors * axes[:, :count]).sum(0).abs() >= 1 - 1e-10).all()
    assert (vectors.T @ vectors - torch.eye(count)).abs().max() <= 8 * n * EPS


def one_sided_jacobi(factor):
    """Eigenpairs of L Lᵀ: columns of L turned in pairs until they are orthogonal, which loses no small one."""
    columns = factor.clone().numpy()
    for _ in range(30):
        worst = 0.0
        for i in range(len(columns)):
            for j in range(i + 1, len(columns)):
                x, y = columns[:, i].copy(), columns[:, j].copy()
                a, b, c = x @ x, y @ y, x @ y
                worst = max(worst, abs(c) / (a * b) ** 0.5)
                if abs(c) <= EPS * (a * b) ** 0.5:
                    continue
                zeta = (b - a) / (2 * c)
                tangent = (1 if zeta >= 0 else -1) / (abs(zeta) + (1 + zeta * zeta) ** 0.5)
                cosine = 1 / (1 + tangent * tangent) ** 0.5
                columns[:, i], columns[:, j] = cosine * (x - tangent * y), cosine * (y + tangent * x)
        if worst <= 10 * EPS:
            break
    squares = torch.from_numpy((columns**2).sum(0))
    order = squares.argsort(descending=True)
    return squares[order], torch.from_numpy(columns)[:, order] / squares[order].sqrt()


def test_the_lower_triangle_is_read():
    matrix = matrix_of(SPECTRA["even"](40))
    garbage = matrix.tril() + torch.full_like(matrix, torch.nan).triu(1)
    for impl in ("auto", "reference"):
        assert_leading(matrix, 6, *leading_eigen(garbage, 6, impl=impl))


def test_float32_is_solved_in_float64_and_rounded():
    matrix = matrix_of(SPECTRA["inverse"](48)).float()
    values, vectors = leading_eigen(matrix, 12)
    wide = leading_eigen(matrix.double(), 12)
    assert values.dtype == vectors.dtype == torch.float32
    assert torch.equal(values, wide[0].float())
    assert torch.equal(vectors, wide[1].float())


def test_batches_are_those_of_their_members_whatever_the_number_of_threads():
    matrices = torch.stack([matrix_of(SPECTRA["even"](32), seed) for seed in range(6)]).reshape(2, 3, 32, 32)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 4):
            torch.set_num_threads(number)
            found.append(leading_eigen(matrices, 5))
    finally:
        torch.set_num_threads(threads)
    values, vectors = found[0]
    assert values.shape == (2, 3, 5)
    assert vectors.shape == (2, 3, 32, 5)
    assert all(torch.equal(values, other[0]) and torch.equal(vectors, other[1]) for other in found[1:])
    for i in range(2):
        for j in range(3):
            assert torch.equal(leading_eigen(matrices[i, j], 5)[0], values[i, j])


def test_what_it_does_not_solve_is_left_to_lapack(monkeypatch):
    taken = []
    monkeypatch.setattr(
        core, "leading_eigen_reference", lambda *given: taken.append(1) or leading_eigen_reference(*given)
    )
    values, vectors = leading_eigen(torch.zeros(16, 16, dtype=torch.float64), 3)
    assert not values.any()
    assert torch.equal(vectors.T @ vectors, torch.eye(3, dtype=torch.float64))
    with pytest.raises(torch.linalg.LinAlgError):
        leading_eigen(torch.full((16, 16), torch.inf, dtype=torch.float64), 3)
    assert len(taken) == 2


def test_few_of_large_enough_matrices_are_compiled(monkeypatch):
    taken = []
    real = package.leading_eigen_core
    monkeypatch.setattr(package, "leading_eigen_core", lambda *given: taken.append(given) or real(*given))
    for n, count, is_taken in [(16, 4, True), (16, 5, False), (256, 1, True), (257, 1, False), (3, 1, False)]:
        taken.clear()
        leading_eigen(torch.eye(n, dtype=torch.float64), count)
        assert bool(taken) == is_taken, (n, count)
    taken.clear()
    leading_eigen(torch.eye(16, dtype=torch.float64), 2, impl="reference")
    assert not taken


@pytest.mark.parametrize(
    ("matrix", "count", "impl", "error", "message"),
    [
        (torch.zeros(3, 4), 1, "auto", ValueError, r"matrix: expected shape \(..., k, k\), got \(3, 4\)"),
        (torch.zeros(3, 3).half(), 1, "auto", TypeError, "matrix: expected dtype float32 or float64"),
        (torch.zeros(3, 3), 0, "auto", ValueError, "count: expected 1 to 3, got 0"),
        (torch.zeros(3, 3), 4, "auto", ValueError, "count: expected 1 to 3, got 4"),
        (torch.zeros(3, 3), 1, "triton", ValueError, "impl: expected 'auto' or 'reference', got 'triton'"),
    ],
)
def test_bad_arguments_are_named(matrix, count, impl, error, message):
    with pytest.raises(error, match=f"^{message}"):
        leading_eigen(matrix, count, impl=impl)
