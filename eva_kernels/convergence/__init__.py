"""Which components have converged, what ranks follow and which sites are done, over all sites at once."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._build import use_core
from ..allocation.demands import Demands, matrix
from .bases import MAX_COLUMNS, BasisComparison, Comparison
from .reference import EVIDENCE, ReferenceTracker, Verdict

__all__ = ["MAX_COLUMNS", "BasisComparison", "Comparison", "ConvergenceTracker", "Decision"]


@dataclass(frozen=True)
class Decision:
    """The standing after an update, one entry per site."""

    ranks: NDArray[np.int64]  # (sites,) as the budget falls now
    components_converged: NDArray[np.int64]  # (sites,) the largest leading block that has converged
    done: NDArray[np.bool_]  # (sites,) needs no further data
    reopened: NDArray[np.bool_]  # (sites,) was done until this update

    @property
    def all_done(self) -> bool:
        """Whether no site needs further data."""
        return bool(self.done.all())


class ConvergenceTracker:
    """Takes what each refresh of the sites' bases shows, and says what is done.

    A leading block of i components passes a refresh when, compared with the site's refresh before,

    - ``"component"``: each of its components has ``|cosine|`` ≥ tau (arXiv 2410.07170, with the sign ignored);
    - ``"subspace"``: ‖(QᵀQ′)₁..ᵢ‖²_F / i ≥ tau, which a rotation inside the block does not change;
    - ``"captured"``: its relative gain of captured variance is ≤ 1 − tau.

    It has converged when it passed the last refresh ("captured": the last three). Ranks follow
    :func:`eva_kernels.allocation.allocate_ranks` from the latest ratios of all sites, as soon as every site
    has some; until then the budget is spread evenly and no site is done.
    A site is done when the block of its rank has converged; rank 0 is done at the second refresh, and so is
    every rank if tau is 0. Done stays done, whatever later refreshes show, until the rank grows past the
    largest block that had converged at any time while the site was done: then the site reopens.

    The compiled tracker releases the GIL and may be called from several threads.

    Args:
        candidates: (sites,) int, see :func:`eva_kernels.allocation.candidate_components`.
        tau: in [0, 1], without unit.
        budget, groups, min_rank, max_rank, rank_multiple, divisors, impl: as in ``allocate_ranks``.

    Raises:
        ValueError, TypeError, RuntimeError: as ``allocate_ranks``; ValueError for an unknown criterion or a
            tau outside [0, 1].
    """

    def __init__(
        self,
        candidates: ArrayLike,
        *,
        budget: int,
        groups: ArrayLike | None = None,
        tau: float = 0.99,
        criterion: str = "component",
        min_rank: int = 0,
        max_rank: int | None = None,
        rank_multiple: int = 1,
        divisors: ArrayLike | None = None,
        impl: str = "auto",
    ) -> None:
        if criterion not in EVIDENCE:
            raise ValueError(f"criterion: expected one of {tuple(EVIDENCE)}, got {criterion!r}")
        if not 0.0 <= tau <= 1.0:
            raise ValueError(f"tau: expected a number from 0 to 1, got {tau}")
        demands = Demands.checked(candidates, budget, groups, min_rank, max_rank, rank_multiple, divisors)
        self._settings: dict[str, Any] = {**vars(demands), "tau": float(tau), "criterion": criterion}
        core = use_core(impl)
        self._tracker = (ReferenceTracker if core is None else core.Tracker)(**self._settings)

    def update(
        self,
        cosines: ArrayLike | None,  # (sites, k) of each component with its predecessor
        ratios: ArrayLike,  # (sites, k) explained-variance ratios
        overlaps: ArrayLike | None,  # (sites, k) ‖(QᵀQ′)₁..ᵢ‖²_F in column i − 1
        gains: ArrayLike | None = None,  # (sites, k) relative gain of the leading i in column i − 1
        *,
        updated: ArrayLike | None = None,  # (sites,) bool
    ) -> Decision:
        """Fold in one refresh of the sites marked in ``updated`` (all if None) and decide.

        Of cosines, overlaps and gains only the criterion's own is read; the others may be None. What is read
        has at least as many columns as the largest rank a site may take, and is finite; rows of sites not
        updated, columns beyond a site's candidates, and all but the ratios at a site's first refresh are not
        read at all.

        Raises:
            ValueError: shapes that do not fit, or a number that is not finite. The tracker is unchanged.
            TypeError: an array of another type, or the criterion's own array missing.
        """
        sites = self._tracker.sites
        given = {"cosines": cosines, "overlaps": overlaps, "gains": gains}
        name = EVIDENCE[self._settings["criterion"]]
        evidence = given[name]
        if evidence is None:
            raise TypeError(f"{name}: expected an array for criterion {self._settings['criterion']!r}, got None")
        flags = np.ones(sites, np.bool_) if updated is None else np.asarray(updated)
        if flags.dtype != np.bool_:
            raise TypeError(f"updated: expected booleans, got {flags.dtype}")
        if flags.shape != (sites,):
            raise ValueError(f"updated: expected shape ({sites},), got {flags.shape}")
        return _decision(
            self._tracker.update(
                self._columns(name, evidence), self._columns("ratios", ratios), np.ascontiguousarray(flags)
            )
        )

    def _columns(self, name: str, values: ArrayLike) -> NDArray[np.float64]:
        array = matrix(name, values, self._tracker.sites)
        if array.shape[1] < self._tracker.columns:
            raise ValueError(
                f"{name}: expected at least {self._tracker.columns} columns, the most a site may take, "
                f"got {array.shape[1]}"
            )
        return array

    def decision(self) -> Decision:
        """The standing without new evidence, for instance after :meth:`load_state_dict`."""
        return _decision(self._tracker.decision())

    def state_dict(self) -> dict[str, Any]:
        """Arrays and scalars from which :meth:`load_state_dict` goes on, with any ``impl``."""
        settings = {name: value for name, value in self._settings.items() if value is not None}
        return {**settings, **self._tracker.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``.

        Raises:
            ValueError: an entry is missing, has another shape, or was made under other settings than this
                tracker's.
        """
        for name, ours in self._settings.items():
            theirs: Any = state.get(name)
            if (ours is None) != (theirs is None) or not np.array_equal(ours, theirs):
                raise ValueError(f"state: expected {name} {ours}, got {theirs}")
        restored = {}
        for name, ours in self._tracker.state().items():
            if name not in state:
                raise ValueError(f"state: expected an entry {name!r}, got only {sorted(state)}")
            theirs = np.asarray(state[name])
            if theirs.shape != ours.shape:
                raise ValueError(f"state: expected {name} of shape {ours.shape}, got {theirs.shape}")
            restored[name] = np.ascontiguousarray(theirs, ours.dtype)
        self._tracker.restore(**restored)


def _decision(verdict: Verdict) -> Decision:
    return Decision(*verdict)
