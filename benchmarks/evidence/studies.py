"""What is compared with what: one study for each question, and how several run side by side."""

import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from transformers.utils import logging

from examples.domains.task import Task

from .methods import BASELINE
from .running import run_task

__all__ = ["STUDIES", "Study", "load", "run", "run_all"]

DOMAIN = ("eva_rho2", BASELINE)
GAINS = (BASELINE, "eva_rho1", "eva_matched", "eva_global", "lora_scaled", "pissa", "olora")
MOVES = ("eva_rho1", "eva_rho2", "eva_rho2_parameters")
PAIR = (BASELINE, "eva_rho1")
FEW = (*PAIR, "eva_matched")
FEWEST = (*FEW, "lora_scaled")
FROZEN = ("frozen_lora", "frozen_orthonormal", "frozen_eva", "frozen_eva_matched", "frozen_eva_wider", BASELINE)
QUANTISED = (BASELINE, "nf4_lora", "nf4_eva", "nf4_loftq", "nf4_repair", "nf4_both")
METHODS = (BASELINE, "corda", "milora", "mica", "lora_ga", "lora_one")
HALF_DECADES = (5e-5, 1.5e-4, 5e-4, 1.5e-3, 5e-3, 1.5e-2, 5e-2, 1.5e-1)


class Study(NamedTuple):
    """A domain's task, and what of it is changed.

    Attributes:
        domain: Of ``examples.domains``.
        task: Its class there.
        methods: The starts that are compared.
        learning_rates: Another grid than the task's own.
        first: Where in the grid the search for a rate begins, which goes on until both neighbours of the best have been
            tried; None tries them all.
        baseline: The start that the others are compared with.
        options: Attributes of the task.
    """

    domain: str
    task: str
    methods: tuple[str, ...]
    learning_rates: tuple[float, ...] = ()
    first: float | None = None
    baseline: str = BASELINE
    options: Mapping[str, int] = MappingProxyType({})


def generation(methods: tuple[str, ...], first: float, baseline: str = BASELINE, **options: int) -> Study:
    return Study("language_generation", "LanguageGeneration", methods, HALF_DECADES, first, baseline, options)


def understanding(methods: tuple[str, ...], first: float, baseline: str = BASELINE, **options: int) -> Study:
    grid = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    return Study("language_understanding", "LanguageUnderstanding", methods, grid, first, baseline, options)


#: The longest first, so that processes that share them end together.
STUDIES = {
    "gain_understanding": Study(
        "language_understanding", "LanguageUnderstanding", GAINS, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    ),
    "gain_generation": Study(
        "language_generation", "LanguageGeneration", GAINS, (5e-5, 1.5e-4, 5e-4, 1.5e-3, 5e-3, 1.5e-2, 5e-2)
    ),
    "methods_generation": generation(METHODS, 1.5e-3),
    "frozen_generation": generation(FROZEN, 1.5e-2, "frozen_lora"),
    "quantised_generation": generation(QUANTISED, 1.5e-3),
    "moves_generation": generation(MOVES, 1.5e-3, "eva_rho1"),
    "samples16_understanding": understanding(FEWEST, 1e-3, samples=16),
    "samples64_understanding": understanding(FEW, 1e-3, samples=64),
    "samples256_understanding": understanding(FEW, 1e-3, samples=256),
    "moves_understanding": understanding(MOVES, 1e-3, "eva_rho1"),
    "rank1_generation": generation(PAIR, 5e-3, rank=1),
    "rank2_generation": generation(PAIR, 5e-3, rank=2),
    "rank4_generation": generation(PAIR, 5e-3, rank=4),
    "convolutions": Study("convolutions", "Convolutions", DOMAIN),
    "reinforcement_learning": Study("reinforcement_learning", "ReinforcementLearning", DOMAIN),
    "image_classification": Study("image_classification", "ImageClassification", DOMAIN),
}


def load(name: str, *, short: bool = False) -> Task:
    study = STUDIES[name]
    task: Task = getattr(importlib.import_module(f"examples.domains.{study.domain}"), study.task)(short=short)
    task.name = name
    task.learning_rates = study.learning_rates[: 2 if short else None] or task.learning_rates
    for option, value in study.options.items():
        setattr(task, option, value)
    return task


def run(name: str, folder: Path, echo: Callable[[str], object] = print, *, short: bool = False) -> None:
    """Every run of a study that is not in its file yet."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module=r"(peft|transformers)\.")
    study, task = STUDIES[name], load(name, short=short)
    first = None if study.first is None or short else study.first
    run_task(task, study.methods, folder, echo, first=first, baseline=study.baseline, options=study.options)


def run_all(names: Sequence[str], folder: Path, processes: int, *, short: bool = False) -> None:
    """The studies side by side, with one thread a process: runs are too small to share one between two cores.

    What a study raises comes out when those that were running have ended; what they made is kept.
    """
    context = get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=_alone) as pool:
        running = [pool.submit(run, name, folder, _tell, short=short) for name in names]
        try:
            for one in as_completed(running):
                one.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _alone() -> None:
    torch.set_num_threads(1)


def _tell(line: str) -> None:
    print(line, flush=True)
