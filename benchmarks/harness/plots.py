"""Which figures are drawn of a run's results."""

from collections.abc import Iterator, Mapping

from markupsafe import Markup

from .figures import OURS, Curve, Mark, Row, curves, dots
from .results import Record, Results

SCALING = "Scaling"


def figures_of(results: Results, group: str) -> dict[str, Markup]:
    """A suite's figures by a short name: time, peers, forward, memory, accuracy; or its curves."""
    records = results.of(group)
    if group == SCALING:
        return dict(_scaling(records))
    found = {"time": _times(records)}
    if any(record.peers for record in records):
        found["peers"] = _peers(records)
    if any(record.of_forward is not None for record in records):
        found["forward"] = forward_figure(records)
    if any(record.memory(OURS) for record in records):
        found["memory"] = _memory(records)
    for record in records:
        if record.peers and any(kind.startswith("variance missed") for kind in record.error("ours")):
            found[f"accuracy against cost: {record.case}"] = accuracy_figure(record)
    return found


def _times(records: list[Record]) -> Markup:
    rows = []
    for record in records:
        seconds: Mapping[str, Mapping[str, float]] = record.content["seconds"]
        marks = [
            Mark(name, *(1e3 * seconds[name][part] for part in ("median", "p10", "p90")))
            for name in (OURS, *record.peers)
        ]
        rows.append(Row(record.case, tuple(marks)))
    description = "; ".join(f"{row.label}: ours {row.marks[0].value:.3g} ms" for row in rows)
    return dots(rows, title="Time", description=description, axis="milliseconds a call, 10th to 90th percentile")


def _peers(records: list[Record]) -> Markup:
    rows = []
    for record in records:
        ratios = {peer: record.ratio(peer) for peer in record.peers}
        marks = tuple(Mark(peer, r["median"], r["p10"], r["p90"]) for peer, r in ratios.items())
        if marks:
            rows.append(Row(record.case, marks))
    description = "; ".join(
        f"{row.label}: " + ", ".join(f"{mark.series} {mark.value:.3g}" for mark in row.marks) for row in rows
    )
    return dots(
        rows, title="Peers", description=description, axis="peer's time over ours; right of the line we are faster",
        rule=1.0,
    )  # fmt: skip


def forward_figure(records: list[Record]) -> Markup:
    rows = []
    for record in records:
        if record.of_forward is not None:
            share, ratio = record.content["forward_share"], record.ratio("forward")
            mark = Mark(OURS, record.of_forward, share / ratio["p90"], share / ratio["p10"])
            rows.append(Row(record.case, (mark,)))
    description = "; ".join(f"{row.label}: {row.marks[0].value:.3g}" for row in rows)
    return dots(
        rows, title="Ratio to the forward", description=description,
        axis="our time over the forward's; left of the line we are cheaper", rule=1.0,
    )  # fmt: skip


def _memory(records: list[Record]) -> Markup:
    rows = []
    for record in records:
        sizes = {name: record.memory(name) for name in (OURS, *record.peers)}
        marks = tuple(Mark(name, size / 2**20) for name, size in sizes.items() if size and size > 0)
        if marks:
            rows.append(Row(record.case, marks))
    description = "; ".join(f"{row.label}: {row.marks[0].series} {row.marks[0].value:.3g} MiB" for row in rows)
    return dots(rows, title="Memory", description=description, axis="MiB at the peak, beyond what stood before")


def accuracy_figure(record: Record) -> Markup:
    """Accuracy against cost: down and to the left is better."""
    seconds = record.content["seconds"]
    found = []
    for name in (OURS, *record.peers):
        errors = [value for kind, value in record.error(name).items() if kind.startswith("variance missed")]
        if errors and errors[-1] > 0:
            found.append(Curve(name, ((1e3 * seconds[name]["median"], errors[-1]),), joined=False))
    kinds = [kind for kind in record.error("ours") if kind.startswith("variance missed")]
    description = f"{record.case}: " + "; ".join(
        f"{curve.series} {curve.points[0][0]:.3g} ms, {curve.points[0][1]:.1e}" for curve in found
    )
    return curves(
        found, title="Accuracy against cost", description=description, x_axis="milliseconds", y_axis=kinds[-1]
    )


def _scaling(records: list[Record]) -> Iterator[tuple[str, Markup]]:
    for axis in dict.fromkeys(record.facts["axis"] for record in records):
        mine = [record for record in records if record.facts["axis"] == axis]
        found = []
        for name in dict.fromkeys(record.facts["curve"] for record in mine):
            points = sorted((r.facts["x"], 1e3 * r.seconds["median"]) for r in mine if r.facts["curve"] == name)
            found.append(Curve(name, tuple(points)))
        description = "; ".join(
            f"{curve.series}: " + ", ".join(f"{x} {y:.3g} ms" for x, y in curve.points) for curve in found
        )
        yield (
            axis,
            curves(found, title=f"Scaling in {axis}", description=description, x_axis=axis, y_axis="milliseconds"),
        )
