"""python -m benchmarks.evidence [--short] [--results FOLDER] [TASK ...]

Runs what is not in the result files yet; it may be stopped and started again at any time. When all tasks are done it
makes tables and pictures: in the pages from the committed results, beside the result files elsewhere.
"""

import importlib
import warnings
from pathlib import Path

import click
from transformers.utils import logging

from examples.domains.task import Task

from . import page
from .methods import BASELINE, EVA, OTHERS
from .running import run_task

EVERY = (*EVA, *OTHERS)
DOMAIN = ("eva_rho2", BASELINE)
TASKS = {
    "language_generation": ("LanguageGeneration", EVERY),
    "language_understanding": ("LanguageUnderstanding", EVERY),
    "image_classification": ("ImageClassification", DOMAIN),
    "convolutions": ("Convolutions", DOMAIN),
    "reinforcement_learning": ("ReinforcementLearning", DOMAIN),
}


def load(name: str, *, short: bool = False) -> Task:
    return getattr(importlib.import_module(f"examples.domains.{name}"), TASKS[name][0])(short=short)


@click.command(help=__doc__)
@click.argument("names", metavar="[TASK]...", nargs=-1, type=click.Choice(list(TASKS)))
@click.option("--short", is_flag=True, help="Tiny models and few steps: the same path in seconds.")
@click.option("--results", type=click.Path(path_type=Path), default=page.RESULTS, help="Where the result files are.")
def main(names: tuple[str, ...], short: bool, results: Path) -> None:
    if short and results == page.RESULTS:
        raise click.UsageError("--short: name a folder of its own with --results")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module=r"(peft|transformers)\.")
    for name in names or TASKS:
        run_task(load(name, short=short), TASKS[name][1], results, click.echo)
    if names:
        return
    if results == page.RESULTS:
        page.main()
    else:
        page.write_beside(results)


if __name__ == "__main__":
    main()
