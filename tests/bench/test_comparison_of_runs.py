"""A slowdown beyond noise is flagged, noise is not, and runs that cannot be compared are not."""

import copy

import numpy as np
import pytest

from harness.paired import summary
from harness.regression import changes
from support.benchmark_results import MACHINE, entry, results_of


def run_with(random, slowdown=1.0, noise=0.04, rounds=20, cases=30):
    """A run of which every round's ratio of the forward to ours is noisy: lognormal."""
    entries = []
    for number in range(cases):
        one = entry(case=f"case {number}")
        one["ratio"]["forward"] = summary(list(2.0 / slowdown * np.exp(noise * random.normal(size=rounds))))
        entries.append(one)
    return results_of(*entries)


def verdicts(now, before):
    found = [change.verdict for change in changes(now, before)]
    return {verdict: found.count(verdict) / len(found) for verdict in found}


@pytest.mark.parametrize("noise", [0.01, 0.04])
@pytest.mark.parametrize("seed", range(5))
def test_a_planted_slowdown_of_a_fifth_is_flagged(seed, noise):
    random = np.random.default_rng(seed)
    before = run_with(random, noise=noise)
    assert verdicts(run_with(random, slowdown=1.2, noise=noise), before)["slower"] >= 0.9
    assert verdicts(run_with(random, slowdown=1 / 1.2, noise=noise), before)["faster"] >= 0.9


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("seed", range(5))
def test_noise_is_not_flagged(seed, noise):
    random = np.random.default_rng(seed)
    assert verdicts(run_with(random, noise=noise), run_with(random, noise=noise)) == {"same": 1.0}


@pytest.mark.parametrize("seed", range(5))
def test_a_load_that_lasts_the_whole_run_is_not_flagged_where_rounds_spread(seed):
    """Everything of one run is a third slower beside its measure, within what single rounds vary by."""
    random = np.random.default_rng(seed)
    assert verdicts(run_with(random, slowdown=1.33, noise=0.4), run_with(random, noise=0.4)) == {"same": 1.0}


def test_few_rounds_need_more():
    random = np.random.default_rng(0)
    before = run_with(random, noise=0.01, rounds=3)
    assert verdicts(run_with(random, slowdown=1.2, noise=0.01, rounds=3), before) == {"same": 1.0}
    assert verdicts(run_with(random, slowdown=1.5, noise=0.01, rounds=3), before) == {"slower": 1.0}


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
        one["ratio"]["forward"] |= {"p10": 0.7 * one["ratio"]["forward"]["median"]}
        one["ratio"]["forward"] |= {"p90": 1.3 * one["ratio"]["forward"]["median"]}
    assert changes(results_of(after), results_of(before))[0].verdict == "same"


@pytest.mark.parametrize(("name", "value"), [("device", "Another"), ("threads", 1)])
def test_other_machines_are_not_compared(name, value):
    machine = copy.deepcopy(MACHINE)
    machine["cpu"][name] = value
    assert changes(results_of(entry(forward=0.9)), results_of(entry(), machine=machine)) == []


def test_a_quick_run_is_no_measure_of_another():
    quick, whole = results_of(entry(forward=0.9), quick=True), results_of(entry())
    assert changes(whole, quick) == changes(quick, whole) == changes(quick, quick) == []


def test_new_cases_are_left_out():
    assert len(changes(results_of(entry(), entry(case="new")), results_of(entry()))) == 1
