"""The convergence rules in NumPy: the specification that the compiled module must equal."""

import numpy as np
from numpy.typing import NDArray

from ..allocation.demands import Demands
from ..allocation.reference import ReferenceAllocator, require_finite

EVIDENCE = {"component": "cosines", "subspace": "overlaps", "captured": "gains"}

Verdict = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]


class ReferenceTracker:
    """Same constructor, methods and results as ``eva_kernels._core.Tracker``, except for thread safety."""

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
    ) -> None:
        self._allocator = ReferenceAllocator(
            Demands(candidates, budget, groups, min_rank, max_rank, rank_multiple, divisors)
        )
        self.sites, self.columns = candidates.size, self._allocator.columns
        self._tau, self._criterion = tau, criterion
        # One small gain can be luck of the batch, three in a row are not; tau = 0 asks for nothing at all.
        self._needed = 3 if criterion == "captured" and tau > 0 else 1
        self._blocks = np.arange(1, self.columns + 1)
        self._read = self._blocks <= self._allocator.upper[:, None]
        # Equal ratios everywhere: the tie rule then fills the sites level by level.
        self._uniform = self._allocator.allocate(np.ones((self.sites, self.columns)))
        self._ratios = np.zeros((self.sites, self.columns))
        self._streaks = np.zeros((self.sites, self.columns), np.uint8)
        self._refreshes = np.zeros(self.sites, np.int64)
        self._latched = np.full(self.sites, -1)

    def update(
        self,
        evidence: NDArray[np.float64],  # (sites, ≥ columns)
        ratios: NDArray[np.float64],  # (sites, ≥ columns)
        updated: NDArray[np.bool_],  # (sites,)
    ) -> Verdict:
        evidence, ratios = evidence[:, : self.columns], ratios[:, : self.columns]
        compared = updated & (self._refreshes > 0)
        require_finite("ratios", ratios, self._read & updated[:, None])
        require_finite(EVIDENCE[self._criterion], evidence, self._read & compared[:, None])

        self._ratios[updated] = np.where(self._read, ratios, 0.0)[updated]
        self._refreshes[updated] += 1
        passed = self._passes(evidence[compared]) & self._read[compared]
        self._streaks[compared] = np.where(passed, np.minimum(self._streaks[compared] + 1, self._needed), 0)
        return self.decision()

    def _passes(self, evidence: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Whether each leading block of components passed at this refresh."""
        if self._criterion == "component":  # a block has converged when each of its components has
            return np.logical_and.accumulate(np.abs(evidence) >= self._tau, axis=1)
        if self._criterion == "subspace":
            return evidence / self._blocks >= self._tau
        return evidence <= 1.0 - self._tau

    def decision(self) -> Verdict:
        started = bool((self._refreshes > 0).all())
        ranks = self._allocator.allocate(self._ratios) if started else self._uniform.copy()
        # A leading block of no components is the same at every refresh: a second one settles it.
        twice = self._refreshes >= 2
        settled = np.column_stack([twice, (self._streaks >= self._needed) & twice[:, None]])
        converged = np.where(settled, np.arange(self.columns + 1), 0).max(axis=1)

        was_done = self._latched >= 0
        self._latched = np.where(was_done, np.maximum(self._latched, converged), -1)
        reopened = was_done & (ranks > self._latched)
        self._latched[reopened] = -1
        newly = ~was_done & started & settled[np.arange(self.sites), ranks]
        self._latched[newly] = converged[newly]
        return ranks, np.maximum(self._latched, converged), self._latched >= 0, reopened

    def state(self) -> dict[str, NDArray[np.generic]]:
        return {
            "ratios": self._ratios.copy(),
            "streaks": self._streaks.copy(),
            "refreshes": self._refreshes.copy(),
            "latched": self._latched.copy(),
        }

    def restore(
        self,
        ratios: NDArray[np.float64],
        streaks: NDArray[np.uint8],
        refreshes: NDArray[np.int64],
        latched: NDArray[np.int64],
    ) -> None:
        self._ratios, self._streaks = ratios.copy(), streaks.copy()
        self._refreshes, self._latched = refreshes.copy(), latched.copy()
