"""The report as one HTML page that needs nothing but itself, and as a fragment for notebooks."""

from collections import defaultdict
from dataclasses import fields
from itertools import accumulate
from typing import Any

import jinja2
from markupsafe import Markup

from ..config import EvaConfig
from .charts import Line, line_chart, sparkline
from .facts import ReportFacts
from .layout import Grid, short_names, split_name

__all__ = ["render", "render_fragment"]

PALETTE = 8  # colours the page's style sheet defines


def render(report: ReportFacts) -> str:
    """The page; every name in it is escaped."""
    return _environment().get_template("report.html").render(_content(report))


def render_fragment(report: ReportFacts) -> str:
    """Summary, warnings and the picture of the network, to stand inside another page."""
    content = {"facts": report.facts(), "warnings": report.warnings(), "network": _network(report)}
    return _environment().get_template("fragment.html").render(content)


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("eva_lora.reporting"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip


def _content(report: ReportFacts) -> dict[str, Any]:
    layers = list(report.ranks)
    index = {name: i for i, name in enumerate(layers)}
    return {
        "facts": report.facts(),
        "run": report.run,
        "warnings": report.warnings(),
        "network": _network(report),
        "legend": _legend(report),
        "budgets": [("By kind of layer", _budget(report, 1)), ("By block", _budget(report, 0))],
        "charts": _charts(report, index),
        "layers": [_row(report, name) for name in layers],
        "shared": [[(index[name], name) for name in names] for names in report.shared_inputs],
        "num_inputs": len(report.inputs()),
        "costs": _costs(report),
        "memory": _memory(report),
        "call": _call(report),
        "options": {name: repr(value) for name, value in report.config.items()},
        "versions": report.versions,
    }


def _network(report: ReportFacts) -> dict[str, Any]:
    """The grid of ranks as rows of cells: link target, rank, share of the largest rank, description."""
    grid = Grid.of(report.ranks)
    names = {split_name(name): (i, name) for i, name in enumerate(report.ranks)}
    largest = max(max(report.ranks.values()), 1)
    rows = []
    for block in grid.rows:
        cells: list[dict[str, Any] | None] = []
        for column in grid.columns:
            if (block, column) not in names:
                cells.append(None)
                continue
            index, name = names[block, column]
            rank, configured = report.ranks[name], report.configured_ranks[name]
            share = f"{100 * report.captured(name):.1f} %"
            text = f"{name}: rank {rank}, configured {configured}, captures {share} of its input's variance"
            cells.append({"index": index, "rank": rank, "level": rank / largest, "text": text})
        rows.append((_short_block(block), cells))
    return {
        "columns": list(zip(short_names(grid.columns), grid.columns, strict=True)),
        "rows": rows,
        "largest": largest,
        "smallest": min(report.ranks.values()),
    }


def _short_block(block: str) -> str:
    return block.rpartition(".")[2] if block else "outside"


def _color_of(report: ReportFacts) -> dict[str, int]:
    columns = Grid.of(report.ranks).columns
    return {name: columns.index(split_name(name)[1]) % PALETTE for name in report.ranks}


def _legend(report: ReportFacts) -> list[tuple[int, str]]:
    """Of the curves, which are drawn once for all layers that share an input: colour, kinds of layer."""
    columns = Grid.of(report.ranks).columns
    short = dict(zip(columns, short_names(columns), strict=True))
    colors = _color_of(report)
    kinds: dict[int, dict[str, None]] = defaultdict(dict)  # ordered sets
    for names in report.inputs():
        kinds[colors[names[0]]].update(dict.fromkeys(short[split_name(name)[1]] for name in names))
    return [(color, ", ".join(kinds[color])) for color in sorted(kinds)]


def _budget(report: ReportFacts, part: int) -> list[dict[str, Any]]:
    """Configured and given ranks summed by block (part 0) or by kind of layer (part 1)."""
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for name, rank in report.ranks.items():
        entry = sums[split_name(name)[part]]
        entry[0] += report.configured_ranks[name]
        entry[1] += rank
    largest = max(max(abs(given - configured) for configured, given in sums.values()), 1)
    labels = [_short_block(name) for name in sums] if part == 0 else short_names(list(sums))
    return [
        {"name": label, "configured": configured, "given": given, "change": given - configured,
         "share": abs(given - configured) / largest}
        for label, (configured, given) in zip(labels, sums.values(), strict=True)
    ]  # fmt: skip


def _charts(report: ReportFacts, index: dict[str, int]) -> dict[str, Markup | None]:
    colors = _color_of(report)
    spectra, cumulative = [], []
    for names in report.inputs():
        first, label, key = names[0], ", ".join(names), _key(names, index)
        ratios = report.explained_variance_ratio[first]
        if not ratios:  # a layer that saw no input
            continue
        curve = list(enumerate(accumulate(ratios, initial=0.0)))
        spectra.append(Line(list(enumerate(ratios, 1)), label, colors[first], key))
        cumulative.append(Line(curve, label, colors[first], key, mark=curve[min(report.ranks[first], len(ratios))]))
    captured = sorted(report.captured(name) for name in report.ranks)
    told = f"{len(spectra)} curves, one per distinct input"
    reached = ", ".join(f"{100 * captured[i]:.1f} %" for i in (0, len(captured) // 2, -1))
    return {
        "spectrum": line_chart(
            spectra, title="Spectrum", description=f"{told}: explained-variance ratio of each candidate component.",
            x_label="component", y_label="explained-variance ratio", log=True,
        ),
        "cumulative": line_chart(
            cumulative, title="Cumulative explained variance",
            description=f"{told}. Least, median and most that a layer captures at its rank: {reached}.",
            x_label="components", y_label="explained variance", y_range=(0, 1),
        ),
        "history": line_chart(
            [Line(list(enumerate(report.history, 1)), "layers converged", step=True)],
            title="Layers converged",
            description=f"{sum(report.converged.values())} of {len(report.ranks)} layers had converged after "
            f"{report.num_batches} batches.",
            x_label="batch", y_label="layers converged", y_range=(0, len(report.ranks)),
        ) if report.history else None,
        "agreement": _agreement_chart(report, colors, index),
    }  # fmt: skip


def _agreement_chart(report: ReportFacts, colors: dict[str, int], index: dict[str, int]) -> Markup | None:
    lines = []
    for names in report.inputs():
        site = index[names[0]]
        values = [agreement[site] for agreement in report.trace.agreement]
        points = [(b, 1 - v) for b, v in zip(report.trace.batch, values, strict=True) if v is not None]
        if points:
            lines.append(Line(points, ", ".join(names), colors[names[0]], _key(names, index)))
    if not lines:
        return None
    threshold = 1 - report.config.get("tau", EvaConfig.tau)
    last = sorted(line.points[-1][1] for line in lines)
    return line_chart(
        lines, title="Change at each refresh",
        description="Share of each layer's leading components that changed; a layer converges below 1 minus tau, "
        f"{threshold:.3g}. At the end from {last[0]:.1e} to {last[-1]:.1e}.",
        x_label="batch", y_label="share changed", log=True,
        rule=(threshold, f"1 - tau = {threshold:.3g}") if threshold > 0 else None,
    )  # fmt: skip


def _key(names: list[str], index: dict[str, int]) -> str:
    return " ".join(str(index[name]) for name in names)


def _row(report: ReportFacts, name: str) -> dict[str, Any]:
    ratios, captured = report.explained_variance_ratio[name], report.captured(name)
    return {
        "name": name,
        "rank": report.ranks[name],
        "configured": report.configured_ranks[name],
        "change": report.ranks[name] - report.configured_ranks[name],
        "width": report.in_features.get(name),
        "captured": captured,
        "gain": report.feature_gain.get(name),
        "converged": report.converged[name],
        "components": report.components_converged[name],
        "batch": _converged_at(report, name),
        "statistic": report.statistic[name].get("kind", "none"),
        "reason": report.statistic[name].get("reason", "saw no input"),
        "spark": sparkline(
            ratios, report.ranks[name], f"cumulative explained variance, {100 * captured:.1f} % at the rank"
        ),
    }


def _converged_at(report: ReportFacts, name: str) -> int | None:
    """The batch from which on the layer stayed converged."""
    site, batch = list(report.ranks).index(name), None
    for at, converged in zip(report.trace.batch, report.trace.converged, strict=True):
        batch = (batch or at) if converged[site] else None
    return batch


def _costs(report: ReportFacts) -> list[dict[str, Any]]:
    """Parts of the wall time, which together are all of it."""
    seconds = report.seconds
    statistics = seconds.get("statistics", 0.0)
    parts = [
        ("forward passes", seconds["forward"] - statistics),
        ("statistics", statistics),
        ("small algebra", seconds["refresh"]),
        ("loading batches and the rest", max(seconds["total"] - seconds["forward"] - seconds["refresh"], 0.0)),
    ]
    total = max(seconds["total"], 1e-9)
    return [{"name": name, "seconds": value, "share": value / total} for name, value in parts]


def _memory(report: ReportFacts) -> list[tuple[str, int]]:
    states = sum(report.statistic[names[0]].get("nbytes", 0) for names in report.inputs())
    peaks = [
        ("peak of the process" if device == "cpu" else f"peak of PyTorch on {device}", nbytes)
        for device, nbytes in report.peak_memory.items()
    ]
    return [("statistics", states), *peaks]


def _call(report: ReportFacts) -> str:
    """The library call, with the options that differ from their defaults."""
    defaults = {f.name: f.default for f in fields(EvaConfig)}
    changed = [f"{k}={v!r}" for k, v in report.config.items() if k not in defaults or defaults[k] != v]
    return f"eva_initialize(model, loader, EvaConfig({', '.join(changed)}))"
