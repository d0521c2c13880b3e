"""Figures as SVG: dots with whiskers on a logarithmic scale, scatters, and lines, with their legends inside.

On the page they take colours from its style sheet, light and dark; :func:`standalone` gives one colours of its own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH = 440  # narrow enough to be read on a phone at nearly its own size
LEFT, RIGHT, BOTTOM = 20, 20, 40
ROW, LETTER = 34, 6.3  # height of a row of dots, width of a letter of the legend
OURS = "ours"
PLOT_LEFT, PLOT_HEIGHT = 56, 230  # of scatters and lines

STYLE = """
svg { font: 12px system-ui, sans-serif; background: #fff; } text { fill: #4b5565; } .label { fill: #1c2230; }
.mid { text-anchor: middle; } .end { text-anchor: end; } .grid { stroke: #d9dee7; } .rule { stroke: #1c2230; }
.c0 { color: #1f5fae; } .c1 { color: #c2571a; } .c2 { color: #1f7a4d; } .c3 { color: #9b3d8f; }
.c4 { color: #8a6d00; } .c5 { color: #0f7f8c; } .c6 { color: #b32d4b; } .c7 { color: #5b6577; }
"""


@dataclass(frozen=True)
class Mark:
    """A value of one series, with its spread if that is known."""

    series: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Row:
    label: str
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Curve:
    series: str
    points: tuple[tuple[float, float], ...]
    joined: bool = True


class _Axis:
    """A logarithmic axis over whole decades, from values to positions."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        self.low = math.floor(math.log10(min(values)) + 1e-9)
        self.high = max(math.ceil(math.log10(max(values)) - 1e-9), self.low + 1)
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        share = (math.log10(max(value, 10.0**self.low)) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        stride = math.ceil((self.high - self.low) / 7)
        return [(self(10.0**e), _power(e)) for e in range(self.low, self.high + 1, stride)]


def _power(exponent: int) -> str:
    return f"{10.0**exponent:g}" if -4 < exponent < 4 else f"1e{exponent}"


def dots(rows: Sequence[Row], *, title: str, description: str, axis: str, rule: float | None = None) -> Markup:
    """One row per case: its name, and below it a mark per series, whiskers from the 10th to the 90th percentile."""
    colors = _colors([mark.series for row in rows for mark in row.marks])
    values = [v for row in rows for m in row.marks for v in (m.value, m.low, m.high) if v]
    scale = _Axis([*values, *([rule] if rule else [])], LEFT, WIDTH - RIGHT)
    legend, top = _legend(colors)
    height = top + ROW * len(rows) + BOTTOM
    parts = [legend]
    for x, text in scale.ticks():
        parts.append(Markup('<path class="grid" d="M{:.1f} {}V{}"/>').format(x, top, height - BOTTOM))
        parts.append(Markup('<text x="{:.1f}" y="{}" class="tick mid">{}</text>').format(x, height - 24, text))
    if rule:
        x = scale(rule)
        parts.append(Markup('<path class="rule" d="M{:.1f} {}V{}"/>').format(x, top, height - BOTTOM))
    parts.append(Markup('<text x="{}" y="{}" class="axis mid">{}</text>').format(WIDTH // 2, height - 6, axis))
    for number, row in enumerate(rows):
        y = top + ROW * number
        parts.append(Markup('<text x="{}" y="{}" class="label">{}</text>').format(LEFT, y + 12, row.label))
        parts += [_dot(mark, scale, y + 23, colors[mark.series]) for mark in reversed(row.marks)]
    return _svg(height, f"{title}. {description}", parts)


def _dot(mark: Mark, scale: _Axis, y: float, color: int) -> Markup:
    whisker = Markup("")
    if mark.low is not None and mark.high is not None:
        whisker = Markup('<path stroke="currentColor" stroke-width="2" opacity=".5" d="M{:.1f} {}H{:.1f}"/>').format(
            scale(mark.low), y, scale(mark.high)
        )
    return Markup(
        '<g class="c{}"><title>{}: {:.3g}</title>{}<circle cx="{:.1f}" cy="{}" r="4" fill="currentColor"/></g>'
    ).format(color, mark.series, mark.value, whisker, scale(mark.value), y)


def curves(lines: Sequence[Curve], *, title: str, description: str, x_axis: str, y_axis: str) -> Markup:
    """Both axes logarithmic; each series joined, or as points alone."""
    colors = _colors([line.series for line in lines])
    legend, top = _legend(colors)
    height = top + PLOT_HEIGHT + BOTTOM
    x_scale = _Axis([x for line in lines for x, _ in line.points], PLOT_LEFT, WIDTH - RIGHT)
    y_scale = _Axis([y for line in lines for _, y in line.points if y > 0] or [0.1], height - BOTTOM, top)
    parts = [legend]
    for y, text in y_scale.ticks():
        parts.append(Markup('<path class="grid" d="M{} {:.1f}H{}"/>').format(PLOT_LEFT, y, WIDTH - RIGHT))
        parts.append(Markup('<text x="{}" y="{:.1f}" class="tick end">{}</text>').format(PLOT_LEFT - 6, y + 4, text))
    for x, text in x_scale.ticks():
        parts.append(Markup('<path class="grid" d="M{:.1f} {}V{}"/>').format(x, top, height - BOTTOM))
        parts.append(Markup('<text x="{:.1f}" y="{}" class="tick mid">{}</text>').format(x, height - 24, text))
    middle = (top + height - BOTTOM) / 2
    parts.append(Markup('<text x="{}" y="{}" class="axis mid">{}</text>').format(WIDTH // 2, height - 6, x_axis))
    parts.append(
        Markup('<text x="12" y="{0}" class="axis mid" transform="rotate(-90 12 {0})">{1}</text>').format(middle, y_axis)
    )
    for line in lines:
        places = [(x_scale(x), y_scale(y)) for x, y in line.points]
        drawn = Markup("")
        if line.joined:
            path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
            drawn = Markup('<path fill="none" stroke="currentColor" stroke-width="1.5" d="{}"/>').format(path)
        for (x, y), (at, value) in zip(places, line.points, strict=True):
            drawn += Markup(
                '<circle cx="{:.1f}" cy="{:.1f}" r="4" fill="currentColor"><title>{}</title></circle>'
            ).format(x, y, f"{line.series}: {at:.3g}, {value:.3g}")
        parts.append(Markup('<g class="c{}">{}</g>').format(colors[line.series], drawn))
    return _svg(height, f"{title}. {description}", parts)


def standalone(figure: Markup) -> str:
    """The same figure as a file that brings its own colours."""
    return str(figure).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(
        ">", f"><style>{STYLE}</style>", 1
    ) + "\n"  # fmt: skip


def _colors(series: Sequence[str]) -> dict[str, int]:
    """Ours is always the first colour, and nobody else's."""
    names = dict.fromkeys(series)
    peers = [name for name in names if name != OURS]
    return ({OURS: 0} if OURS in names else {}) | {name: number % 7 + 1 for number, name in enumerate(peers)}


def _legend(colors: dict[str, int]) -> tuple[Markup, int]:
    """The names of the series, in as many lines as they need, and where the figure may begin."""
    x, y, parts = float(LEFT), 14, []
    for name, color in colors.items():
        width = 18 + LETTER * len(name)
        if x > LEFT and x + width > WIDTH - RIGHT:
            x, y = float(LEFT), y + 18
        parts.append(
            Markup(
                '<g class="c{}"><circle cx="{:.1f}" cy="{}" r="4" fill="currentColor"/></g>'
                '<text x="{:.1f}" y="{}" class="label">{}</text>'
            ).format(color, x + 4, y - 4, x + 12, y, name)
        )
        x += width + 6
    return Markup("").join(parts), y + 12


def _svg(height: float, label: str, parts: Sequence[Markup]) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, height, label, Markup("").join(parts)
    )
