"""All runs of a task: a learning rate for each method on a seed of its own, then five seeds that decide."""

import gc
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from math import inf, isnan
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from examples.domains.task import Batch, Task, train

from .methods import BASELINE, Initialiser
from .results import Results, Run

__all__ = ["SEEDS", "TUNING_SEED", "best_rate", "kept_for_backward", "run_task", "search", "target_loss"]

TUNING_SEED = 0
SEEDS = (1, 2, 3, 4, 5)


def run_task(
    task: Task,
    methods: Sequence[str],
    folder: Path,
    echo: Callable[[str], object] = print,
    *,
    first: float | None = None,
    baseline: str = BASELINE,
    options: Mapping[str, int] = MappingProxyType({}),
) -> Results:
    """Every run that is not in the task's file in ``folder`` yet.

    Args:
        task: What is trained; the file has its name.
        methods: Names in ``STARTS``.
        folder: Of the result files.
        echo: Is told of each run.
        first: The learning rate from which the search goes down the grid; None: all of the grid are tried.
        baseline: What the others are compared with.
        options: What of the task is not as in its domain.

    Raises:
        ValueError: the file was made with other settings.
    """
    settings = {**_settings(task, methods), **_unusual(first, baseline, options)}
    results = Results(folder / f"{task.name}.jsonl", settings, _provenance(task))
    initialise = Initialiser(task)

    def run(method: str, seed: int, learning_rate: float) -> Run:
        done = results.find(method, seed, learning_rate)
        if done is None:
            done = _run(task, initialise, method, seed, learning_rate)
            gc.collect()  # models refer to themselves
            results.add(done)
            score = "" if done.score is None else f", {task.metric} {done.score:.4f}"
            echo(
                f"{task.name} {method} seed {seed} lr {learning_rate:g}: validation loss {done.curve[-1][1]:.4f}"
                f"{score}; {done.parameters:,} parameters, {done.seconds:.0f} s"
            )
        return done

    for method in methods:
        tuning = partial(run, method, TUNING_SEED)
        if first is None:
            for learning_rate in task.learning_rates:
                tuning(learning_rate)
        else:
            search(task.learning_rates, first, lambda rate, tuning=tuning: _merit(tuning(rate)))
    rates = {method: best_rate(results.runs, method) for method in methods}
    echo(f"{task.name}: learning rates {rates}, target loss {target_loss(results.runs, baseline):.4f}")
    for seed in _seeds(task):
        for method in methods:
            run(method, seed, rates[method])
    return results


def search(rates: Sequence[float], first: float, merit: Callable[[float], tuple[float, float]]) -> float:
    """Down a grid from one of its rates to the neighbour with the least merit, until both neighbours of the best have
    been tried or the grid ends. Finds the grid's best where merit has one valley along it.

    Returns:
        The best of those tried.
    """
    best = rates.index(first)
    while True:
        near = range(max(0, best - 1), min(len(rates), best + 2))
        lowest = min(near, key=lambda i: merit(rates[i]))
        if lowest == best:
            return rates[best]
        best = lowest


def best_rate(runs: Sequence[Run], method: str) -> float:
    """The learning rate with the highest validation score on the tuning seed; among equals, and for a task without one,
    with the lowest final validation loss (NaN loses)."""
    return min((run for run in runs if run.method == method and run.tuning), key=_merit).learning_rate


def target_loss(runs: Sequence[Run], baseline: str = BASELINE) -> float:
    """The loss whose steps are counted: what the baseline has reached on the tuning seed, at its best learning rate, at
    the first evaluation that is not before two thirds of its steps. So it is fixed before the five seeds run."""
    rate = best_rate(runs, baseline)
    (run,) = (run for run in runs if run.tuning and run.method == baseline and run.learning_rate == rate)
    return next(loss for step, loss in run.curve if 3 * step >= 2 * run.curve[-1][0])


def kept_for_backward(task: Task, model: nn.Module, batch: Batch) -> int:
    """Bytes that autograd keeps of one forward until its backward, parameters and buffers not counted."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor.detach()  # with its history it would keep the graph alive, and itself with it

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = task.loss(model, batch)  # the graph holds what was kept, so that no storage's place is used twice
    del loss
    return sum(kept.values())


def _merit(run: Run) -> tuple[float, float]:
    """Less is better."""
    loss = run.curve[-1][1]
    return -(run.score or 0.0), inf if isnan(loss) else loss


def _run(task: Task, initialise: Initialiser, method: str, seed: int, learning_rate: float) -> Run:
    start = time.perf_counter()
    made = initialise(method, seed)
    batches = task.training(seed)
    kept = kept_for_backward(task, made.model.eval(), batches[0])
    curve, seconds = train(made.model, task, batches, learning_rate)
    tuning = seed == TUNING_SEED
    score = task.validation_score(made.model) if tuning else task.score(made.model)
    return Run(
        method, seed, learning_rate, tuning, [(step, round(loss, 5)) for step, loss in curve],
        None if score is None else round(score, 5), made.parameters, made.ranks, made.forwards,
        round(made.seconds, 3), round(statistics.median(seconds), 4), round(time.perf_counter() - start, 1),
        kept,
    )  # fmt: skip


def _seeds(task: Task) -> tuple[int, ...]:
    return SEEDS[:2] if task.short else SEEDS


def _settings(task: Task, methods: Sequence[str]) -> dict[str, Any]:
    return {
        "task": task.name, "metric": task.metric, "higher_is_better": task.higher_is_better, "short": task.short,
        "steps": task.steps, "rank": task.rank, "learning_rates": task.learning_rates, "methods": list(methods),
        "tuning_seed": TUNING_SEED, "seeds": _seeds(task),
    }  # fmt: skip


def _unusual(first: float | None, baseline: str, options: Mapping[str, int]) -> dict[str, Any]:
    """What of a study is not as in the first ones, whose files do not name it."""
    told = {} if first is None else {"first_rate": first}
    return {**told, **({} if baseline == BASELINE else {"baseline": baseline}), **options}


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
