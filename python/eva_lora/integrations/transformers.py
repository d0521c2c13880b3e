"""A callback for transformers' ``Trainer`` and everything built on it, TRL's trainers included."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..reporting import EvaReport
from .trackers import log_tensorboard, log_wandb

__all__ = ["EvaReportCallback"]


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
