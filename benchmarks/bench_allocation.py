"""Rank allocation under one budget, beside its NumPy twin, a sort of everything, and a loop over tensors."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bench_convergence import LayerLoop, Refreshes
from eva_kernels import allocate_ranks
from harness.paired import Candidate, Case
from shapes import MODELS


def sorted_whole(ratios: NDArray[np.float64], budget: int) -> NDArray[np.int64]:
    """Ranks from a stable sort of every ratio."""
    chosen = np.argsort(-ratios, axis=None, kind="stable")[:budget]
    return np.bincount(chosen // ratios.shape[1], minlength=len(ratios))


def variance_lost(ratios: NDArray[np.float64], ranks: NDArray[np.int64]) -> Mapping[str, float]:
    """1 − explained / the most that the same number of components can explain."""
    best = np.sort(ratios, axis=None)[::-1][: ranks.sum()].sum()
    taken = sum(row[:rank].sum() for row, rank in zip(ratios, ranks, strict=True))
    return {"variance": float(abs(1 - taken / best))}


@pytest.mark.parametrize("model", MODELS)
def bench_allocation(compare: Callable[..., Any], quick: bool, model: str) -> None:
    if quick and model != "MiniLM":
        pytest.skip("--quick")
    refreshes = Refreshes(MODELS[model].layers, 32)
    ratios, budget = refreshes.ratios, refreshes.budget
    candidates, loop = np.full(refreshes.sites, refreshes.columns), LayerLoop(refreshes)

    def allocated(impl: str) -> NDArray[np.int64]:
        return allocate_ranks(ratios, candidates, budget, impl=impl)

    compare(
        Case(
            "Rank allocation",
            f"{model}, {refreshes.sites} sites x {refreshes.columns} candidates",
            Candidate(lambda: allocated("auto"), lambda: variance_lost(ratios, allocated("auto"))),
            {
                "NumPy twin": Candidate(
                    lambda: allocated("reference"), lambda: variance_lost(ratios, allocated("reference"))
                ),
                "sort of everything": Candidate(
                    lambda: sorted_whole(ratios, budget), lambda: variance_lost(ratios, sorted_whole(ratios, budget))
                ),
                "loop over layers": Candidate(
                    loop.step, lambda: variance_lost(ratios, np.array(list(loop.step().values())))
                ),
            },
            nbytes=8.0 * ratios.size,
            facts={"model": model, "sites": refreshes.sites},
        )
    )
