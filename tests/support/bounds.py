"""Bounds on rounding that hold on every processor: for any order of summation, with or without fused operations.

u is the unit roundoff. A sum of n products is off by at most gamma(n) = n u / (1 − n u) of the sum of their magnitudes
(Higham 2002, Accuracy and Stability of Numerical Algorithms, section 3.1). What else is here follows from that; the
derivations of what a basis promises stand in eva_kernels/orthonormal/README.md and eva_kernels/streaming_svd/README.md.
"""

import torch

from eva_kernels import Statistic

UNIT_ROUNDOFF = {dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.bfloat16, torch.float32, torch.float64)}


def gamma(n, dtype=torch.float32):
    u = UNIT_ROUNDOFF[dtype]
    assert n * u < 0.5, "the bound says nothing of so many summands"
    return n * u / (1 - n * u)


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

    The compiled kernel ("auto", where a processor has it) rounds three factors to bfloat16: rows, twice, and their
    projections.
    """
    return gamma(rows + d) + (3 * UNIT_ROUNDOFF[torch.bfloat16] if impl == "auto" else 0)
