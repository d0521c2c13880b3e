"""What the domains have in common: a task, a training loop, and EVA beside the default on one seed."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from time import perf_counter
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from eva_lora import EvaConfig, eva_initialize

__all__ = ["Batch", "Task", "compare", "seeded_order", "train"]

Batch = dict[str, Tensor]


class Task(ABC):
    """A pretrained model, data to adapt it to, and how well it does.

    Args:
        short: A tiny model and few steps: the same path in seconds, for tests.

    Attributes:
        name: The module's.
        metric: What :meth:`score` measures.
        higher_is_better: Of the score.
        targets: The modules that get a LoRA layer.
        rank: Configured rank of each; ``lora_alpha`` equals it.
        head: Modules that are trained whole, the same for every initialisation.
        learning_rates: The grid from which each initialisation gets its own.
        steps: Training steps.
        evaluate_every: Steps between two evaluations of the validation loss.
    """

    name: str
    metric: str
    higher_is_better: bool
    targets: Sequence[str] | str
    rank: int = 8
    head: Sequence[str] = ()
    learning_rates: tuple[float, ...]
    steps: int
    evaluate_every: int = 4

    def __init__(self, *, short: bool = False) -> None:
        self.short = short
        if short:
            self.steps, self.evaluate_every, self.rank = 2, 1, 2
            self.learning_rates = self.learning_rates[:2]

    @abstractmethod
    def base(self, seed: int) -> nn.Module:
        """A fresh copy of the pretrained model; a head that is new is drawn from ``seed``."""

    @abstractmethod
    def training(self, seed: int) -> list[Batch]:
        """One batch per step, drawn from the training data by ``seed``."""

    @cached_property
    @abstractmethod
    def validation(self) -> list[Batch]:
        """What learning curves and the choice of the learning rate are measured on."""

    @abstractmethod
    def score(self, model: nn.Module) -> float:
        """The final score, on data used for nothing else."""

    def validation_score(self, model: nn.Module) -> float | None:
        """Chooses the learning rate where the loss is a poor guide; higher is better. None: the loss chooses."""
        return None

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:  # ()
        return model(**batch).loss

    def validation_loss(self, model: nn.Module) -> float:
        with torch.no_grad():
            return sum(float(self.loss(model, batch)) for batch in self.validation) / len(self.validation)

    def lora(self, **options: Any) -> LoraConfig:
        common = {"r": self.rank, "lora_alpha": self.rank, "target_modules": self.targets}
        return LoraConfig(**{**common, **options}, modules_to_save=list(self.head) or None)


def seeded_order(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def train(
    model: nn.Module, task: Task, batches: list[Batch], learning_rate: float
) -> tuple[list[tuple[int, float]], list[float]]:
    """AdamW at a constant rate, gradients clipped to norm 1, without dropout (models stay in eval mode).

    Returns:
        The validation loss by steps done, and the seconds of each step.
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], learning_rate, weight_decay=0.0)
    model.eval()
    curve, seconds = [], []
    for step, batch in enumerate(batches):
        if step % task.evaluate_every == 0:
            curve.append((step, task.validation_loss(model)))
        start = perf_counter()
        task.loss(model, batch).backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(perf_counter() - start)
    curve.append((len(batches), task.validation_loss(model)))
    return curve, seconds


def compare(task: Task, seed: int = 1, echo: Callable[[str], object] = print) -> dict[str, float]:
    """Train from EVA and from the default, once each, at the grid's second learning rate; scores by initialisation."""
    batches = task.training(seed)
    scores = {}
    for initialisation in ("EVA", "default"):
        torch.manual_seed(seed)
        model = get_peft_model(task.base(seed), task.lora())
        if initialisation == "EVA":
            report = eva_initialize(model, batches, EvaConfig(max_batches=len(batches)), progress=False)
            ranks = report.ranks.values()
            echo(f"EVA: {report.num_batches} batches, {report.num_rows} rows, ranks {min(ranks)} to {max(ranks)}")
        curve, _ = train(model, task, batches, task.learning_rates[1])
        scores[initialisation] = task.score(model)
        losses = " ".join(f"{step}: {loss:.3f}" for step, loss in curve)
        echo(f"{initialisation}: {task.metric} {scores[initialisation]:.4f}; validation loss by step {losses}")
    return scores
