"""Finished runs of one task in a file: one JSON line with the settings, then one for each run."""

import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["Results", "Run"]


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        method: Which initialisation.
        seed: Draws the training data, the head and the random parts of the initialisation.
        learning_rate: Of AdamW.
        tuning: Whether it served to choose the learning rate; it is then no part of the comparison.
        curve: (steps done, validation loss).
        score: The task's; for a run that served to choose the learning rate its validation score, where it has one.
        parameters: Trainable parameters of the LoRA layers.
        ranks: Smallest and largest rank, and layers without adapter.
        forwards: Batches the initialisation ran through the model.
        initialisation_seconds: Of the initialisation.
        step_seconds: Median of a training step, in the same process.
        seconds: Of the whole run, evaluations included.
        kept_bytes: What autograd keeps of a training step's forward until its backward; None in older files.
    """

    method: str
    seed: int
    learning_rate: float
    tuning: bool
    curve: list[tuple[int, float]]
    score: float | None
    parameters: int
    ranks: tuple[int, int, int]
    forwards: int
    initialisation_seconds: float
    step_seconds: float
    seconds: float
    kept_bytes: int | None = None

    @property
    def key(self) -> tuple[str, int, float]:
        return self.method, self.seed, self.learning_rate


class Results:
    """The runs in a file, which is replaced as a whole whenever one is added.

    Args:
        path: The file; made with the first run.
        settings: What the runs depend on. A file that was made with others is refused.
        provenance: Where and with what they are made; kept from the file where it exists.

    Raises:
        ValueError: the file was made with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any], provenance: dict[str, Any]) -> None:
        self.path, self.settings, self.provenance = path, settings, provenance
        self.runs: list[Run] = []
        if path.exists():
            found, self.provenance, self.runs = self.load(path)
            expected = json.loads(json.dumps(settings))
            if found != expected:
                changed = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
                raise ValueError(
                    f"{path} was made with other settings ({', '.join(changed)}); delete it to start again"
                )

    @staticmethod
    def load(path: Path) -> tuple[dict[str, Any], dict[str, Any], list[Run]]:
        """Settings, provenance and runs."""
        header, *lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return header["settings"], header["provenance"], [Run(**line) for line in lines]

    def find(self, method: str, seed: int, learning_rate: float) -> Run | None:
        return next((run for run in self.runs if run.key == (method, seed, learning_rate)), None)

    def add(self, run: Run) -> None:
        self.runs.append(run)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        header = {"settings": self.settings, "provenance": self.provenance}
        _write(self.path, [header, *(asdict(one) for one in self.runs)])


def _write(path: Path, lines: Iterable[Any]) -> None:
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
