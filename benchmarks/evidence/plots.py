"""Learning curves and scores of one task as a small SVG."""

import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from .methods import BASELINE, STARTS
from .results import Run
from .running import best_rate, target_loss
from .summary import interval

__all__ = ["plot", "plot_rates"]

# Text stays text and nothing depends on the day, so that a file changes only with its data.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "evidence", "font.size": 9}


def plot(methods: Sequence[str], metric: str, runs: Sequence[Run], path: Path, baseline: str = BASELINE) -> None:
    """Left the mean validation loss by step, right every seed's score with the mean and its 95 % interval."""
    finals = {name: [run for run in runs if run.method == name and not run.tuning] for name in methods}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        for name, own in finals.items():
            steps = [step for step, _ in own[0].curve]
            means = [statistics.fmean(run.curve[i][1] for run in own) for i in range(len(steps))]
            left.plot(steps, means, color=STARTS[name].colour, label=STARTS[name].label, linewidth=1.4)
        left.axhline(target_loss(runs, baseline), color="#999999", linewidth=0.8, linestyle=":")
        left.set(xlabel="training steps", ylabel="validation loss, mean over seeds")
        left.legend(frameon=False)
        for place, (name, own) in enumerate(reversed(finals.items())):
            scores = [run.score for run in own if run.score is not None]
            mean = interval(scores)
            right.plot(scores, [place] * len(scores), "o", color=STARTS[name].colour, alpha=0.4, markersize=4)
            right.errorbar(
                mean.mean, place, xerr=mean.half, fmt="|", color=STARTS[name].colour, capsize=3, markersize=12
            )
        right.set(
            yticks=range(len(finals)),
            yticklabels=[STARTS[name].label for name in reversed(finals)],
            xlabel=metric.partition(" (")[0],
        )
        right.margins(y=0.2)
        _save(figure, path)


def plot_rates(methods: Sequence[str], runs: Sequence[Run], path: Path) -> None:
    """The validation loss at the end against the learning rate on the tuning seed: what is above the loss at the start,
    or no number, is drawn there. Each method's best is marked."""
    tuning = sorted((run for run in runs if run.tuning), key=lambda run: run.learning_rate)
    start = tuning[0].curve[0][1]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        for name in methods:
            rates = [run.learning_rate for run in tuning if run.method == name]
            losses = [min(start, run.curve[-1][1]) for run in tuning if run.method == name]  # NaN is not the lesser
            best = rates.index(best_rate(runs, name))
            axes.plot(
                rates, losses, "o-", color=STARTS[name].colour, label=STARTS[name].label, linewidth=1.4, markersize=3
            )
            axes.plot(rates[best], losses[best], "o", color=STARTS[name].colour, markersize=8)
        axes.set(xscale="log", xlabel="learning rate", ylabel="validation loss at the end, one seed")
        axes.legend(frameon=False)
        _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
