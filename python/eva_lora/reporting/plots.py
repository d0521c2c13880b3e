"""Figures of a report for papers and notebooks, drawn by matplotlib."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import accumulate
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from ..config import EvaConfig
from .facts import ReportFacts
from .layer_repair import LayerRepair
from .layout import Grid, short_names, split_name

__all__ = ["plot_budget", "plot_convergence", "plot_ranks", "plot_repair", "plot_spectra", "save_all", "save_figure"]


def plot_ranks(report: ReportFacts) -> Figure:
    """Rank per layer as a picture of the network: one row a block, one column a layer of the block."""
    grid = Grid.of(report.ranks)
    values = [[grid.cells.get((row, column), float("nan")) for column in grid.columns] for row in grid.rows]
    figure = Figure(figsize=(2 + 0.9 * len(grid.columns), 1.5 + 0.24 * len(grid.rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0)
    axes.set_xticks(
        range(len(grid.columns)), short_names(grid.columns), rotation=35, ha="right", rotation_mode="anchor"
    )
    axes.set_yticks(range(len(grid.rows)), [row or "outside blocks" for row in grid.rows], fontsize=8)
    middle = max(report.ranks.values()) / 2
    for y, row in enumerate(grid.rows):
        for x, column in enumerate(grid.columns):
            if (row, column) in grid.cells:
                value = grid.cells[row, column]
                color = "w" if value < middle else "k"
                axes.text(x, y, f"{value:g}", ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(image, ax=axes, label="rank")
    return figure


def plot_spectra(report: ReportFacts) -> Figure:
    """Explained variance of each layer's candidate components: each one's, and cumulative."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    single, cumulative = figure.subplots(1, 2)
    columns = Grid.of(report.ranks).columns
    colors = mpl.colormaps["tab10"]
    labels = dict(zip(columns, short_names(columns), strict=True))
    for name, ratios in report.explained_variance_ratio.items():
        column = split_name(name)[1]
        style = {"color": colors(columns.index(column) % 10), "linewidth": 0.8, "alpha": 0.7}
        single.plot(range(1, len(ratios) + 1), ratios, **style)
        curve = [0.0, *accumulate(ratios)]
        rank = min(report.ranks[name], len(ratios))
        cumulative.plot(curve, label=labels.pop(column, None), **style)
        cumulative.plot(rank, curve[rank], ".", markersize=3, color=style["color"], label="_")
    if any(any(ratios) for ratios in report.explained_variance_ratio.values()):
        single.set_yscale("log")
    single.set(xlabel="component", ylabel="explained-variance ratio")
    cumulative.set(xlabel="components", ylabel="explained variance, cumulative", ylim=(0, 1))
    cumulative.legend(fontsize=7)
    return figure


def plot_convergence(report: ReportFacts) -> Figure:
    """Layers converged after each batch, and how far each layer was from the threshold."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    count, change = figure.subplots(1, 2)
    count.step(range(1, len(report.history) + 1), report.history, where="post", color="tab:blue")
    count.axhline(len(report.ranks), color="0.5", linestyle=":", label="all layers")
    count.set(xlabel="batch", ylabel="layers converged", ylim=(0, len(report.ranks) * 1.05))
    count.legend()
    for site in range(len(report.ranks)):
        values = [agreement[site] for agreement in report.trace.agreement]
        points = [(b, 1 - v) for b, v in zip(report.trace.batch, values, strict=True) if v is not None and v < 1]
        if points:
            change.plot(*zip(*points, strict=True), color="tab:blue", linewidth=0.8, alpha=0.4)
    threshold = 1 - report.config.get("tau", EvaConfig.tau)
    if threshold > 0:
        change.axhline(threshold, color="0.3", linestyle="--", label="1 - tau")
        change.legend()
        change.set_yscale("log")
    change.set(xlabel="batch", ylabel="share of components changed")
    return figure


def plot_budget(report: ReportFacts) -> Figure:
    """Ranks given and taken against the configured ones, by kind of layer and by block."""
    blocks = Grid.of(report.ranks)
    size = max(len(blocks.rows), len(blocks.columns))
    figure = Figure(figsize=(10, 1.2 + 0.22 * size), layout="constrained")
    for axes, part, label in zip(figure.subplots(1, 2), (1, 0), ("kind of layer", "block"), strict=True):
        changes: dict[str, int] = defaultdict(int)
        for name, rank in report.ranks.items():
            changes[split_name(name)[part]] += rank - report.configured_ranks[name]
        names = short_names(list(changes)) if part else [name or "outside blocks" for name in changes]
        colors = ["tab:green" if change > 0 else "tab:red" for change in changes.values()]
        axes.barh(range(len(changes)), list(changes.values()), color=colors)
        axes.set_yticks(range(len(changes)), names, fontsize=8)
        axes.invert_yaxis()
        axes.axvline(0, color="0.5", linewidth=0.8)
        axes.set(xlabel="ranks against the configured ones", title=label)
    return figure


def plot_repair(layers: Mapping[str, LayerRepair]) -> Figure:
    """Each layer's output error without and with the fit, one panel a kind of layer, over the blocks."""
    grid = Grid.of({name: layer.rank for name, layer in layers.items()})
    names = {split_name(name): name for name in layers}
    columns = min(4, len(grid.columns))
    lines = -(-len(grid.columns) // columns)
    figure = Figure(figsize=(2.6 * columns + 0.6, 2.1 * lines + 0.6), layout="constrained")
    panels = list(figure.subplots(lines, columns, sharey=True, squeeze=False).flat)
    for axes, column, label in zip(panels[: len(grid.columns)], grid.columns, short_names(grid.columns), strict=True):
        found = [(x, layers[names[row, column]]) for x, row in enumerate(grid.rows) if (row, column) in names]
        pairs = [(x, layer.held or layer.fitted) for x, layer in found]
        for which, (style, text) in enumerate((("o", "without the fit"), ("s", "with"))):
            axes.plot([x for x, _ in pairs], [pair[which] for _, pair in pairs], style, markersize=3, label=text)
        axes.vlines([x for x, _ in pairs], [b for _, (_, b) in pairs], [a for _, (a, _) in pairs], "0.7", linewidth=0.8)
        axes.set_title(label, fontsize=9)
        axes.set_xticks([])
    panels[0].set_ylim(bottom=0, top=1.05 * max((max(la.held or la.fitted) for la in layers.values()), default=1) or 1)
    for axes in panels[len(grid.columns) :]:
        axes.set_axis_off()
    held = any(layer.held for layer in layers.values())
    figure.supylabel("output error" + (", held back" if held else ", rows of the fit"), fontsize=9)
    figure.supxlabel("blocks, first to last", fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize=7)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure; the same one gives the same file."""
    suffix = path.suffix
    metadata = {"Date": None} if suffix == ".svg" else {"CreationDate": None} if suffix == ".pdf" else None
    with mpl.rc_context({"svg.hashsalt": "eva"}):
        figure.savefig(path, dpi=200, metadata=metadata)


def save_all(report: ReportFacts, folder: Path, formats: Iterable[str]) -> list[Path]:
    """Every figure in every format, as ``ranks.svg`` and so on; returns the paths."""
    figures = {"ranks": plot_ranks, "spectra": plot_spectra, "convergence": plot_convergence, "budget": plot_budget}
    paths = []
    for suffix in formats:
        for name, draw in figures.items():
            paths.append(folder / f"{name}.{suffix}")
            save_figure(draw(report), paths[-1])
    return paths
