"""Bases compared with their predecessors: the reference, and the CUDA kernel's own source run on the host."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from eva_kernels._build import cuda_state
from eva_kernels.convergence import BasisComparison, Comparison, ConvergenceTracker

Matrix = NDArray[np.float32]

# One tile and one slice; several slices; several tiles; both; fewer rows than columns of a tile; one by one.
SHAPES = [(40, 8), (1300, 16), (600, 33), (2500, 48), (7, 3), (1, 1), (513, 32)]


def bases(shapes: list[tuple[int, int]], seed: int = 0) -> tuple[list[Matrix], list[Matrix]]:
    """Pairs of nearly orthonormal float32 bases that turn a little from the first to the second."""
    rng = np.random.default_rng(seed)
    previous, current = [], []
    for rows, columns in shapes:
        q = np.linalg.qr(rng.standard_normal((rows, columns)))[0]
        turned = np.linalg.qr(q + 0.3 / np.sqrt(rows) * rng.standard_normal((rows, columns)))[0]
        previous.append(q.astype(np.float32))
        current.append((turned * rng.choice([-1, 1], columns)).astype(np.float32))
    return previous, current


def overlap_error(i: Any, bound: float) -> Any:
    """|Σ (m + e)² − Σ m²| ≤ 2 ‖M‖ ‖E‖ + ‖E‖² of the leading i × i products, with ‖M‖² ≤ i and ‖E‖ ≤ i · bound."""
    return 2 * np.sqrt(i) * i * bound + (i * bound) ** 2


def run_on_host(
    program: Path, previous: list[Matrix], current: list[Matrix], tau: float, padding: int = 0
) -> Comparison:
    """The kernel's source through compare_bases_host.cpp; ``padding`` NaN columns beyond each matrix."""
    stream = np.int64(len(previous)).tobytes() + np.float64(tau).tobytes()
    for q, p in zip(previous, current, strict=True):
        rows, columns = q.shape
        stream += np.array([rows, columns, columns + padding, columns], np.int64).tobytes()
        padded = np.full((rows, columns + padding), np.nan, np.float32)
        padded[:, :columns] = q
        stream += padded.tobytes()[: 4 * (rows * (columns + padding) - padding)] + p.tobytes()
    output = subprocess.run([program], input=stream, stdout=subprocess.PIPE, check=True).stdout
    sites, width = len(previous), max(q.shape[1] for q in previous)
    numbers = np.frombuffer(output, np.float64, 3 * sites * width).reshape(3, sites, width)
    counts = np.frombuffer(output, np.int32, 2 * sites, numbers.nbytes).reshape(2, sites)
    return Comparison(*numbers, *counts)


@pytest.fixture(scope="module")
def host_program(compile_program: Callable[..., Path]) -> Path:
    return compile_program("tests/core/compare_bases_host.cpp")


def test_reference_is_the_definition() -> None:
    previous, current = bases(SHAPES)
    comparison = BasisComparison(SHAPES, 0.9, impl="reference")
    comparison.start(previous, current)
    result = comparison.result()
    for s, (q, p) in enumerate(zip(previous, current, strict=True)):
        rows, columns = q.shape
        bound = 2 * rows * np.finfo(np.float64).eps / 2  # of a dot product of unit vectors, there and here
        product = q.astype(np.float64).T @ p.astype(np.float64)
        for i in range(columns):
            cosine = abs(q[:, i].astype(np.float64) @ p[:, i].astype(np.float64))
            cosine /= np.linalg.norm(q[:, i].astype(np.float64)) * np.linalg.norm(p[:, i].astype(np.float64))
            assert abs(result.cosines[s, i] - cosine) <= 3 * bound
            overlap = np.sum(product[: i + 1, : i + 1] ** 2)
            assert abs(result.overlaps[s, i] - overlap) <= overlap_error(i + 1, bound)
        assert not result.cosines[s, columns:].any()
        assert not result.overlaps[s, columns:].any()
        small = [i for i in range(columns) if result.cosines[s, i] < 0.9]
        assert result.components_converged[s] == (small[0] if small else columns)
        passed = [i for i in range(1, columns + 1) if result.overlaps[s, i - 1] / i >= 0.9]
        assert result.subspace_converged[s] == max(passed, default=0)


@pytest.mark.parametrize("padding", [0, 5])
def test_kernel_source_is_as_accurate_as_float32_products(host_program: Path, padding: int) -> None:
    previous, current = bases(SHAPES)
    result = run_on_host(host_program, previous, current, 0.9, padding)
    exact = BasisComparison(SHAPES, 0.9, impl="reference")
    exact.start(previous, current)
    expected = exact.result()
    for s, (rows, columns) in enumerate(SHAPES):
        # The error of one float32 dot product, summed row by row as the kernel does: at most rows · ε / 2 · ‖q‖ ‖p‖.
        bound = rows * np.finfo(np.float32).eps / 2
        np.testing.assert_allclose(result.cosines[s], expected.cosines[s], rtol=0, atol=3 * bound)
        np.testing.assert_allclose(result.norms[s], expected.norms[s], rtol=0, atol=bound)
        i = np.arange(1, columns + 1)
        error = np.abs(result.overlaps[s, :columns] - expected.overlaps[s, :columns])
        assert (error <= overlap_error(i, bound)).all()
        assert not result.overlaps[s, columns:].any()
    np.testing.assert_array_equal(result.components_converged, expected.components_converged)
    np.testing.assert_array_equal(result.subspace_converged, expected.subspace_converged)


def test_kernel_source_equals_plain_float32_within_its_own_error(host_program: Path) -> None:
    previous, current = bases([(4096, 16)])
    result = run_on_host(host_program, previous, current, 0.9)
    exact = np.diagonal(previous[0].astype(np.float64).T @ current[0].astype(np.float64))
    scale = np.linalg.norm(previous[0].astype(np.float64), axis=0) * np.linalg.norm(
        current[0].astype(np.float64), axis=0
    )
    plain = np.zeros(16, np.float32)  # one float32 sum over all rows, without slices
    for q, p in zip(previous[0], current[0], strict=True):
        plain += q * p
    error = np.abs(result.cosines[0] - np.abs(exact) / scale).max()
    assert error <= 2 * np.abs(plain - exact).max()


def test_zero_columns_have_cosine_zero(host_program: Path) -> None:
    previous, current = bases([(50, 4)])
    current[0][:, 1] = 0.0
    previous[0][:, 3] = 0.0
    reference = BasisComparison([(50, 4)], impl="reference")
    reference.start(previous, current)
    for result in (reference.result(), run_on_host(host_program, previous, current, 0.99)):
        assert result.cosines[0, [1, 3]].tolist() == [0.0, 0.0]
        assert result.norms[0, 1] == 0.0


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="shapes: expected pairs of 1 or more rows and 1 to 512 columns"):
        BasisComparison([(4, 513)])
    with pytest.raises(ValueError, match="shapes"):
        BasisComparison([])
    with pytest.raises(ValueError, match="tau"):
        BasisComparison([(4, 2)], 2.0)
    with pytest.raises(ValueError, match="impl: expected 'auto', 'cuda' or 'reference', got 'core'"):
        BasisComparison([(4, 2)], impl="core")
    comparison = BasisComparison([(4, 2)], impl="reference")
    with pytest.raises(RuntimeError, match="result: expected a start before it"):
        comparison.result()
    with pytest.raises(ValueError, match=r"current: expected arrays of shapes \[\(4, 2\)\], got \[\(5, 2\)\]"):
        comparison.start([np.ones((4, 2))], [np.ones((5, 2))])


@pytest.mark.skipif(cuda_state().devices > 0, reason="there is a CUDA device")
def test_cuda_without_a_device_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"^impl='cuda': expected CUDA device 0, but cuda: (not |)(built|switched)"):
        BasisComparison([(4, 2)], impl="cuda")
    assert BasisComparison([(4, 2)]).impl == "reference"


def test_a_comparison_is_the_evidence_of_a_tracker() -> None:
    previous, current = bases([(64, 6), (64, 6)])
    comparison = BasisComparison([(64, 6), (64, 6)], 0.9, impl="reference")
    comparison.start(previous, current)
    seen = comparison.result()
    ratios = np.tile(0.5 ** np.arange(1, 7), (2, 1))
    for criterion, own in (("component", "components_converged"), ("subspace", "subspace_converged")):
        tracker = ConvergenceTracker([6, 6], budget=6, tau=0.9, criterion=criterion)
        tracker.update(seen.cosines, ratios, seen.overlaps)
        decision = tracker.update(seen.cosines, ratios, seen.overlaps)
        np.testing.assert_array_equal(decision.components_converged, getattr(seen, own))


@pytest.mark.gpu
@pytest.mark.skipif(not cuda_state().devices, reason=f"cuda: {cuda_state().summary}")
def test_cuda_equals_the_reference_and_repeats_its_bits() -> None:
    torch: Any = pytest.importorskip("torch")
    previous, current = bases(SHAPES)
    on_device = [[torch.from_numpy(basis).cuda() for basis in side] for side in (previous, current)]
    stream = torch.cuda.current_stream().cuda_stream
    results = []
    comparison = BasisComparison(SHAPES, 0.9, impl="cuda")
    for _ in range(3):
        comparison.start(*on_device, stream=stream)
        results.append(comparison.result())
    reference = BasisComparison(SHAPES, 0.9, impl="reference")
    reference.start(previous, current)
    expected = reference.result()
    bound = max(rows for rows, _ in SHAPES) * np.finfo(np.float32).eps / 2
    for result in results:
        np.testing.assert_array_equal(result.cosines, results[0].cosines)
        np.testing.assert_array_equal(result.overlaps, results[0].overlaps)
        np.testing.assert_allclose(result.cosines, expected.cosines, rtol=0, atol=3 * bound)
        np.testing.assert_array_equal(result.components_converged, expected.components_converged)
        np.testing.assert_array_equal(result.subspace_converged, expected.subspace_converged)
