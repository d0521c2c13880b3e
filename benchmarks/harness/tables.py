"""Results as tables: the same ones for the Markdown and for the page."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .regression import Change
from .results import Record, Results

MOST_BY_TILES = 1.05  # B1 in bfloat16 where the forward's products are AMX's: they leave less for ours
LOSING = 0.95  # a peer that takes less than this part of our time is faster


@dataclass(frozen=True)
class Table:
    """Cells are text; the first column names the row."""

    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        align = " --- |" + " ---: |" * (len(self.header) - 1)
        lines = ["| " + " | ".join(self.header) + " |", "|" + align]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join(lines)


def threads(info: Mapping[str, Any]) -> str:
    return f"{info['threads']} thread{'' if info['threads'] == 1 else 's'}"


def milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def mebibytes(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:,.1f}"


def factor(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def errors(record: Record, name: str) -> str:
    return ", ".join(f"{value:.1e}" if value else "0" for value in record.error(name).values())


def group_table(results: Results, group: str) -> Table:
    """One suite: our time and its spread, our part of the forward, every peer's time over ours, errors, memory.

    Facts of a case that are no whole numbers are its own figures, and have columns too.
    """
    records = results.of(group)
    peers = list(dict.fromkeys(peer for record in records for peer in record.peers))
    has = {
        "of the forward": any(record.of_forward is not None for record in records),
        "of peak": any("of_peak" in record.content for record in records),
        "of bandwidth": any("of_bandwidth" in record.content for record in records),
        "MiB": any(record.memory("ours") is not None for record in records),
        "error": any(record.error("ours") for record in records),
    }
    devices = len({record.device for record in results.records}) > 1
    own = list(dict.fromkeys(k for record in records for k, v in record.facts.items() if isinstance(v, float)))
    header = ["case", "ms", "p10 to p90", *(name for name, there in has.items() if there), *own, *peers]
    rows = []
    for record in records:
        seconds = record.seconds
        cells = {
            "of the forward": "" if record.of_forward is None else factor(record.of_forward),
            "of peak": f"{100 * record.content['of_peak']:.0f} %" if "of_peak" in record.content else "",
            "of bandwidth": f"{100 * record.content['of_bandwidth']:.0f} %" if "of_bandwidth" in record.content else "",
            "MiB": mebibytes(record.memory("ours")),
            "error": errors(record, "ours"),
        }
        rows.append(
            (
                f"{record.device}: {record.case}" if devices else record.case,
                milliseconds(seconds["median"]),
                f"{milliseconds(seconds['p10'])} to {milliseconds(seconds['p90'])}",
                *(cells[name] for name, there in has.items() if there),
                *(f"{record.facts[name]:.3g}" if name in record.facts else "" for name in own),
                *(_against(record, peer) for peer in peers),
            )
        )
    kinds = list(dict.fromkeys(kind for record in records for kind in record.error("ours")))
    note = f"Errors: {', '.join(kinds)}." if kinds else ""
    if peers:
        note += " Under each peer its time over ours, then its errors" + (" and its MiB." if has["MiB"] else ".")
    return Table(group, note.strip(), tuple(header), tuple(rows))


def _against(record: Record, peer: str) -> str:
    if peer not in record.peers:
        return ""
    size = record.memory(peer)
    parts = [f"{factor(record.ratio(peer)['median'])}x", errors(record, peer), mebibytes(size) and mebibytes(size)]
    return "; ".join(part for part in parts if part)


def losses_table(results: Results) -> Table:
    """Every case in which a peer was faster, the worst first."""
    rows = []
    for record in results.records:
        for peer in record.peers:
            ratio = record.ratio(peer)["median"]
            if ratio < LOSING:
                rows.append((ratio, record, peer))
    rows.sort(key=lambda row: row[0])
    cells = tuple(
        (
            f"{record.group}: {record.case}",
            peer,
            f"{factor(1 / ratio)}x",
            errors(record, "ours"),
            errors(record, peer),
        )
        for ratio, record, peer in rows
    )
    note = "How much faster the peer was, and the errors of both." if cells else "No peer was faster anywhere."
    return Table("Where we lose", note, ("case", "faster peer", "by", "our error", "its error"), cells)


def goals_table(results: Results) -> Table:
    """What "as accurate as it can be, cheaper than the forward pass" was set to mean, and what was reached."""
    rows: list[tuple[str, str, float, bool]] = []

    def goal(what: str, limit: str, value: float, reached: bool) -> None:
        rows.append((what, limit, value, reached))

    for record in () if results.quick else results.of("End to end"):  # two short batches are another question
        benchmark, dtype = record.facts.get("benchmark"), record.content["dtype"]
        of_forward = record.of_forward
        if of_forward is None or not record.peers:
            continue
        against = record.ratio(record.peers[0])["median"]
        ours, theirs = record.error("ours"), record.error(record.peers[0])
        is_narrow = dtype == "bfloat16"
        if benchmark == "B1":
            most, least = (MOST_BY_TILES if results.cpu_form == "amx" else 1.0, 9.0) if is_narrow else (0.9, 3.0)
            goal(f"B1 {dtype}: our pass over its full forwards", f"≤ {most}", of_forward, of_forward <= most)
            goal(f"B1 {dtype}: PEFT's time over ours", f"≥ {least:g}", against, against >= least)
            for count, share in (("16", 1.0), ("32", 1 / 3)):
                name = f"variance missed by {count}"
                ratio = ours[name] / theirs[name]
                goal(f"B1 {dtype}: {name}, over PEFT's", f"≤ {share:.2g}", ratio, ratio <= share)
            worse = record.facts["inputs worse than PEFT by 1e-4"] / record.facts["inputs compared"]
            goal(f"B1 {dtype}: inputs worse than PEFT by 1e-4", "≤ 0.05", worse, worse <= 0.05)
            if (moved := ours.get("ranks moved")) is not None:
                goal(f"B1 {dtype}: ranks unlike those of exact statistics", "≤ 0.02", moved, moved <= 0.02)
        elif benchmark == "B2":
            goal("B2: our pass over its forwards", "≤ 1.05", of_forward, of_forward <= 1.05)
            goal("B2: PEFT's time over ours", "≥ 2.2", against, against >= 2.2)
    cells = tuple((what, limit, f"{value:.3g}", "yes" if reached else "**no**") for what, limit, value, reached in rows)
    return Table("Goals", "", ("goal", "limit", "measured", "reached"), cells)


def parts_table(results: Results) -> Table:
    """Where the time of a whole pass goes."""
    records = [record for record in results.of("End to end") if "parts" in record.facts]
    names = list(dict.fromkeys(name for record in records for name in record.facts["parts"]))
    rows = tuple(
        (record.case, *(f"{100 * record.facts['parts'][name]:.0f} %" for name in names),
         mebibytes(record.facts["bytes of states"]), mebibytes(_beyond_forward(record)))
        for record in records
    )  # fmt: skip
    note = (
        "Shares of the first, instrumented pass. States: MiB of all statistics. Beyond the forward: MiB by which "
        "the process grew in that pass, less what it grew by in a few whole forwards before."
    )
    return Table("Parts of a pass", note, ("case", *names, "states", "beyond the forward"), rows)


def _beyond_forward(record: Record) -> int | None:
    ours, forward = record.memory("ours"), record.memory("forward")
    return None if ours is None or forward is None else ours - forward


def changes_table(found: Sequence[Change]) -> Table:
    """Against an earlier run; what is the same within noise is counted only."""
    rows = tuple(
        (f"{entry.record.group}: {entry.record.case}", f"{entry.factor:.2f}", f"{entry.noise:.2f}", entry.verdict)
        for entry in found
        if entry.verdict != "same"
    )
    same = sum(entry.verdict == "same" for entry in found)
    middle = f"; the median factor is {statistics.median(entry.factor for entry in found):.2f}" if found else ""
    note = f"{len(found)} cases in both runs, {same} the same within noise{middle}."
    return Table("Against the earlier run", note, ("case", "cost now over then", "noise up to", "verdict"), rows)


def provenance_rows(results: Results) -> list[tuple[str, str]]:
    rows = []
    for info in results.machine.values():
        rates = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s {dtype}" for dtype, rate in info["flop_rate"].items())
        rows += [
            ("device", f"{info['device']}, {info['cores']} cores, {threads(info)}"),
            ("form of the compiled code", str(info.get("cpu_form", "none"))),
            ("measured peaks", f"{rates}, {info['copy_rate'] / 1e9:,.0f} GB/s of a copy"),
            ("versions", ", ".join(f"{name} {info[name]}" for name in ("python", "torch", "numpy", "peft",
                                   "transformers", "scikit-learn", "torch-incremental-pca"))),
            ("commit", str(info["commit"])),
        ]  # fmt: skip
    rows += [("command", f"`{results.command}`"), ("gate", results.gate)]
    total = sum(suite["seconds"] for suite in results.suites.values())
    failed = [name for name, suite in results.suites.items() if suite["status"] != "passed"]
    rows.append(
        ("suites", f"{len(results.suites)} in {total / 60:.1f} minutes" + "".join(f", {n} FAILED" for n in failed))
    )
    return rows
