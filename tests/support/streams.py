"""Streams of rows with a known spectrum, and what a statistic misses of them."""

import torch

from eva_kernels import GramStatistic, SubspaceStatistic, refresh_

# What the subspace statistic may miss of the variance after twelve batches and more, q = 3 r: the project's bars, which
# the table in eva_kernels/streaming_svd/README.md meets with room for other data.
MISSED_AT_R, MISSED_AT_2R = 2e-4, 1e-3

KINDS = [GramStatistic, SubspaceStatistic]
EXACTLY = {"impl": "reference"}  # where a test is about arithmetic, not about which kernel this processor has


def stream(num_batches, rows, d, *, decay=1.0, mean=0.0, seed=0):
    """Batches whose covariance has eigenvalues i^-decay in a random rotation."""
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator)).Q
    scales = torch.arange(1, d + 1, dtype=torch.float64) ** (-decay / 2)
    offset = mean * torch.randn(d, dtype=torch.float64, generator=generator)
    return [
        ((torch.randn(rows, d, dtype=torch.float64, generator=generator) * scales) @ rotation.T + offset).float()
        for _ in range(num_batches)
    ]


def run(kind, batches, q, **options):
    statistic = kind(batches[0].shape[-1], q, **options)
    for batch in batches:
        statistic.accumulate_(batch)
        refresh_([statistic])
    statistic.finish_()
    return statistic


def scatter(batches):
    rows = torch.cat(batches).double()
    rows = rows - rows.mean(0)
    return rows.T @ rows


def loss(statistic, exact, r):
    """1 − captured variance / optimum of the leading r components."""
    basis = statistic.basis[:, :r].double()
    best = torch.linalg.eigvalsh(exact)[-r:].sum()
    return 1 - float(torch.trace(basis.T @ exact @ basis) / best)
