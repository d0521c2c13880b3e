"""Callbacks for Lightning's ``Trainer``."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..collecting import ForwardFn, RowMaskFn, collect
from ..initializing import eva_initialize, prepared
from ..planning import plan
from ..reporting import EvaReport
from .beginning import PLAN, planned_before
from .trackers import log_tensorboard, log_wandb

if TYPE_CHECKING:
    from lightning.pytorch import Callback
elif "pytorch_lightning" in sys.modules and "lightning" not in sys.modules:
    from pytorch_lightning import Callback  # the same library under the name the program uses
else:
    from lightning.pytorch import Callback

__all__ = ["EvaCallback", "EvaReportCallback"]


class EvaCallback(Callback):  # type: ignore[misc]
    """Initialises a module's LoRA layers with EVA as fitting is set up: before it is wrapped and has an optimizer.

    The module is moved to the trainer's device first, as it would be a little later. The plan is left in the trainer's
    root folder; a run that is resumed takes its ranks from there and runs no forward.

    Args:
        loader: Batches to take the statistics from. None: those of the module or its datamodule
            (``train_dataloader()``); what is given to ``trainer.fit`` itself is not known yet.
        config: As in :func:`eva_lora.eva_initialize`.
        forward_fn: Called as ``forward_fn(module, batch)``. None: the module itself is called with the batch.
        row_mask_fn: As in :func:`eva_lora.eva_initialize`.
        ckpt_path: What ``trainer.fit`` will be given, which it does not tell its callbacks in time. None: no run is
            resumed.

    Attributes:
        report: What was done; None before, and where a run is resumed.

    Raises:
        ValueError: from the set-up: there is no loader; a run is resumed that has left no plan; and as
            :func:`eva_lora.eva_initialize`.
    """

    def __init__(
        self,
        loader: Iterable[Any] | None = None,
        config: Any = None,
        *,
        forward_fn: ForwardFn | None = None,
        row_mask_fn: RowMaskFn | None = None,
        ckpt_path: str | Path | None = None,
    ) -> None:
        self.report: EvaReport | None = None
        self._loader, self._config = loader, config
        self._forward_fn, self._row_mask_fn, self._resumed = forward_fn, row_mask_fn, ckpt_path is not None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit" or self.report is not None:
            return
        folder = Path(trainer.default_root_dir)
        if self._resumed:
            planned_before(pl_module, folder)
            return
        _, chosen = prepared(pl_module, self._config)
        pl_module.to(trainer.strategy.root_device)
        statistics = collect(
            pl_module, self._batches(trainer, pl_module), chosen, forward_fn=self._forward_fn,
            row_mask_fn=self._row_mask_fn, progress=False,
        )  # fmt: skip
        self.report = eva_initialize(pl_module, statistics)
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            plan(statistics).save(folder / PLAN)

    def _batches(self, trainer: Any, pl_module: Any) -> Iterable[Any]:
        if self._loader is not None:
            return self._loader
        holders = [holder for holder in (trainer.datamodule, pl_module) if holder is not None]
        made = next((holder for holder in holders if _makes_loader(holder)), None)
        if made is None:
            raise ValueError(
                "loader: expected one, as neither the module nor a datamodule has train_dataloader(); pass "
                "EvaCallback(loader) what trainer.fit is given"
            )
        return made.train_dataloader()


def _makes_loader(holder: Any) -> bool:
    """Whether a module or datamodule has a ``train_dataloader`` of its own, and not just Lightning's, which raises."""
    home = getattr(type(holder).train_dataloader, "__module__", "")
    return not home.startswith(("lightning.", "pytorch_lightning."))


class EvaReportCallback(Callback):  # type: ignore[misc]
    """Writes the report to ``eva_report/`` in the trainer's log folder as fitting begins, on rank 0 only.

    Loggers of TensorBoard and Weights & Biases that the trainer has get it as well.

    Args:
        report: What :func:`eva_lora.eva_initialize` returned.
        plots: Formats of plots to write, as in :meth:`eva_lora.EvaReport.save`.
    """

    def __init__(self, report: EvaReport, *, plots: Iterable[str] = ()) -> None:
        self._report, self._plots = report, tuple(plots)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        folder = trainer.log_dir or trainer.default_root_dir  # log_dir is agreed on by all ranks
        if not trainer.is_global_zero:
            return
        self._report.save(Path(folder) / "eva_report", plots=self._plots)
        for logger in trainer.loggers:
            if type(logger).__name__ == "TensorBoardLogger":
                log_tensorboard(self._report, logger.experiment)
            elif type(logger).__name__ == "WandbLogger":
                log_wandb(self._report, logger.experiment)
