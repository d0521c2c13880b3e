"""Eigenproblems: the small ones of a refresh, and whole refreshes of all inputs of a model."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from eva_kernels import Statistic, SubspaceStatistic, refresh_
from eva_kernels.symmetric_eigen import leading_eigen, symmetric_eigen
from harness.paired import Candidate, Case
from rows import power_law
from shapes import MODELS

ROWS = 256
COLUMNS = 80
BLOCKS = 6  # of the model: a refresh costs the same in each


def residual(matrix: Tensor, values: Tensor, vectors: Tensor) -> Mapping[str, float]:
    """Largest entry of A V − V Λ over that of A."""
    left = matrix @ vectors.to(matrix)
    return {"residual": float((left - vectors.to(matrix) * values.to(matrix)[:, None, :]).abs().max() / matrix.max())}


@pytest.mark.parametrize("k", [32, 80, 192])
def bench_eigen(compare: Callable[..., Any], device: str, quick: bool, k: int) -> None:
    """A batch of k x k float64, the small algebra of one refresh of all narrow inputs of a model."""
    count = 4 if quick else 3 * MODELS["SmolLM2-135M"].blocks
    root = torch.randn(count, 2 * k, k, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    matrix = root.mT @ root
    arrays = matrix.cpu().numpy()

    def kernel() -> Any:  # which "auto" takes or not, by size and version
        return symmetric_eigen(matrix, impl="triton")

    on_a_gpu = {"our kernel": Candidate(kernel, lambda: residual(matrix, *kernel()))} if device != "cpu" else {}
    compare(
        Case(
            "Eigenproblems",
            f"{count} of {k} x {k}, float64",
            Candidate(lambda: symmetric_eigen(matrix), lambda: residual(matrix, *symmetric_eigen(matrix))),
            {
                **on_a_gpu,
                "torch.linalg.eigh": Candidate(
                    lambda: torch.linalg.eigh(matrix), lambda: residual(matrix, *torch.linalg.eigh(matrix))
                ),
                "numpy.linalg.eigh": Candidate(
                    lambda: np.linalg.eigh(arrays),
                    lambda: residual(matrix, *map(torch.from_numpy, np.linalg.eigh(arrays))),
                ),
            },
            dtype=torch.float32,
            facts={"matrices": count, "k": k},
        ),
        device,
    )


@pytest.mark.parametrize(("k", "count"), [(64, 16), (112, 17), (144, 17)])
def bench_leading_eigen(compare: Callable[..., Any], device: str, k: int, count: int) -> None:
    """The leading ones of one k x k float32, a Rayleigh-Ritz step of one weight's singular vectors."""
    root = torch.randn(2 * k, k, generator=torch.Generator().manual_seed(0)).to(device)
    matrix = (root.mT @ root)[None]

    def ours() -> tuple[Tensor, Tensor]:
        return leading_eigen(matrix, count)

    compare(
        Case(
            "Eigenproblems",
            f"{count} of {k} x {k}, float32",
            Candidate(ours, lambda: residual(matrix, *ours())),
            {
                "torch.linalg.eigh": Candidate(
                    lambda: torch.linalg.eigh(matrix), lambda: residual(matrix, *torch.linalg.eigh(matrix))
                )
            },
            facts={"k": k, "count": count},
        ),
        device,
    )


@pytest.mark.parametrize("model", ["MiniLM", "SmolLM2-135M", "Qwen2.5-0.5B"])
def bench_refresh(compare: Callable[..., Any], device: str, quick: bool, model: str) -> None:
    """One refresh of all inputs of a few blocks. Each call begins with a copy of the state, which is part of it."""
    blocks = 1 if quick else BLOCKS
    statistics: list[Statistic] = []
    for entry in MODELS[model].inputs * blocks:
        statistics.append(SubspaceStatistic(entry.width, COLUMNS, device=device, seed=len(statistics)))
        statistics[-1].accumulate_(power_law(ROWS, entry.width, seed=len(statistics)).to(device))

    def ours() -> None:
        refresh_([statistic.clone() for statistic in statistics])

    def one_by_one() -> None:
        for statistic in statistics:
            refresh_([statistic.clone()])

    compare(
        Case(
            "Refresh",
            f"{model}, {len(statistics)} inputs of {blocks} blocks, q = {COLUMNS}",
            Candidate(ours),
            {"input by input": Candidate(one_by_one)},
            facts={"model": model, "inputs": len(statistics)},
        ),
        device,
    )
