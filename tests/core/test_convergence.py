"""The convergence tracker against a site-by-site reading of its rules, and each rule on its own."""

import sys
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from eva_kernels._build import build_info, use_core
from eva_kernels.allocation import allocate_ranks
from eva_kernels.convergence import ConvergenceTracker, Decision

CORE_BUILT = build_info()["core"] == "built"
IMPLS = ["reference", "core"] if CORE_BUILT else ["reference"]
EVIDENCE = {"component": "cosines", "subspace": "overlaps", "captured": "gains"}

Matrix = NDArray[np.float64]


class PlainTracker:
    """The rules as the documentation words them, one site and one block at a time."""

    def __init__(self, candidates: list[int], budget: int, tau: float, criterion: str) -> None:
        self.candidates, self.budget, self.tau, self.criterion = candidates, budget, tau, criterion
        self.history: list[list[Matrix]] = [[] for _ in candidates]  # evidence from the second refresh on
        self.refreshes = [0] * len(candidates)
        self.ratios = np.zeros((len(candidates), max(candidates, default=0)))
        self.kept: list[int | None] = [None] * len(candidates)

    def passed(self, evidence: Matrix, i: int) -> bool:
        if self.criterion == "component":
            return all(abs(cosine) >= self.tau for cosine in evidence[:i])
        if self.criterion == "subspace":
            return evidence[i - 1] / i >= self.tau
        return evidence[i - 1] <= 1 - self.tau

    def converged(self, site: int, i: int) -> bool:
        needed = 3 if self.criterion == "captured" and self.tau > 0 else 1
        last = self.history[site][-needed:]
        return self.refreshes[site] >= 2 and (
            i == 0 or (len(last) == needed and all(self.passed(evidence, i) for evidence in last))
        )

    def update(self, evidence: Matrix, ratios: Matrix, updated: list[bool]) -> Decision:
        for site in np.flatnonzero(updated):
            if self.refreshes[site] > 0:
                self.history[site].append(evidence[site].copy())
            self.refreshes[site] += 1
            self.ratios[site] = ratios[site, : self.ratios.shape[1]]
        started = min(self.refreshes) > 0
        ranks = allocate_ranks(
            self.ratios if started else np.ones_like(self.ratios), self.candidates, self.budget, impl="reference"
        )
        blocks = [max(i for i in range(c + 1) if i == 0 or self.converged(s, i)) for s, c in enumerate(self.candidates)]
        reopened = []
        for site, rank in enumerate(ranks):
            kept = self.kept[site]
            if kept is not None:
                kept = max(kept, blocks[site])
                self.kept[site] = None if rank > kept else kept
            elif started and self.converged(site, rank):
                self.kept[site] = blocks[site]
            reopened.append(kept is not None and rank > kept)
        shown = [block if kept is None else kept for kept, block in zip(self.kept, blocks, strict=True)]
        done = [kept is not None for kept in self.kept]
        return Decision(ranks, np.array(shown), np.array(done), np.array(reopened))


def assert_same(one: Decision, other: Decision) -> None:
    for name in ("ranks", "components_converged", "done", "reopened"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sites=st.integers(1, 12),
    columns=st.integers(1, 10),
    criterion=st.sampled_from(list(EVIDENCE)),
    tau=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    partial=st.booleans(),
)
def test_follows_the_rules_over_random_streams(
    seed: int, sites: int, columns: int, criterion: str, tau: float, partial: bool
) -> None:
    rng = np.random.default_rng(seed)
    candidates = rng.integers(0, columns + 1, sites).tolist()
    budget = int(rng.integers(0, sum(candidates) + 1))
    plain = PlainTracker(candidates, budget, tau, criterion)
    trackers = [ConvergenceTracker(candidates, budget=budget, tau=tau, criterion=criterion, impl=i) for i in IMPLS]
    calm = rng.random()  # how often a block passes
    for step in range(12):
        passes = rng.random((sites, columns)) < calm
        cosines = np.where(passes, tau, tau - 0.1) * rng.choice([-1, 1], (sites, columns))
        arrays = {
            "cosines": cosines,
            "overlaps": np.where(passes, tau, tau - 0.1) * np.arange(1, columns + 1),
            "gains": np.where(passes, 1 - tau, 1.1 - tau),
        }
        ratios = -np.sort(-rng.integers(0, 8, (sites, columns)) / 8.0, axis=1)
        updated = rng.random(sites) < (0.7 if partial else 2.0)
        expected = plain.update(arrays[EVIDENCE[criterion]], ratios, updated.tolist())
        for tracker in trackers:
            assert_same(tracker.update(ratios=ratios, updated=updated, **arrays), expected)
        if step % 5 == 4:  # and through a saved state, from one implementation to the next
            states = [tracker.state_dict() for tracker in trackers]
            trackers = [
                ConvergenceTracker(candidates, budget=budget, tau=tau, criterion=criterion, impl=i) for i in IMPLS
            ]
            for tracker, state in zip(trackers, reversed(states), strict=True):
                tracker.load_state_dict(state)


def feed(tracker: ConvergenceTracker, cosines: Any, ratios: Any, **options: Any) -> Decision:
    return tracker.update(np.array(cosines), np.array(ratios), None, **options)


def test_nothing_is_done_at_a_first_update_and_cosines_are_not_read(impl: str) -> None:
    tracker = ConvergenceTracker([2, 2], budget=2, tau=0.0, impl=impl)
    nan = np.full((2, 2), np.nan)
    first = feed(tracker, nan, [[0.9, 0.8], [0.1, 0.05]])
    assert first.ranks.tolist() == [2, 0]
    assert not first.done.any()
    assert feed(tracker, np.zeros((2, 2)), [[0.9, 0.8], [0.1, 0.05]]).all_done


@pytest.mark.parametrize("criterion", list(EVIDENCE))
def test_tau_zero_stops_at_the_second_update(impl: str, criterion: str) -> None:
    tracker = ConvergenceTracker([3], budget=3, tau=0.0, criterion=criterion, impl=impl)
    worst = {"cosines": np.zeros((1, 3)), "overlaps": np.zeros((1, 3)), "gains": np.ones((1, 3))}
    assert not tracker.update(ratios=np.ones((1, 3)), **worst).all_done
    assert tracker.update(ratios=np.ones((1, 3)), **worst).all_done


def test_rank_zero_is_done_after_the_second_update(impl: str) -> None:
    tracker = ConvergenceTracker([2, 2], budget=2, impl=impl)
    ratios = [[0.9, 0.8], [0.1, 0.05]]
    assert feed(tracker, np.zeros((2, 2)), ratios).done.tolist() == [False, False]
    second = feed(tracker, np.zeros((2, 2)), ratios)
    assert second.ranks.tolist() == [2, 0]
    assert second.done.tolist() == [False, True]


def test_flipped_signs_count_as_converged(impl: str) -> None:
    tracker = ConvergenceTracker([2], budget=2, impl=impl)
    feed(tracker, np.zeros((1, 2)), [[0.5, 0.25]])
    assert feed(tracker, [[-1.0, 1.0]], [[0.5, 0.25]]).all_done


def test_done_latches_and_reopens_only_beyond_what_had_converged(impl: str) -> None:
    tracker = ConvergenceTracker([4, 4], budget=4, impl=impl)
    even = [[0.4, 0.3, 0.1, 0.0], [0.4, 0.3, 0.1, 0.0]]
    three, none, one = [1.0, 1.0, 1.0, 0.0], [0.0] * 4, [1.0, 0.0, 0.0, 0.0]
    feed(tracker, [none, none], even)
    assert feed(tracker, [three, none], even).done.tolist() == [True, False]
    latched = feed(tracker, [none, none], even)  # its cosines fall: it stays done
    assert latched.done.tolist() == [True, False]
    assert latched.components_converged.tolist() == [3, 0]
    grown = feed(tracker, [none, one], [[0.4, 0.35, 0.33, 0.0], [0.4, 0.3, 0.1, 0.0]])
    assert grown.ranks.tolist() == [3, 1]  # three had converged
    assert grown.done.tolist() == [True, True]
    reopened = feed(tracker, [none, one], [[0.4, 0.35, 0.33, 0.3], [0.1, 0.0, 0.0, 0.0]])
    assert reopened.ranks.tolist() == [4, 0]
    assert reopened.reopened.tolist() == [True, False]
    assert reopened.done.tolist() == [False, True]
    assert not reopened.all_done


def test_subspace_ignores_rotations_inside_the_needed_block(impl: str) -> None:
    tracker = ConvergenceTracker([3], budget=2, criterion="subspace", impl=impl)
    ratios = np.array([[0.5, 0.3, 0.1]])
    swapped = np.array([[0.0, 2.0, 2.0]])  # the first two components changed places, the third was lost
    tracker.update(None, ratios, swapped)
    decision = tracker.update(None, ratios, swapped)
    assert decision.all_done
    assert decision.components_converged.tolist() == [2]


def test_captured_needs_three_small_gains_in_a_row(impl: str) -> None:
    tracker = ConvergenceTracker([1], budget=1, criterion="captured", impl=impl)
    gains = [0.0, 0.01, 0.005, 0.02, 0.0, -0.001, 0.01]  # the first is no comparison, the fourth breaks the row
    done = [tracker.update(None, [[0.5]], None, [[gain]]).all_done for gain in gains]
    assert done == [False] * 6 + [True]


def test_sites_that_were_not_updated_keep_their_last_values(impl: str) -> None:
    tracker = ConvergenceTracker([2, 2], budget=2, impl=impl)
    first = feed(tracker, np.zeros((2, 2)), [[0.9, 0.8], [np.nan, np.nan]], updated=[True, False])
    assert first.ranks.tolist() == [1, 1]  # the budget is even until all sites have ratios
    feed(tracker, np.full((2, 2), np.nan), [[np.nan, np.nan], [0.7, 0.1]], updated=[False, True])
    second = feed(tracker, [[np.nan, np.nan], [1.0, 1.0]], [[np.nan] * 2, [0.7, 0.1]], updated=[False, True])
    assert second.ranks.tolist() == [2, 0]
    assert second.done.tolist() == [False, True]  # one refresh of the first site compares nothing


def test_ranks_follow_the_bounds_of_the_allocation(impl: str) -> None:
    options: dict[str, Any] = {"min_rank": 2, "max_rank": 6, "rank_multiple": 2, "divisors": [1, 4, 1]}
    ratios = -np.sort(-np.random.default_rng(0).random((3, 8)), axis=1)
    tracker = ConvergenceTracker([8, 8, 8], budget=12, groups=[0, 0, 1], impl=impl, **options)
    expected = allocate_ranks(ratios, [8, 8, 8], 12, groups=[0, 0, 1], **options)
    assert feed(tracker, np.zeros((3, 8)), ratios).ranks.tolist() == expected.tolist()


def test_a_refused_update_changes_nothing(impl: str) -> None:
    tracker = ConvergenceTracker([2, 2], budget=2, impl=impl)
    feed(tracker, np.zeros((2, 2)), [[0.5, 0.3], [0.4, 0.2]])
    before = tracker.state_dict()
    with pytest.raises(ValueError, match="cosines: expected finite numbers, got nan at site 1, component 0"):
        feed(tracker, [[1.0, 1.0], [np.nan, 1.0]], [[0.6, 0.3], [0.4, 0.2]])
    with pytest.raises(ValueError, match="ratios: expected finite numbers, got inf at site 0, component 1"):
        feed(tracker, np.ones((2, 2)), [[0.6, np.inf], [0.4, 0.2]])
    after = tracker.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(value, after[name], err_msg=name)


def test_a_state_of_other_settings_or_shape_is_refused(impl: str) -> None:
    state = ConvergenceTracker([2, 2], budget=2, impl=impl).state_dict()
    with pytest.raises(ValueError, match="state: expected budget 3, got 2"):
        ConvergenceTracker([2, 2], budget=3, impl=impl).load_state_dict(state)
    with pytest.raises(ValueError, match="state: expected groups"):
        ConvergenceTracker([2, 2], budget=2, groups=[0, 0], impl=impl).load_state_dict(state)
    tracker = ConvergenceTracker([2, 2], budget=2, impl=impl)
    with pytest.raises(ValueError, match="state: expected an entry 'streaks'"):
        tracker.load_state_dict({name: value for name, value in state.items() if name != "streaks"})
    with pytest.raises(ValueError, match=r"state: expected ratios of shape \(2, 2\), got \(2, 3\)"):
        tracker.load_state_dict({**state, "ratios": np.zeros((2, 3))})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"criterion": "cosine"}, "criterion: expected one of .*'component'.*, got 'cosine'"),
        ({"tau": 1.5}, "tau: expected a number from 0 to 1, got 1.5"),
        ({"tau": np.nan}, "tau: expected a number from 0 to 1, got nan"),
        ({"min_rank": 3}, "min_rank: expected at most"),
    ],
)
def test_bad_settings_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvergenceTracker(**{"candidates": [2], "budget": 2, **arguments})


def test_bad_updates_are_named(impl: str) -> None:
    tracker = ConvergenceTracker([2, 2], budget=2, impl=impl)
    good = np.ones((2, 2))
    with pytest.raises(TypeError, match="cosines: expected an array for criterion 'component', got None"):
        tracker.update(None, good, good)
    with pytest.raises(ValueError, match="cosines: expected at least 2 columns"):
        tracker.update(good[:, :1], good, good)
    with pytest.raises(ValueError, match=r"ratios: expected shape \(2, k\), got \(3, 2\)"):
        tracker.update(good, np.ones((3, 2)), good)
    with pytest.raises(TypeError, match="updated: expected booleans, got int64"):
        tracker.update(good, good, good, updated=[1, 0])
    with pytest.raises(ValueError, match=r"updated: expected shape \(2,\), got \(1,\)"):
        tracker.update(good, good, good, updated=[True])


@pytest.mark.skipif(not CORE_BUILT, reason="eva_kernels._core is not built")
def test_the_gil_is_released_during_an_update() -> None:
    sites, columns = 4000, 256
    tracker = use_core("core").Tracker(
        np.full(sites, columns), sites * 16, None, 0, None, 1, None, tau=0.99, criterion="component"
    )
    numbers, everywhere = np.ones((sites, columns)), np.ones(sites, np.bool_)
    entered, seen, returned = threading.Event(), False, False

    def work() -> None:
        nonlocal returned
        entered.set()
        for _ in range(300):  # however late the system wakes the other thread, one of them meets it
            tracker.update(numbers, numbers, everywhere)
            if seen:
                break
        returned = True

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)  # so that the worker loses the GIL only by giving it away
    try:
        worker = threading.Thread(target=work)
        worker.start()
        entered.wait()
        ran_beside, seen = not returned, True
        worker.join()
    finally:
        sys.setswitchinterval(interval)
    assert ran_beside
