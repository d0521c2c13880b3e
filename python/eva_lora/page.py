"""The report as one HTML page without foreign scripts, its figures drawn by matplotlib."""

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

import jinja2
import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

from .layout import Grid

if TYPE_CHECKING:
    from .report import EvaReport

__all__ = ["plot_convergence", "plot_ranks", "plot_spectra", "render"]


def plot_ranks(report: "EvaReport") -> Figure:
    """Rank per layer as a picture of the network: one row a block, one column a layer of the block."""
    grid = Grid.of(report.ranks)
    values = [[grid.cells.get((row, column), float("nan")) for column in grid.columns] for row in grid.rows]
    figure = Figure(figsize=(2 + 0.9 * len(grid.columns), 1.5 + 0.24 * len(grid.rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0)
    columns, rows = ([_plain(name) for name in names] for names in (grid.columns, grid.rows))
    axes.set_xticks(range(len(columns)), columns, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), [row or "outside blocks" for row in rows], fontsize=8)
    middle = max(report.ranks.values()) / 2
    for y, row in enumerate(grid.rows):
        for x, column in enumerate(grid.columns):
            if (row, column) in grid.cells:
                value = grid.cells[row, column]
                axes.text(
                    x, y, f"{value:g}", ha="center", va="center", fontsize=7, color="w" if value < middle else "k"
                )
    figure.colorbar(image, ax=axes, label="rank")
    return figure


def _plain(name: str) -> str:
    """A layer's name as matplotlib text: what stands between two dollars would be read as mathematics."""
    return name.replace("$", r"\$")


def plot_spectra(report: "EvaReport") -> Figure:
    """Cumulative explained variance of each layer's candidate components."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    colors = mpl.colormaps["viridis"]
    count = max(len(report.ranks) - 1, 1)
    for i, ratios in enumerate(report.explained_variance_ratio.values()):
        total, curve = 0.0, [0.0]
        for ratio in ratios:
            total += ratio
            curve.append(total)
        axes.plot(curve, color=colors(i / count), linewidth=0.8, alpha=0.7)
    axes.set(xlabel="components", ylabel="explained variance, cumulative", ylim=(0, 1))
    figure.colorbar(
        mpl.cm.ScalarMappable(mpl.colors.Normalize(0, count), "viridis"), ax=axes, label="layer, first to last"
    )
    return figure


def plot_convergence(report: "EvaReport") -> Figure:
    """How many layers had converged after each batch."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    axes.step(range(1, len(report.history) + 1), report.history, where="post", color="tab:blue")
    axes.axhline(len(report.ranks), color="0.5", linestyle=":", label="all layers")
    axes.set(xlabel="batch", ylabel="layers converged", ylim=(0, len(report.ranks) * 1.05))
    axes.legend()
    return figure


def render(report: "EvaReport") -> str:
    """The page as a string; every name is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("eva_lora"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    layers = [
        {
            "name": name,
            "rank": rank,
            "configured": report.configured_ranks[name],
            "captured": report.captured(name),
            "converged": report.converged[name],
            "components": report.components_converged[name],
            "statistic": report.statistic[name].get("kind", "none"),
        }
        for name, rank in report.ranks.items()
    ]
    figures = [
        ("Rank per layer", "Ranks by block and layer; every value is in the table below.", _svg(plot_ranks, report)),
        ("Explained variance", "One curve per layer; its value at the layer's rank is in the table below.",
         _svg(plot_spectra, report)),
        ("Convergence", f"{sum(report.converged.values())} of {len(layers)} layers converged "
         f"in {report.num_batches} batches.", _svg(plot_convergence, report)),
    ]  # fmt: skip
    config = {name: repr(value) for name, value in report.config.items()}
    return environment.get_template("report.html").render(
        facts=report.facts(), figures=figures, layers=layers, shared=report.shared_inputs, config=config,
        versions=report.to_dict()["versions"], notes=report.notes,
    )  # fmt: skip


def _svg(draw: "Callable[[EvaReport], Figure]", report: "EvaReport") -> Markup:
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": draw.__name__}):
        draw(report).savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return Markup(text[text.index("<svg") :])  # matplotlib escapes the names it draws
