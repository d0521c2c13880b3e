"""How far each layer has converged: refreshes of its inputs, made into evidence for the tracker."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eva_kernels.allocation import candidate_components
from eva_kernels.convergence import ConvergenceTracker, Decision
from eva_kernels.streaming_svd import Refreshed

from ..adapters import LoraSite
from ..config import EvaConfig
from ..planning import require_affordable, require_bounds
from .capture import Capture
from .inputs import DistinctInput
from .measurements import agreement

__all__ = ["LayerConvergence"]

Evidence = NDArray[np.float64]


class LayerConvergence:
    """The layers that the tracker follows, the latest refresh of each of their streams, and its last decision.

    Args:
        sites: The LoRA layers.
        config: Of the run.

    Attributes:
        members: Indices of the sites that the tracker follows: those that have data.
        candidates: (sites,) components that each site may be given.
        latest: Per stream, the evidence of its last refresh, (4, q) float64: cosines, overlaps, ratios, gains.
        standing: Per site, how far its components agree with those before and whether it has converged, as
            :class:`~eva_lora.planning.Trace` keeps them.

    Raises:
        ValueError: no allocation of ranks to these sites meets the config's bounds.
    """

    def __init__(self, sites: list[LoraSite], config: EvaConfig) -> None:
        self._sites, self._config = sites, config
        require_affordable(sites, config)
        self.members = list(range(len(sites)))
        self.candidates = self._candidates(self.members, None)
        self._make_tracker(self.members, [0] * len(sites))  # the widest sharing there is: demands fail here or never
        self.tracker: ConvergenceTracker | None = None
        self.decision: Decision | None = None
        self.latest: dict[int, Evidence] = {}
        self.standing: tuple[list[float | None], list[int]] = ([], [])

    @property
    def num_done(self) -> int:
        """Sites that have converged."""
        return int(self.decision.done.sum()) if self.decision else 0

    @property
    def all_done(self) -> bool:
        return self.decision is not None and bool(self.decision.all_done)

    def decide(self, capture: Capture, inputs: list[DistinctInput], refreshed: Sequence[Refreshed]) -> set[int]:
        """Take in a refresh of some inputs; returns the sites that have converged."""
        for entry, result in zip(inputs, refreshed, strict=True):
            evidence = np.stack([result.cosines, result.overlaps, result.explained_variance_ratio, result.gains])
            self.latest.update(dict.fromkeys(entry.streams, evidence))
        updated = {capture.site_of[stream] for entry in inputs for stream in entry.streams}
        streams = enumerate(capture.input_of)
        called = sorted({capture.site_of[stream] for stream, entry in streams if entry is not None})
        if self.tracker is None or called != self.members:
            # Which layers are called, and which share an input, is known only now; a layer that is called for the
            # first time in a later batch starts the count anew for all.
            self.members, self.tracker = called, self._make_tracker(called, _groups(capture, called))
            updated = {capture.site_of[stream] for stream in self.latest}
        together = np.zeros((4, len(called), int(self.candidates.max())))
        for row, site in enumerate(called):
            parts = [stream for stream in capture.streams_of[site] if stream in self.latest]
            for stream, weight in zip(parts, _weights(capture, parts), strict=True):
                own = self.latest[stream][:, : together.shape[2]]
                together[:, row, : own.shape[1]] += weight * own
        cosines, overlaps, ratios, gains = together
        mask = np.array([site in updated for site in called])
        self.decision = self.tracker.update(cosines, ratios, overlaps, gains, updated=mask)
        done = {site for site, is_done in zip(called, self.decision.done.tolist(), strict=True) if is_done}
        agreements: list[float | None] = [None] * len(self._sites)
        for row, (site, rank) in enumerate(zip(called, self.decision.ranks.tolist(), strict=True)):
            entries = [capture.input_of[stream] for stream in capture.streams_of[site]]
            if all(entry.statistic.num_refreshes > 1 for entry in entries if entry is not None):
                agreements[site] = agreement(cosines[row], overlaps[row], rank, self._config.convergence)
        self.standing = agreements, [int(site in done) for site in range(len(self._sites))]
        return done

    def state(self) -> dict[str, Any]:
        """All that the next decision depends on, for a checkpoint."""
        tracker = None if self.tracker is None else self.tracker.state_dict()
        return {"members": self.members, "latest": dict(self.latest), "tracker": tracker}

    def load_state_(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state`.

        Raises:
            ValueError: the state does not fit these sites.
        """
        members = state["members"]
        sites = range(len(self._sites))
        ascending = members == sorted(set(members) & set(sites)) and all(type(member) is int for member in members)
        if not members or not ascending:
            raise ValueError(f"expected an ascending list of layers out of {len(sites)}")
        latest = {int(stream): _checked(evidence) for stream, evidence in state["latest"].items()}
        tracker = decision = None
        if state["tracker"] is not None:
            tracker = self._make_tracker(members, [int(group) for group in state["tracker"]["groups"]])
            tracker.load_state_dict(state["tracker"])
            decision = tracker.decision()
        self.members, self.latest, self.tracker, self.decision = members, latest, tracker, decision

    def _candidates(self, members: list[int], groups: list[int] | None) -> np.ndarray[Any, Any]:
        """Components that each of some sites may be given, where labels of their inputs are known with what others of
        the same input raise that to."""
        sites, config = [self._sites[i] for i in members], self._config
        return candidate_components(
            [site.rank for site in sites], config.settled_rho,
            widths=[site.in_features for site in sites], groups=groups, rank_multiple=config.rank_multiple,
            divisors=[site.rank_multiple for site in sites],
        )  # fmt: skip

    def _make_tracker(self, members: list[int], groups: list[int]) -> ConvergenceTracker:
        """The tracker of some of the sites, given a label of each one's input."""
        config = self._config
        sites = [self._sites[i] for i in members]
        require_bounds(sites, self._candidates(members, groups).tolist(), config)
        return ConvergenceTracker(
            self.candidates[members], groups=groups, budget=sum(site.rank for site in sites), tau=config.tau,
            criterion=config.convergence, min_rank=config.least_rank(s.removable for s in sites),
            max_rank=config.max_rank,
            rank_multiple=config.rank_multiple, divisors=[site.rank_multiple for site in sites],
        )  # fmt: skip


def _checked(evidence: np.ndarray[Any, Any]) -> Evidence:
    fits = evidence.dtype == np.float64 and evidence.ndim == 2 and len(evidence) == 4
    if not (fits and np.isfinite(evidence).all()):
        raise ValueError(f"expected finite evidence (4, q) in float64, got {evidence.dtype} {evidence.shape}")
    return evidence


def _weights(capture: Capture, streams: list[int]) -> list[float]:
    """Each part's share of a site's rows: what its mean over parts is weighted with."""
    if len(streams) == 1:
        return [1.0]
    entries = [capture.input_of[stream] for stream in streams]
    rows = [entry.statistic.num_rows if entry is not None else 0 for entry in entries]
    return [count / max(1, sum(rows)) for count in rows]


def _groups(capture: Capture, members: list[int]) -> list[int]:
    """Per site, a label of its input, equal where sites share it; a site of several parts shares none."""
    index = {id(entry): i for i, entry in enumerate(capture.inputs)}
    streams = [capture.streams_of[site] for site in members]
    return [index[id(capture.input_of[parts[0]])] if len(parts) == 1 else len(index) + parts[0] for parts in streams]
