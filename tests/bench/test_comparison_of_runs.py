"""A slowdown beyond noise is flagged, noise is not, and runs that cannot be compared are not."""

import copy

import numpy as np
import pytest

from harness.paired import summary
from harness.regression import changes
from support.benchmark_results import MACHINE, entry, results_of


def run_with(random, slowdown=1.0, noise=0.08, rounds=20, cases=30):
    """A run of which every round's ratio of the forward to ours is noisy: lognormal."""
    entries = []
    for number in range(cases):
        one = entry(case=f"case {number}")
        rounds_of_forward = 2.0 / slowdown * np.exp(noise * random.normal(size=rounds))
        one["ratio"]["forward"] = summary(list(rounds_of_forward))
        entries.append(one)
    return results_of(*entries)


@pytest.mark.parametrize("seed", range(5))
def test_a_planted_slowdown_of_a_fifth_is_flagged_and_noise_is_not(seed):
    random = np.random.default_rng(seed)
    before = run_with(random)
    assert {change.verdict for change in changes(run_with(random), before)} == {"same"}
    slower = changes(run_with(random, slowdown=1.25), before)
    assert sum(change.verdict == "slower" for change in slower) >= 0.9 * len(slower)
    faster = changes(run_with(random, slowdown=1 / 1.25), before)
    assert sum(change.verdict == "faster" for change in faster) >= 0.9 * len(faster)


@pytest.mark.parametrize("seed", range(5))
def test_exactly_a_fifth_is_flagged_where_rounds_agree(seed):
    random = np.random.default_rng(seed)
    before = run_with(random, noise=0.02)
    assert {change.verdict for change in changes(run_with(random, slowdown=1.2, noise=0.02), before)} == {"slower"}


def test_a_slow_machine_is_no_regression():
    """All times doubled, ours and the forward's: nothing changed."""
    before = results_of(entry(ours=1e-3))
    after = results_of(entry(ours=2e-3))
    (change,) = changes(after, before)
    assert (change.factor, change.verdict) == (pytest.approx(1), "same")


def test_wide_spread_hides_a_change_that_narrow_spread_shows():
    before, after = entry(forward=0.5), entry(forward=0.7)
    assert changes(results_of(after), results_of(before))[0].verdict == "slower"
    for one in (before, after):
        one["ratio"]["forward"]["error"] = 0.2
    assert changes(results_of(after), results_of(before))[0].verdict == "same"


@pytest.mark.parametrize(("name", "value"), [("device", "Another"), ("threads", 1)])
def test_other_machines_are_not_compared(name, value):
    machine = copy.deepcopy(MACHINE)
    machine["cpu"][name] = value
    assert changes(results_of(entry(forward=0.9)), results_of(entry(), machine=machine)) == []


def test_a_quick_run_is_no_measure_of_another():
    assert changes(results_of(entry()), results_of(entry(), quick=True)) == []


def test_new_cases_are_left_out():
    assert len(changes(results_of(entry(), entry(case="new")), results_of(entry()))) == 1
