"""Line charts as SVG that takes its colours from the page, so that they follow its light and dark modes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

__all__ = ["Line", "line_chart", "sparkline"]

WIDTH, HEIGHT = 440, 280
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 40  # margins

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        points: (x, y), in the order they are joined.
        label: What a pointer resting on it is told.
        color: Index into the page's palette.
        key: Goes into ``data-key``, by which the page's script finds it.
        mark: A point to emphasise.
        step: Whether the value holds until the next point.
    """

    points: Points
    label: str
    color: int = 0
    key: str = ""
    mark: tuple[float, float] | None = None
    step: bool = False


class _Scale:
    """A linear or logarithmic axis, from values to positions."""

    def __init__(self, low: float, high: float, start: float, end: float, *, log: bool = False) -> None:
        self.log, self.start, self.end = log, start, end
        if log:
            low, high = math.floor(math.log10(low)), math.ceil(math.log10(high))
        self.low, self.high = low, high if high > low else low + 1

    def __call__(self, value: float) -> float:
        if self.log:
            value = math.log10(max(value, 10.0**self.low))
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        if self.log:
            stride = math.ceil((self.high - self.low) / 6)
            return [
                (10.0**e, f"1e{e}" if e < -3 else f"{10.0**e:g}")
                for e in range(int(self.low), int(self.high) + 1, stride)
            ]
        span = self.high - self.low
        step = 10.0 ** math.floor(math.log10(span / 4))
        step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 6)
        first = math.ceil(self.low / step)
        count = math.floor(self.high / step + 1e-9) - first + 1
        return [((first + i) * step, f"{round((first + i) * step, 10):g}") for i in range(count)]


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    description: str,
    x_label: str,
    y_label: str,
    log: bool = False,
    y_range: tuple[float, float] | None = None,
    rule: tuple[float, str] | None = None,
) -> Markup:
    """An ``<svg>`` with axes. ``title`` and ``description`` are its text alternative.

    Args:
        lines: At least one, with at least one point among them.
        log: Logarithmic y axis; values at or below 0 stand at its lower end.
        y_range: Ends of the y axis. None: those of the values.
        rule: A y value to mark by a dashed line, and what to call it.
    """
    points = [point for line in lines for point in line.points]
    ys = [y for _, y in points if y > 0 or not log] + ([rule[0]] if rule else [])
    low, high = y_range or (min(ys, default=0.1 if log else 0.0), max(ys, default=1.0))
    x_scale = _Scale(min(x for x, _ in points), max(x for x, _ in points), LEFT, WIDTH - RIGHT)
    y_scale = _Scale(low, high, HEIGHT - BOTTOM, TOP, log=log)
    parts = []
    for value, text in y_scale.ticks():
        y = y_scale(value)
        parts.append(Markup('<path class="grid" d="M{} {:.1f}H{}"/>').format(LEFT, y, WIDTH - RIGHT))
        parts.append(Markup('<text x="{}" y="{:.1f}" class="tick end">{}</text>').format(LEFT - 6, y + 4, text))
    for value, text in x_scale.ticks():
        if value == int(value):  # components and batches come whole
            x = x_scale(value)
            parts.append(Markup('<text x="{:.1f}" y="{}" class="tick mid">{}</text>').format(x, HEIGHT - 22, text))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        Markup('<text x="{}" y="{}" class="axis mid">{}</text>').format((LEFT + WIDTH) // 2, HEIGHT - 4, x_label)
    )
    parts.append(
        Markup('<text x="12" y="{0}" class="axis mid" transform="rotate(-90 12 {0})">{1}</text>').format(
            middle, y_label
        )
    )
    for line in lines:
        parts.append(_drawn(line, x_scale, y_scale))
    if rule:
        y = y_scale(rule[0])
        parts.append(Markup('<path class="rule" d="M{} {:.1f}H{}"/>').format(LEFT, y, WIDTH - RIGHT))
        parts.append(
            Markup('<text x="{}" y="{:.1f}" class="tick end rule-text">{}</text>').format(WIDTH - RIGHT, y - 5, rule[1])
        )
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, f"{title}. {description}", Markup("").join(parts)
    )


def _drawn(line: Line, x_scale: _Scale, y_scale: _Scale) -> Markup:
    path, before = "", 0.0
    for index, (x, y) in enumerate(line.points):
        if index and line.step:
            path += f"L{x_scale(x):.1f} {y_scale(before):.1f}"
        path += f"{'L' if index else 'M'}{x_scale(x):.1f} {y_scale(y):.1f}"
        before = y
    if len(line.points) == 1:
        path += "h.1"  # a path of one point draws nothing; this shows as a dot
    mark = Markup("")
    if line.mark:
        mark = Markup('<circle cx="{:.1f}" cy="{:.1f}" r="2"/>').format(x_scale(line.mark[0]), y_scale(line.mark[1]))
    return Markup('<g class="line c{}" data-key="{}"><title>{}</title><path d="{}"/>{}</g>').format(
        line.color, line.key, line.label, path, mark
    )


def sparkline(values: Sequence[float], kept: int, label: str) -> Markup:
    """A word-sized picture of cumulative shares in [0, 1]; what the first ``kept`` reach is filled."""
    width, height = 80, 20
    steps = max(len(values), 1)
    total, curve = 0.0, [(0.0, float(height))]
    for index, value in enumerate(values, 1):
        total += value
        curve.append((index / steps * width, height * (1 - min(total, 1.0))))
    joined = ["L".join(f"{x:.1f} {y:.1f}" for x, y in points) for points in (curve, curve[: kept + 1])]
    edge = curve[min(kept, len(curve) - 1)][0]
    return Markup(
        '<svg viewBox="0 0 {0} {1}" width="{0}" height="{1}" class="spark" role="img" aria-label="{2}">'
        '<path class="area" d="M{3}L{4:.1f} {1}Z"/><path d="M{5}"/></svg>'
    ).format(width, height, label, joined[1], edge, joined[0])
