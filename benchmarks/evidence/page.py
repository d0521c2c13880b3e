"""Tables and pictures of the pages, made from the result files.

    python -m benchmarks.evidence.page

A page marks the place of a table by ``<!-- runs: TASK -->`` (or ``rates``, ``memory``, ``verdicts``) and
``<!-- end -->``; what is between is replaced.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from . import memory
from .methods import BASELINE, STARTS
from .plots import plot, plot_rates
from .results import Results
from .running import best_rate, target_loss
from .summary import Interval, summarise
from .verdicts import verdicts

__all__ = ["PAGES", "RESULTS", "main", "pages", "table", "updated", "write_beside"]

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
PAGES = ROOT / "docs"
BLOCK = re.compile(r"(<!-- (runs|rates|memory|verdicts): (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def table(path: Path) -> str:
    """The Markdown of one task's results."""
    settings, provenance, runs = Results.load(path)
    digits = 3 if settings["higher_is_better"] and "accuracy" in settings["metric"] else 1
    digits = digits if settings["higher_is_better"] else 3
    direction = "higher" if settings["higher_is_better"] else "lower"
    baseline = settings.get("baseline", BASELINE)
    summaries = summarise(settings["methods"], settings["learning_rates"], runs, baseline)
    memory = any(one.kept_bytes != summaries[0].kept_bytes for one in summaries)
    seeds = len(settings["seeds"])
    target = target_loss(runs, baseline)
    minus = f"minus {STARTS[baseline].label}'s"
    lines = [
        f"| | {settings['metric']} ({direction} is better) | {minus} | steps to loss {target:.3f} "
        f"| {minus} | cost, in steps | both | LoRA parameters | ranks | learning rate |"
        + (" kept for backward, MiB |" if memory else ""),
        "| --- " * (10 + memory) + "|",
    ]
    for one in summaries:
        steps = _shown(one.steps, 1) + (f" ({one.missed} of {seeds} never)" if one.missed else "")
        ranks = f"{one.ranks[0]} to {one.ranks[1]}" if one.ranks[0] < one.ranks[1] else f"{one.ranks[0]}"
        cost = f"{one.cost:.1f}" + (f" ({one.forwards:.0f} forwards)" if one.forwards else "")
        lines.append(
            f"| {STARTS[one.method].label} | {_shown(one.score, digits)} "
            f"| {_compared(one.gain, digits, higher_is_better=settings['higher_is_better'])} | {steps} "
            f"| {_compared(one.steps_gain, 1, higher_is_better=False)} | {cost} | {one.steps_with_cost:.1f} "
            f"| {one.parameters:,.0f} | {ranks} | {one.learning_rate:g}{' (edge)' if one.at_edge else ''} |"
            + (f" {one.kept_bytes / 2**20:.0f} |" if memory and one.kept_bytes is not None else "")
        )
    rates = ", ".join(f"{rate:g}" for rate in settings["learning_rates"])
    minutes = sum(run.seconds for run in runs) / 60
    versions = ", ".join(f"{name} {number}" for name, number in provenance["versions"].items())
    lines += [
        "",
        f"{seeds} seeds; {settings['steps']} steps; configured rank {settings['rank']}; rates from {{{rates}}}. "
        f"{len(runs)} runs in {minutes:.0f} minutes on {provenance['threads']} thread of {provenance['device']} that "
        f"other programs shared; Python {provenance['python']}, {versions}, commit {provenance['commit']}, "
        f"{provenance['started']}, `{provenance['command']}`.",
    ]
    return "\n".join(lines) + "\n"


def rates_table(path: Path) -> str:
    """The Markdown of how each learning rate did on the tuning seed."""
    settings, _, runs = Results.load(path)
    rates = settings["learning_rates"]
    lines = [
        f"| validation loss after {settings['steps']} steps, seed {settings['tuning_seed']} "
        + "".join(f"| {rate:g} " for rate in rates)
        + "|",
        "| --- |" + " --- |" * len(rates),
    ]
    for name in settings["methods"]:
        chosen, cells = best_rate(runs, name), []
        tried = {run.learning_rate: run.curve[-1][1] for run in runs if run.tuning and run.method == name}
        for rate in rates:
            loss = f"{tried[rate]:.3f}" if rate in tried else ""
            cells.append(f"**{loss}**" if rate == chosen else loss)
        lines.append(f"| {STARTS[name].label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def memory_table(path: Path) -> str:
    """The Markdown of what the base model knows."""
    found = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        "| text | loss, nats per token | first guess is right | goes on literally: mean (most), of 32 tokens |",
        "| --- | --- | --- | --- |",
    ]
    for name, values in found.items():
        lines.append(
            f"| {name} | {values['loss']:.2f} | {values['hits']:.0%} "
            f"| {values['verbatim_mean']:.1f} ({values['verbatim_most']}) |"
        )
    return "\n".join(lines) + "\n"


def updated(text: str, results: Path = RESULTS) -> str:
    """A page's text with its tables made anew."""

    def made(match: re.Match[str]) -> str:
        opening, kind, name, _, closing = match.groups()
        places = {"memory": results / memory.FILE, "verdicts": results}
        makers = {"runs": table, "rates": rates_table, "memory": memory_table, "verdicts": verdicts}
        made = makers[kind](places.get(kind, results / f"{name}.jsonl"))
        return f"{opening}\n{made}\n{closing}"

    return BLOCK.sub(made, text)


def pages() -> Iterator[Path]:
    yield from (path for path in sorted(PAGES.rglob("*.md")) if BLOCK.search(path.read_text(encoding="utf-8")))


def write_beside(folder: Path) -> None:
    """``summary.md`` and a picture per task, in the folder of the result files."""
    draw(folder, folder)
    paths = sorted(folder.glob("*.jsonl"))
    tables = ["## Verdicts\n\n" + verdicts(folder)]
    tables += [f"## {path.stem}\n\n{table(path)}\n{rates_table(path)}" for path in paths]
    if (folder / memory.FILE).exists():
        tables.append(f"## What the language model knows\n\n{memory_table(folder / memory.FILE)}")
    (folder / "summary.md").write_text("\n".join(tables), encoding="utf-8")


def draw(results: Path, folder: Path) -> None:
    for path in sorted(results.glob("*.jsonl")):
        settings, _, runs = Results.load(path)
        baseline = settings.get("baseline", BASELINE)
        plot(settings["methods"], settings["metric"], runs, folder / f"{settings['task']}.svg", baseline)
        if len(settings["learning_rates"]) > 3:
            plot_rates(settings["methods"], runs, folder / f"{settings['task']}-rates.svg")


def main() -> None:
    draw(RESULTS, PAGES / "figures")
    for path in pages():
        path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")
        print(path.relative_to(ROOT))


def _shown(value: Interval, digits: int) -> str:
    return f"{value.mean:.{digits}f} ± {value.half:.{digits}f}"


def _compared(value: Interval | None, digits: int, *, higher_is_better: bool) -> str:
    if value is None:
        return ""
    text = f"{value.mean:+.{digits}f} ± {value.half:.{digits}f}"
    if not value.excludes_zero():
        return text
    return f"**{text}, {'better' if (value.mean > 0) == higher_is_better else 'worse'}**"


if __name__ == "__main__":
    main()
