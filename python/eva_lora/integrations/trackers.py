"""A report in experiment trackers, through their own interfaces."""

from statistics import median
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ..reporting import EvaReport

__all__ = ["log_tensorboard", "log_wandb", "scalars"]


def scalars(report: EvaReport) -> dict[str, float]:
    """The report's totals, as trackers plot and compare them."""
    captured = [report.captured(name) for name in report.ranks]
    return {
        "layers": len(report.ranks),
        "layers_converged": sum(report.converged.values()),
        "layers_without_adapter": sum(rank == 0 for rank in report.ranks.values()),
        "budget": report.budget,
        "ranks_moved": sum(abs(report.ranks[name] - report.configured_ranks[name]) for name in report.ranks) // 2,
        "captured_variance_mean": sum(captured) / len(captured),
        "captured_variance_min": min(captured),
        **({"feature_gain_median": median(report.feature_gain.values())} if report.feature_gain else {}),
        "batches": report.num_batches,
        "rows": report.num_rows,
        **{f"seconds_{part}": value for part, value in report.seconds.items()},
    }


def _figures(report: EvaReport) -> dict[str, Any]:
    return {
        "ranks": report.plot_ranks(),
        "spectra": report.plot_spectra(),
        "convergence": report.plot_convergence(),
        "budget": report.plot_budget(),
    }


def _pixels(figure: Figure) -> NDArray[np.uint8]:  # (height, width, 4)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def log_tensorboard(report: EvaReport, writer: Any, *, step: int = 0) -> None:
    """Write totals, figures and the summary under ``eva/``, and layers converged by batch.

    Args:
        report: What :func:`eva_lora.eva_initialize` returned.
        writer: A ``torch.utils.tensorboard.SummaryWriter`` or what has its methods.
        step: Of everything but the curve by batch.
    """
    for name, value in scalars(report).items():
        writer.add_scalar(f"eva/{name}", value, step)
    for batch, converged in enumerate(report.history, 1):
        writer.add_scalar("eva/layers_converged_by_batch", converged, batch)
    for name, figure in _figures(report).items():
        writer.add_figure(f"eva/plots/{name}", figure, step)
    writer.add_text("eva/summary", f"```\n{report}\n```", step)
    writer.flush()


def log_wandb(report: EvaReport, run: Any) -> None:
    """Put totals into the run's summary, and figures, the page and a table of layers under ``eva/``.

    Args:
        report: What :func:`eva_lora.eva_initialize` returned.
        run: What ``wandb.init`` returned.
    """
    import wandb

    from ..reporting import render

    run.summary.update({f"eva/{name}": value for name, value in scalars(report).items()})
    columns = ["layer", "rank", "configured", "captured", "converged"]
    rows = [
        [name, rank, report.configured_ranks[name], report.captured(name), report.converged[name]]
        for name, rank in report.ranks.items()
    ]
    run.log(
        {
            **{f"eva/plots/{name}": wandb.Image(_pixels(figure)) for name, figure in _figures(report).items()},
            "eva/layers": wandb.Table(columns=columns, data=rows),
            "eva/report": wandb.Html(render(report), inject=False),
        }
    )
