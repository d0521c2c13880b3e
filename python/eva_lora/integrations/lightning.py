"""A callback for Lightning's ``Trainer``."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..reporting import EvaReport
from .trackers import log_tensorboard, log_wandb

if TYPE_CHECKING:
    from lightning.pytorch import Callback
elif "pytorch_lightning" in sys.modules and "lightning" not in sys.modules:
    from pytorch_lightning import Callback  # the same library under the name the program uses
else:
    from lightning.pytorch import Callback

__all__ = ["EvaReportCallback"]


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
