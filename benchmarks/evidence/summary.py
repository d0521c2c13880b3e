"""What the runs of a task say: means over seeds with 95 % intervals, and differences by seed."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from scipy.stats import t as student

from .methods import BASELINE
from .results import Run
from .running import best_rate, target_loss

__all__ = ["Interval", "MethodSummary", "interval", "steps_to", "summarise"]


@dataclass(frozen=True)
class Interval:
    """A mean and the half-width of its confidence interval (Student's t)."""

    mean: float
    half: float

    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.half


@dataclass(frozen=True)
class MethodSummary:
    """One method over its seeds.

    Attributes:
        method: Its name.
        learning_rate: Chosen for it on the tuning seed.
        at_edge: Whether that is the smallest or the largest of the grid.
        parameters: Trainable parameters of the LoRA layers, mean.
        ranks: Smallest and largest rank of any seed.
        score: The task's.
        gain: Score minus the baseline's on the same seed; its interval is one of as many as other methods, which
            hold together. None for the baseline.
        steps: Training steps until the target loss; runs that do not reach it count with all their steps.
        missed: How many do not.
        steps_gain: Steps minus the baseline's on the same seed, likewise. None for the baseline.
        forwards: Batches the initialisation ran through the model, mean.
        cost: Time of the initialisation in training steps of the same run, median.
        steps_with_cost: Steps until the target loss, the initialisation's time counted as steps, mean.
        kept_bytes: What autograd keeps of a step's forward, mean; None where it was not measured.
    """

    method: str
    learning_rate: float
    at_edge: bool
    parameters: float
    ranks: tuple[int, int]
    score: Interval
    gain: Interval | None
    steps: Interval
    missed: int
    steps_gain: Interval | None
    forwards: float
    cost: float
    steps_with_cost: float
    kept_bytes: float | None


def interval(values: Sequence[float], comparisons: int = 1) -> Interval:
    """Mean and 95 % interval of at least two values; with several comparisons, of all of them together (Bonferroni).

    Raises:
        ValueError: there are fewer.
    """
    if len(values) < 2:
        raise ValueError(f"values: expected at least 2 for an interval, got {len(values)}")
    width = student.ppf(1 - 0.025 / comparisons, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(statistics.fmean(values), float(width))


def steps_to(curve: Sequence[tuple[int, float]], loss: float) -> float | None:
    """Steps until a curve first reaches ``loss``, on straight lines between its points; None if it never does."""
    before = None
    for step, value in curve:
        if value <= loss:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - loss) / (before[1] - value)
        before = (step, value)
    return None


def summarise(
    methods: Sequence[str], learning_rates: Sequence[float], runs: Sequence[Run], baseline: str = BASELINE
) -> list[MethodSummary]:
    """One summary per method.

    Raises:
        ValueError: a method has not run on the baseline's seeds, all of them.
    """
    target = target_loss(runs, baseline)
    finals = {name: {run.seed: run for run in runs if run.method == name and not run.tuning} for name in methods}
    seeds = sorted(finals[baseline])
    summaries = []
    for name in methods:
        if sorted(finals[name]) != seeds:
            raise ValueError(f"{name} ran on seeds {sorted(finals[name])}, {baseline} on {seeds}")
        mine, theirs = ([finals[one][seed] for seed in seeds] for one in (name, baseline))
        rate = best_rate(runs, name)
        difference = partial(_difference, comparisons=len(methods) - 1) if name != baseline else lambda *_: None
        summaries.append(
            MethodSummary(
                method=name,
                learning_rate=rate,
                at_edge=rate in (min(learning_rates), max(learning_rates)),
                parameters=statistics.fmean(run.parameters for run in mine),
                ranks=(min(run.ranks[0] for run in mine), max(run.ranks[1] for run in mine)),
                score=interval([_score(run) for run in mine]),
                gain=difference([_score(run) for run in mine], [_score(run) for run in theirs]),
                steps=interval([_steps(run, target) for run in mine]),
                missed=sum(steps_to(run.curve, target) is None for run in mine),
                steps_gain=difference([_steps(run, target) for run in mine], [_steps(run, target) for run in theirs]),
                forwards=statistics.fmean(run.forwards for run in mine),
                cost=statistics.median(_cost(run) for run in mine),
                steps_with_cost=statistics.fmean(_steps(run, target) + _cost(run) for run in mine),
                kept_bytes=_mean([run.kept_bytes for run in mine]),
            )
        )
    return summaries


def _mean(values: Sequence[int | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def _score(run: Run) -> float:
    if run.score is None:
        raise ValueError(f"{run.method} has no score on seed {run.seed}")
    return run.score


def _steps(run: Run, target: float) -> float:
    reached = steps_to(run.curve, target)
    return float(run.curve[-1][0]) if reached is None else reached


def _cost(run: Run) -> float:
    return run.initialisation_seconds / run.step_seconds


def _difference(mine: Sequence[float], theirs: Sequence[float], comparisons: int) -> Interval:
    return interval([a - b for a, b in zip(mine, theirs, strict=True)], comparisons)
