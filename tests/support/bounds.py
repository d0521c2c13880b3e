"""Bounds on rounding that hold on every processor: for any order of summation, with or without fused operations.

u is the unit roundoff. A sum of n products is off by at most gamma(n) = n u / (1 − n u) of the sum of their magnitudes
(Higham 2002, Accuracy and Stability of Numerical Algorithms, section 3.1). What else is here follows from that; the
derivations of what a basis promises stand in eva_kernels/orthonormal/README.md and eva_kernels/streaming_svd/README.md.
"""

import torch

from eva_kernels import Statistic
from eva_kernels._build import cpu_form

ROUNDING_FORMS = ("amx", "avx512bf16")  # of the compiled code for a CPU: they round operands to bfloat16
UNIT_ROUNDOFF = {dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.bfloat16, torch.float32, torch.float64)}


def gamma(n, dtype=torch.float32):
    u = UNIT_ROUNDOFF[dtype]
    assert n * u < 0.5, "the bound says nothing of so many summands"
    return n * u / (1 - n * u)


def likely(n, dtype=torch.float32):
    """As gamma(n), where roundings are independent: they come to √n u on average, and to sixteen times that never
    (Higham and Mary 2019, A New Approach to Probabilistic Rounding Error Analysis). For sums too long for gamma.
    """
    return 16 * n**0.5 * UNIT_ROUNDOFF[dtype]


def deviation(basis):
    """QᵀQ − I, worked out in float64."""
    basis = basis.double()
    return basis.mT @ basis - torch.eye(basis.shape[-1], dtype=torch.float64)


def orthonormality(d, q, dtype=torch.float32):
    """No entry of QᵀQ − I exceeds this after ``orthonormalize``, and so after ``finish_``."""
    rounding = 2 * UNIT_ROUNDOFF[dtype] if dtype == torch.float32 else 0
    return rounding + max(rounding / 2, 4 * (d + 8 * (q + 1)) * UNIT_ROUNDOFF[torch.float64])


def refreshed_orthonormality(statistic: Statistic, before):
    """No entry (i, j) of QᵀQ − I exceeds this one's after a refresh of the basis ``before``: (q, q).

    The scatter is of rows that the kernels may have rounded to bfloat16.
    """
    d, q = statistic.basis.shape
    roundings = 2 * (q**0.5 + 1) * (d + 3 * q + 4)
    share = 3 * torch.linalg.matrix_norm(deviation(before), 2) + gamma(roundings)
    scatter = statistic.total_scatter() * (1 + UNIT_ROUNDOFF[torch.bfloat16]) ** 2
    deviations = statistic.eigenvalues.sqrt()
    return (share * scatter / torch.outer(deviations, deviations)).clamp_min(orthonormality(d, q))


def product_rounding(impl, rows, d):
    """What share of the rows' scatter its sums may be off by, in spectral norm, from rows that are summed in float32.

    Some forms of the compiled kernel (of "auto") round three factors to bfloat16: rows, twice, and their projections.
    """
    rounds = impl == "auto" and cpu_form() in ROUNDING_FORMS
    return gamma(rows + d) + (3 * UNIT_ROUNDOFF[torch.bfloat16] if rounds else 0)


def captured_by(exact, rank, rounding):
    """What share of the variance within reach of ``rank`` directions the leading ones of a scatter hold at least, that
    is off from ``exact`` by ``rounding`` times the total.

    With P and P' the projectors, tr PC − tr P'C ≤ tr (P − P')(C − C') ≤ √(2 rank) ‖C − C'‖, as P' is the best for C'.
    """
    best = torch.linalg.eigvalsh(exact)[-rank:].sum()
    return 1 - float((2 * rank) ** 0.5 * rounding * torch.trace(exact) / best)


def require_same_directions(found, expected, values, off):
    """Rows (r, d) of both span the leading directions of two scatters, each at most ``off`` in norm from one whose
    eigenvalues are ``values``, from the largest: all or some more than r.

    Σ sin² of the angles is at most (2 ‖C − C'‖ / gap)² (Yu, Wang and Samworth 2015, theorem 2), with the gap below the
    r-th eigenvalue; the rest is of rows that are orthonormal to their own rounding.
    """
    rank, width = expected.shape
    assert found.shape == (rank, width)
    turned = 2 * (2 * off) / (values[rank - 1] - values[rank]) if 0 < rank < width else 0
    overlap = float((found.double() @ expected.double().T).square().sum())
    assert rank - overlap <= turned**2 + 2 * rank**2 * orthonormality(width, rank)


def require_as_near(found, plain, exact, rounding=0):
    """``found`` is off by at most twice what ``plain``, the plain computation in the same precision, is off by."""
    error, allowed = (float((value.double() - exact.double()).abs().max()) for value in (found, plain))
    assert error <= 2 * allowed + rounding, f"off by {error:.2e}, where {allowed:.2e} is plain PyTorch's error"


# What share of the variance within reach a layer's A captures at least: promises, not rounding, after the table in
# eva_kernels/streaming_svd/README.md. From an exact statistic all but less than the difference from which on an input
# counts as worse there, and from a summary on average no less than from PEFT's IncrementalPCA.
EXACT_CAPTURES = 1 - 1e-4
SUMMARY_CAPTURES = 1 - 1.5e-3
