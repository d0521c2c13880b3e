"""EVA for transformers' ``Trainer`` and everything built on it, TRL's trainers included."""

import copy
import gc
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from ..collecting import RowMaskFn, collect_calls
from ..initializing import eva_initialize, prepared
from ..planning import plan
from ..reporting import EvaReport
from .beginning import PLAN, planned_before
from .trackers import log_tensorboard, log_wandb

__all__ = ["EvaCallback", "EvaReportCallback", "eva_initialize_trainer"]


def eva_initialize_trainer(
    trainer: Any,
    config: Any = None,
    *,
    row_mask_fn: RowMaskFn | None = None,
    resume_from_checkpoint: str | bool | None = None,
    overwrite: bool = False,
) -> EvaReport | None:
    """Initialise the model of a ``Trainer`` with EVA, from its own training data, before ``trainer.train()``.

    Batches are those of ``trainer.get_train_dataloader()``, and the model is called by ``trainer.compute_loss``, so
    that layers see what they will be shown in training, whatever the trainer makes of a batch: of several calls, each
    with the mask that it is given itself (:func:`eva_lora.watching`). No gradient is computed; the trainer, the model's
    modes and the random generators are given back as they were.

    The plan is left in the run's output folder, for a run that is resumed.

    Args:
        trainer: After its construction: transformers', or one derived from it.
        config: As in :func:`eva_lora.eva_initialize`.
        row_mask_fn: As in :func:`eva_lora.watching`.
        resume_from_checkpoint: What ``trainer.train`` will be given. Where it says that a run is resumed, no forward is
            run: layers get the ranks that the run began with, and its checkpoint then everything else.
        overwrite: As in :func:`eva_lora.eva_initialize`.

    Returns:
        What was done; None where a run is resumed.

    Raises:
        TypeError: ``trainer`` is none.
        ValueError: it has an optimizer already; it makes its model in ``train()``; a run is resumed that has left no
            plan; and as :func:`eva_lora.eva_initialize`.
    """
    if not isinstance(trainer, Trainer):
        kind = f"{type(trainer).__module__}.{type(trainer).__qualname__}"
        raise TypeError(
            f"trainer: expected a transformers.Trainer, got {kind}; where that makes one itself, as SetFit's does, "
            "pass EvaCallback() among its callbacks"
        )
    if trainer.optimizer is not None:
        raise ValueError(
            "trainer: it has an optimizer already, which would go on training the parameters that EVA replaces; call "
            "EVA before train(), and leave the optimizer to the trainer"
        )
    if trainer.model_init is not None:
        raise ValueError("trainer: its model is made anew in train(), by model_init; call eva_initialize in that")
    folder = Path(trainer.args.output_dir)
    if resume_from_checkpoint:
        planned_before(trainer.model, folder)
        return None

    def forward(batch: Any) -> None:
        with trainer.accelerator.autocast():
            trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))

    _, chosen = prepared(trainer.model, config, overwrite=overwrite)
    with _as_it_was(trainer):
        statistics = collect_calls(
            trainer.model, trainer.get_train_dataloader(), forward, chosen, row_mask_fn=row_mask_fn
        )  # fmt: skip
    report = eva_initialize(trainer.model, statistics, overwrite=overwrite)
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        plan(statistics).save(folder / PLAN)
    return report


class EvaCallback(TrainerCallback):  # type: ignore[misc]
    """:func:`eva_initialize_trainer` for who cannot reach the trainer: ``train()`` then begins with it.

    Given to a trainer's ``callbacks``, also by tools that make the trainer themselves. A second ``train()`` of the same
    trainer, and one that resumes a run, goes on without.

    Args:
        config, row_mask_fn: As in :func:`eva_initialize_trainer`.

    Attributes:
        report: What was done; None before, and where a run is resumed.
    """

    def __init__(self, config: Any = None, *, row_mask_fn: RowMaskFn | None = None) -> None:
        self.report: EvaReport | None = None
        self._config, self._row_mask_fn = config, row_mask_fn

    def on_init_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # Nothing hands the trainer to its callbacks, and its own class has not ended its construction here.
        objects = gc.get_objects()
        kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, Trainer)}
        trainer: Any = next(one for one in objects if type(one) in kinds and self in _callbacks_of(one))
        trainer.train = self._beginning(trainer, trainer.train)

    def _beginning(self, trainer: Any, train: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(train)
        def beginning(resume_from_checkpoint: Any = None, *args: Any, **options: Any) -> Any:
            if trainer.optimizer is None:
                self.report = eva_initialize_trainer(
                    trainer, self._config, row_mask_fn=self._row_mask_fn, resume_from_checkpoint=resume_from_checkpoint
                )
            return train(resume_from_checkpoint, *args, **options)

        return beginning


def _callbacks_of(trainer: Any) -> list[Any]:
    return getattr(getattr(trainer, "callback_handler", None), "callbacks", [])


@contextmanager
def _as_it_was(trainer: Any) -> Iterator[None]:
    """Within it the trainer may count, log and keep batches; afterwards its attributes are what they were.

    Those that hold nothing but numbers and text are copied; others are put back as they are.
    """
    holders = [vars(trainer), vars(trainer.state)]
    before = [
        {name: copy.deepcopy(value) if _is_plain(value) else value for name, value in names.items()}
        for names in holders
    ]
    try:
        yield
    finally:
        for names, values in zip(holders, before, strict=True):
            names.update(values)
            for name in names.keys() - values.keys():
                del names[name]


def _is_plain(value: Any) -> bool:
    """Whether there is nothing in it but numbers, text and containers of them."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple, deque)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


class EvaReportCallback(TrainerCallback):  # type: ignore[misc]
    """Writes the report to ``eva_report/`` in the run's output folder as training begins, on rank 0 only.

    Where the trainer reports to TensorBoard or Weights & Biases, the report goes there as well: into
    ``runs/eva/`` of the output folder, and into the run that the trainer has started.

    Args:
        report: What :func:`eva_lora.eva_initialize` returned.
        plots: Formats of plots to write, as in :meth:`eva_lora.EvaReport.save`.
    """

    def __init__(self, report: EvaReport, *, plots: Iterable[str] = ()) -> None:
        self._report, self._plots = report, tuple(plots)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        self._report.save(Path(args.output_dir) / "eva_report", plots=self._plots)
        trackers = args.report_to if isinstance(args.report_to, (list, tuple)) else [args.report_to]
        if "tensorboard" in trackers:
            from torch.utils.tensorboard import SummaryWriter

            with SummaryWriter(str(Path(args.output_dir) / "runs" / "eva")) as writer:
                log_tensorboard(self._report, writer)
        if "wandb" in trackers:
            import wandb

            if wandb.run is not None:
                log_wandb(self._report, wandb.run)
