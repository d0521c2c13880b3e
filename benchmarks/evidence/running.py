"""All runs of a task: a learning rate for each method on a seed of its own, then five seeds that decide."""

import gc
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from math import inf, isnan
from pathlib import Path
from typing import Any

import torch

from examples.domains.task import Task, train

from .methods import BASELINE, Initialiser
from .results import Results, Run

__all__ = ["SEEDS", "TUNING_SEED", "best_rate", "run_task", "target_loss"]

TUNING_SEED = 0
SEEDS = (1, 2, 3, 4, 5)


def run_task(task: Task, methods: Sequence[str], folder: Path, echo: Callable[[str], object] = print) -> Results:
    """Every run that is not in the task's file in ``folder`` yet.

    Raises:
        ValueError: the file was made with other settings.
    """
    results = Results(folder / f"{task.name}.jsonl", _settings(task, methods), _provenance(task))
    initialise = Initialiser(task)

    def run(method: str, seed: int, learning_rate: float) -> None:
        if results.find(method, seed, learning_rate) is None:
            done = _run(task, initialise, method, seed, learning_rate)
            gc.collect()  # models refer to themselves
            results.add(done)
            score = "" if done.score is None else f", {task.metric} {done.score:.4f}"
            echo(
                f"{task.name} {method} seed {seed} lr {learning_rate:g}: validation loss {done.curve[-1][1]:.4f}"
                f"{score}; {done.parameters:,} parameters, {done.seconds:.0f} s"
            )

    for method in methods:
        for learning_rate in task.learning_rates:
            run(method, TUNING_SEED, learning_rate)
    rates = {method: best_rate(results.runs, method) for method in methods}
    echo(f"{task.name}: learning rates {rates}, target loss {target_loss(results.runs):.4f}")
    for seed in _seeds(task):
        for method in methods:
            run(method, seed, rates[method])
    return results


def best_rate(runs: Sequence[Run], method: str) -> float:
    """The learning rate with the highest validation score on the tuning seed; among equals, and for a task without one,
    with the lowest final validation loss (NaN loses)."""

    def merit(run: Run) -> tuple[float, float]:
        loss = run.curve[-1][1]
        return -(run.score or 0.0), inf if isnan(loss) else loss

    return min((run for run in runs if run.method == method and run.tuning), key=merit).learning_rate


def target_loss(runs: Sequence[Run]) -> float:
    """The loss whose steps are counted: what default LoRA has reached on the tuning seed, at its best learning rate, at
    the first evaluation that is not before two thirds of its steps. So it is fixed before the five seeds run."""
    rate = best_rate(runs, BASELINE)
    (run,) = (run for run in runs if run.tuning and run.method == BASELINE and run.learning_rate == rate)
    return next(loss for step, loss in run.curve if 3 * step >= 2 * run.curve[-1][0])


def _run(task: Task, initialise: Initialiser, method: str, seed: int, learning_rate: float) -> Run:
    start = time.perf_counter()
    made = initialise(method, seed)
    curve, seconds = train(made.model, task, task.training(seed), learning_rate)
    tuning = seed == TUNING_SEED
    score = task.validation_score(made.model) if tuning else task.score(made.model)
    return Run(
        method, seed, learning_rate, tuning, [(step, round(loss, 5)) for step, loss in curve],
        None if score is None else round(score, 5), made.parameters, made.ranks, made.forwards,
        round(made.seconds, 3), round(statistics.median(seconds), 4), round(time.perf_counter() - start, 1),
    )  # fmt: skip


def _seeds(task: Task) -> tuple[int, ...]:
    return SEEDS[:2] if task.short else SEEDS


def _settings(task: Task, methods: Sequence[str]) -> dict[str, Any]:
    return {
        "task": task.name, "metric": task.metric, "higher_is_better": task.higher_is_better, "short": task.short,
        "steps": task.steps, "rank": task.rank, "learning_rates": task.learning_rates, "methods": list(methods),
        "tuning_seed": TUNING_SEED, "seeds": _seeds(task),
    }  # fmt: skip


def _provenance(task: Task) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": _processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "peft", "transformers", "eva-kernels")},
        "commit": commit.stdout.strip(),
        "started": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": f"python -m benchmarks.evidence {task.name}{' --short' if '--short' in sys.argv else ''}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
