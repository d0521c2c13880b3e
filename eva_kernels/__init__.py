"""Numerics of EVA: statistics of streams of rows, streaming SVD, rank allocation, convergence.

This package knows matrices and streams of rows. It knows no models, no LoRA and no loaders: those live
in :mod:`eva_lora`. Names are resolved on first use, so that importing the package imports neither torch
nor Triton, and the allocation and the convergence tracker work where neither is installed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eva_lora import eva_initialize

    from .allocation import allocate_ranks, candidate_components
    from .convergence import ConvergenceTracker, Decision
    from .gram import gram_accumulate_
    from .kernel_check import check_kernels
    from .low_rank_fit import LowRankFit, SecondMoment, fit_low_rank
    from .orthonormal import orthonormalize
    from .streaming_svd import GramStatistic, Statistic, SubspaceStatistic, refresh_
    from .subspace import subspace_accumulate_

__all__ = [
    "ConvergenceTracker",
    "Decision",
    "GramStatistic",
    "LowRankFit",
    "SecondMoment",
    "Statistic",
    "SubspaceStatistic",
    "allocate_ranks",
    "candidate_components",
    "check_kernels",
    "eva_initialize",
    "fit_low_rank",
    "gram_accumulate_",
    "orthonormalize",
    "refresh_",
    "subspace_accumulate_",
]

_HOME = {
    "ConvergenceTracker": "eva_kernels.convergence",
    "Decision": "eva_kernels.convergence",
    "GramStatistic": "eva_kernels.streaming_svd",
    "LowRankFit": "eva_kernels.low_rank_fit",
    "SecondMoment": "eva_kernels.low_rank_fit",
    "Statistic": "eva_kernels.streaming_svd",
    "SubspaceStatistic": "eva_kernels.streaming_svd",
    "allocate_ranks": "eva_kernels.allocation",
    "candidate_components": "eva_kernels.allocation",
    "check_kernels": "eva_kernels.kernel_check",
    "eva_initialize": "eva_lora",  # lives one layer up; found here because that is where people look
    "fit_low_rank": "eva_kernels.low_rank_fit",
    "gram_accumulate_": "eva_kernels.gram",
    "orthonormalize": "eva_kernels.orthonormal",
    "refresh_": "eva_kernels.streaming_svd",
    "subspace_accumulate_": "eva_kernels.subspace",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'eva_kernels' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
