"""python -m benchmarks.evidence [--short] [--results FOLDER] [TASK ...]

Runs what is not in the result files yet; it may be stopped and started again at any time. When all tasks are done it
makes tables and pictures: in the pages from the committed results, beside the result files elsewhere.
"""

import importlib
import warnings
from pathlib import Path
from typing import NamedTuple

import click
from transformers.utils import logging

from examples.domains.task import Task

from . import page
from .methods import BASELINE, OTHERS, SCALED
from .running import run_task

EVERY = ("eva_rho1", "eva_rho2", *OTHERS)
DOMAIN = ("eva_rho2", BASELINE)
GAINS = (BASELINE, "eva_rho1", "eva_matched", "eva_global", SCALED, "pissa", "olora")


class Study(NamedTuple):
    """A domain's task, the initialisations that are compared on it, and another grid of rates than the task's own."""

    domain: str
    task: str
    methods: tuple[str, ...]
    learning_rates: tuple[float, ...] = ()


STUDIES = {
    "language_generation": Study("language_generation", "LanguageGeneration", EVERY),
    "language_understanding": Study("language_understanding", "LanguageUnderstanding", EVERY),
    "image_classification": Study("image_classification", "ImageClassification", DOMAIN),
    "convolutions": Study("convolutions", "Convolutions", DOMAIN),
    "reinforcement_learning": Study("reinforcement_learning", "ReinforcementLearning", DOMAIN),
    "gain_understanding": Study(
        "language_understanding", "LanguageUnderstanding", GAINS, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    ),
    "gain_generation": Study(
        "language_generation", "LanguageGeneration", GAINS, (5e-5, 1.5e-4, 5e-4, 1.5e-3, 5e-3, 1.5e-2, 5e-2)
    ),
}


def load(name: str, *, short: bool = False) -> Task:
    study = STUDIES[name]
    task: Task = getattr(importlib.import_module(f"examples.domains.{study.domain}"), study.task)(short=short)
    task.name = name
    task.learning_rates = study.learning_rates[: 2 if short else None] or task.learning_rates
    return task


@click.command(help=__doc__)
@click.argument("names", metavar="[TASK]...", nargs=-1, type=click.Choice(list(STUDIES)))
@click.option("--short", is_flag=True, help="Tiny models and few steps: the same path in seconds.")
@click.option("--results", type=click.Path(path_type=Path), default=page.RESULTS, help="Where the result files are.")
def main(names: tuple[str, ...], short: bool, results: Path) -> None:
    if short and results == page.RESULTS:
        raise click.UsageError("--short: name a folder of its own with --results")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module=r"(peft|transformers)\.")
    for name in names or STUDIES:
        run_task(load(name, short=short), STUDIES[name].methods, results, click.echo)
    if names:
        return
    if results == page.RESULTS:
        page.main()
    else:
        page.write_beside(results)


if __name__ == "__main__":
    main()
