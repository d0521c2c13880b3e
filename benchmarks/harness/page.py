"""A run's results as one Markdown text and one HTML page that needs nothing but itself."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from .plots import figures_of
from .regression import Change
from .results import Results
from .tables import Table, changes_table, goals_table, group_table, losses_table, parts_table, provenance_rows

WARNING = "A quick run: every path was run, but its figures mean nothing."


def tables_of(results: Results, found: Sequence[Change] | None) -> list[Table]:
    """What leads a report: goals, where the time goes, where we lose, what changed."""
    tables = [table for table in (goals_table(results), parts_table(results)) if table.rows]
    tables.append(losses_table(results))
    return [*tables, changes_table(found)] if found is not None else tables


def markdown(results: Results, found: Sequence[Change] | None = None) -> str:
    lines = [f"**{WARNING}**", ""] if results.quick else []
    lines += [f"- {label}: {value}" for label, value in provenance_rows(results)]
    for table in [*tables_of(results, found), *(group_table(results, group) for group in results.groups)]:
        lines += ["", f"### {table.title}", ""]
        lines += [table.note, ""] if table.note else []
        lines += [table.markdown()] if table.rows else []
    return "\n".join(lines) + "\n"


def render(results: Results, found: Sequence[Change] | None = None) -> str:
    """The page."""
    loader = jinja2.ChoiceLoader(
        [jinja2.FileSystemLoader(Path(__file__).parent / "templates"), jinja2.PackageLoader("eva_lora.reporting")]
    )
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    content: dict[str, Any] = {
        "facts": provenance_rows(results),
        "warnings": _warnings(results, found),
        "leading": tables_of(results, found),
        "groups": [(group_table(results, group), figures_of(results, group)) for group in results.groups],
    }
    return environment.get_template("benchmarks.html").render(content)


def _warnings(results: Results, found: Sequence[Change] | None) -> list[str]:
    warnings = [WARNING] if results.quick else []
    warnings += [f"suite {name}: {s['status']}" for name, s in results.suites.items() if s["status"] != "passed"]
    slower = [entry for entry in found or () if entry.verdict == "slower"]
    return warnings + [f"{e.record.group}: {e.record.case} costs {e.factor:.2f} times what it did" for e in slower]
