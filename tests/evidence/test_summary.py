"""Intervals, steps to a loss, the choice of a learning rate and the target, against SciPy and by hand."""

import dataclasses
import math

import pytest
from scipy import stats

from benchmarks.evidence.results import Run
from benchmarks.evidence.running import best_rate, target_loss
from benchmarks.evidence.summary import Interval, interval, steps_to, summarise
from benchmarks.evidence.verdicts import verdict


def run(method, seed, curve, *, score=None, rate=1e-3, cost=0.0):
    return Run(method, seed, rate, seed == 0, curve, score, 100, (1, 4), 7, cost, 0.5, 9.0)


def test_the_interval_is_that_of_students_t():
    values = [0.3, 0.1, 0.45, 0.2, 0.38]
    found = interval(values)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert found.mean - found.half == pytest.approx(expected.low)
    assert found.mean + found.half == pytest.approx(expected.high)
    assert found.excludes_zero() == (stats.ttest_1samp(values, 0.0).pvalue < 0.05)
    six = interval(values, comparisons=6)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(1 - 0.05 / 6)
    assert six.mean - six.half == pytest.approx(expected.low)
    with pytest.raises(ValueError, match="at least 2"):
        interval([1.0])


def test_steps_to_a_loss_are_read_between_evaluations():
    curve = [(0, 5.0), (4, 4.0), (8, 4.5), (12, 3.0)]
    assert steps_to(curve, 4.5) == 2.0  # the first time, though it rises again
    assert steps_to(curve, 3.5) == pytest.approx(8 + 4 * 1.0 / 1.5)
    assert steps_to(curve, 5.5) == 0.0
    assert steps_to(curve, 2.0) is None
    assert steps_to([(0, 5.0), (4, math.nan)], 2.0) is None


def test_the_lowest_final_loss_chooses_the_rate_and_a_diverged_run_never_does():
    runs = [
        run("lora", 0, [(0, 5.0), (2, 4.0)], rate=1e-4),
        run("lora", 0, [(0, 5.0), (2, 3.0)], rate=1e-3),
        run("lora", 0, [(0, 5.0), (2, math.nan)], rate=1e-2),
        run("lora", 1, [(0, 5.0), (2, 1.0)], rate=1e-4, score=0.1),  # no tuning run
        run("eva_rho1", 0, [(0, 5.0), (2, 1.0)], rate=1e-4),
    ]
    assert best_rate(runs, "lora") == 1e-3


def test_a_validation_score_chooses_before_the_loss_does():
    runs = [
        run("lora", 0, [(0, 5.0), (2, 4.0)], rate=1e-4, score=500.0),
        run("lora", 0, [(0, 5.0), (2, 3.0)], rate=1e-3, score=500.0),
        run("lora", 0, [(0, 5.0), (2, 1.0)], rate=1e-2, score=20.0),
    ]
    assert best_rate(runs, "lora") == 1e-3


def test_the_target_is_default_loras_loss_after_two_thirds_of_its_tuning_run():
    curve = [(0, 5.0), (4, 4.0), (8, 3.5), (12, 3.2)]
    runs = [run("lora", 0, curve), run("lora", 0, [(0, 5.0), (4, 4.9), (8, 4.8), (12, 4.7)], rate=1e-4)]
    assert target_loss(runs) == 3.5


def test_differences_are_taken_seed_by_seed():
    tuning = [run(name, 0, [(0, 5.0), (3, 4.0), (4, 3.0)]) for name in ("eva_rho2", "lora")]
    ours = [run("eva_rho2", seed, [(0, 5.0), (2, 4.0), (4, 2.0)], score=seed + 0.5, cost=1.5) for seed in (2, 1)]
    theirs = [run("lora", seed, [(0, 5.0), (4, 4.5)], score=float(seed)) for seed in (1, 2)]
    eva, lora = summarise(("eva_rho2", "lora"), (1e-3, 1e-2), [*tuning, *ours, *theirs])
    assert (eva.gain.mean, eva.gain.half) == (0.5, 0.0)  # seeds differ by more than methods, and that is taken out
    assert eva.score.half > 1
    assert (eva.steps.mean, eva.missed) == (2.0, 0)
    assert (lora.steps.mean, lora.missed) == (4.0, 2)  # never reached: all steps count
    assert eva.steps_gain.mean == -2.0
    assert (eva.cost, eva.forwards, eva.at_edge) == (3.0, 7, True)
    assert (eva.steps_with_cost, lora.steps_with_cost) == (5.0, 4.0)
    assert lora.gain is None
    with pytest.raises(ValueError, match=r"eva_rho2 ran on seeds \[1\]"):
        summarise(("eva_rho2", "lora"), (1e-3,), [*tuning, ours[1], *theirs])


@pytest.mark.parametrize(("gain", "steps", "said"), [
    ((0.2, 0.1), (-3.0, 9.0), "**helps**"), ((-0.2, 0.1), (-3.0, 1.0), "**hurts**"),
    ((0.2, 0.3), (-3.0, 1.0), "**sooner**, ends the same"), ((0.2, 0.3), (3.0, 1.0), "**later**, ends the same"),
    ((0.2, 0.3), (3.0, 4.0), "no difference"),
])  # fmt: skip
def test_a_verdict_goes_by_the_score_where_it_is_beyond_chance_and_by_the_steps_else(gain, steps, said):
    tuning = [run(name, 0, [(0, 5.0), (3, 4.0), (4, 3.0)]) for name in ("eva_rho2", "lora")]
    finals = [run(name, seed, [(0, 5.0), (4, 2.0)], score=0.0) for name in ("eva_rho2", "lora") for seed in (1, 2)]
    one, baseline = summarise(("eva_rho2", "lora"), (1e-3,), [*tuning, *finals])
    one = dataclasses.replace(one, gain=Interval(*gain), steps_gain=Interval(*steps))
    assert verdict(one, higher_is_better=True) == said
    with pytest.raises(ValueError, match="lora is what its study compares with"):
        verdict(baseline, higher_is_better=True)
