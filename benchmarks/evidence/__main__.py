"""python -m benchmarks.evidence [--short] [--results FOLDER] [TASK ...]

Runs what is not in the result files yet; may be stopped and started again at any time.
"""

import importlib
import warnings
from pathlib import Path

import click
from transformers.utils import logging

from examples.domains.task import Task

from .methods import EVA, OTHERS
from .running import run_task

RESULTS = Path(__file__).parent / "results"
EVERY = tuple({**EVA, **OTHERS})
DOMAIN = ("eva_rho2", "lora")
TASKS = {
    "language_generation": ("LanguageGeneration", EVERY),
    "language_understanding": ("LanguageUnderstanding", EVERY),
    "image_classification": ("ImageClassification", DOMAIN),
    "convolutions": ("Convolutions", DOMAIN),
    "reinforcement_learning": ("ReinforcementLearning", DOMAIN),
}


def load(name: str, *, short: bool) -> Task:
    return getattr(importlib.import_module(f"examples.domains.{name}"), TASKS[name][0])(short=short)


@click.command(help=__doc__)
@click.argument("names", nargs=-1, type=click.Choice(list(TASKS)))
@click.option("--short", is_flag=True, help="Tiny models and few steps: the same path in seconds.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(names: tuple[str, ...], short: bool, results: Path) -> None:
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module=r"(peft|transformers)\.")
    for name in names or TASKS:
        run_task(load(name, short=short), TASKS[name][1], results, click.echo)


if __name__ == "__main__":
    main()
