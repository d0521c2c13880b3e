"""The compiled module, built from csrc/."""

import numpy as np
from numpy.typing import NDArray

from .convergence.reference import Verdict

cplusplus: int

def allocate_ranks(
    ratios: NDArray[np.float64],
    candidates: NDArray[np.int64],
    budget: int,
    groups: NDArray[np.int64] | None,
    min_rank: int,
    max_rank: int | None,
    rank_multiple: int,
    divisors: NDArray[np.int64] | None,
) -> NDArray[np.int64]: ...

class Tracker:
    def __init__(
        self,
        candidates: NDArray[np.int64],
        budget: int,
        groups: NDArray[np.int64] | None,
        min_rank: int,
        max_rank: int | None,
        rank_multiple: int,
        divisors: NDArray[np.int64] | None,
        tau: float,
        criterion: str,
    ) -> None: ...
    @property
    def sites(self) -> int: ...
    @property
    def columns(self) -> int: ...
    def update(
        self, evidence: NDArray[np.float64], ratios: NDArray[np.float64], updated: NDArray[np.bool_]
    ) -> Verdict: ...
    def decision(self) -> Verdict: ...
    def state(self) -> dict[str, NDArray[np.generic]]: ...
    def restore(
        self,
        ratios: NDArray[np.float64],
        streaks: NDArray[np.uint8],
        refreshes: NDArray[np.int64],
        latched: NDArray[np.int64],
    ) -> None: ...

# The rest is there only where the module was built with CUDA.

def cuda_devices() -> tuple[int, str]: ...  # how many, and why not where there is none
def cuda_versions() -> tuple[int, int]: ...  # of the runtime and the driver, 1000 · major + 10 · minor

class BasisComparison:
    def __init__(self, rows: NDArray[np.int64], columns: NDArray[np.int64], tau: float, device: int) -> None: ...
    def launch(
        self,
        previous: NDArray[np.uint64],
        previous_strides: NDArray[np.int64],
        current: NDArray[np.uint64],
        current_strides: NDArray[np.int64],
        stream: int,
    ) -> None: ...
    def ready(self) -> bool: ...
    def result(self) -> dict[str, NDArray[np.generic]]: ...
