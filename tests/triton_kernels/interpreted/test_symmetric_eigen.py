"""The Jacobi kernel in Triton's interpreter, against LAPACK in float64."""

import numpy as np
import pytest
import torch

import eva_kernels.symmetric_eigen.triton as kernel
from eva_kernels.symmetric_eigen import symmetric_eigen


def matrices(batch, k, spectrum, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(batch, k, k, generator=generator, dtype=torch.float64)).Q
    values = torch.as_tensor(spectrum(np.arange(k)), dtype=torch.float64).expand(k)
    matrix = ((q * values) @ q.mT).to(dtype)
    return (matrix + matrix.mT) / 2


SPECTRA = {
    "flat": lambda i: 1 + i / 10,
    "steep": lambda i: 0.5**i,
    "clustered": lambda i: 1 + 1e-6 * i,
    "half rank": lambda i: np.where(i % 2, 0.0, 1.0 + i),
    "zero": lambda i: 0.0 * i,
    "huge": lambda i: 1e30 * (1 + i),
    "tiny": lambda i: 1e-30 * (1 + i),
}
QUICK = ("steep", "clustered")  # of sizes that take longer


@pytest.mark.parametrize(
    ("k", "spectrum"),
    [
        *((k, name) for k in (1, 2) for name in SPECTRA),
        *((7, name) for name in QUICK),
        *(pytest.param(7, name, marks=pytest.mark.slow) for name in SPECTRA if name not in QUICK),
        *(pytest.param(12, name, marks=pytest.mark.slow) for name in QUICK),
    ],
)
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.float64])
def test_matches_lapack(k, spectrum, dtype):
    """Backward stable: every eigenvalue, and the residual, to within the dtype's rounding of the largest entry."""
    matrix = matrices(2, k, SPECTRA[spectrum], dtype)
    values, vectors = symmetric_eigen(matrix, impl="triton")
    require_eigenpairs(matrix, values, vectors)


def require_eigenpairs(matrix, values, vectors):
    """Exact for a matrix that is off by a small multiple of k roundings of its largest entry."""
    k, eps = matrix.shape[-1], torch.finfo(matrix.dtype).eps
    exact = torch.linalg.eigvalsh(matrix.double()).flip(-1)
    largest = matrix.double().abs().amax((1, 2))[:, None]
    assert ((values.double() - exact).abs() <= 4 * k * eps * largest).all()
    residual = matrix.double() @ vectors.double() - vectors.double() * values.double()[:, None, :]
    assert (torch.linalg.vector_norm(residual, dim=1) <= 8 * k * eps * largest).all()
    gram = vectors.double().mT @ vectors.double()
    assert (gram - torch.eye(k, dtype=torch.float64)).abs().max() <= 8 * k * eps
    assert (values.diff(dim=-1) <= 0).all()


@pytest.mark.slow
def test_several_tiles_of_pairs_and_leading_dimensions(monkeypatch):
    monkeypatch.setattr(kernel, "TILE_BYTES", 1024)
    assert kernel.pairs_at_once(16, 4) < 5  # of the five pairs that ten columns make
    matrix = matrices(2, 10, SPECTRA["flat"], torch.float32).view(2, 1, 10, 10)
    values, vectors = symmetric_eigen(matrix, impl="triton")
    assert values.shape == (2, 1, 10)
    require_eigenpairs(matrix[:, 0], values[:, 0], vectors[:, 0])


def test_nan_ends_and_stays_in_its_matrix():
    matrix = matrices(3, 8, SPECTRA["flat"], torch.float32)
    matrix[1, 2, 3] = torch.nan
    values, _ = symmetric_eigen(matrix, impl="triton")
    assert values[[0, 2]].isfinite().all()
    assert values[1].isnan().any()


def test_two_runs_are_bit_equal():
    matrix = matrices(1, 9, SPECTRA["steep"], torch.float32)
    for first, second in zip(
        symmetric_eigen(matrix, impl="triton"), symmetric_eigen(matrix, impl="triton"), strict=True
    ):
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("matrix", "error", "message"),
    [
        (torch.zeros(2, 3), ValueError, r"^matrix: expected shape \(..., k, k\), got \(2, 3\)"),
        (torch.zeros(2, 2, dtype=torch.float16), TypeError, "^matrix: expected dtype float32 or float64"),
        (torch.zeros(257, 257), ValueError, "^matrix: expected k up to 256 for impl='triton', got 257"),
    ],
)
def test_bad_arguments_are_named(matrix, error, message):
    with pytest.raises(error, match=message):
        symmetric_eigen(matrix, impl="triton")
