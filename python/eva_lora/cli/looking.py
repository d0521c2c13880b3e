"""``eva-lora report`` and ``eva-lora compare``: what a run did, and how two differ."""

from importlib.resources import files
from pathlib import Path

import click

from .running import Command, json_option, print_facts, print_json, print_table


@click.command(cls=Command, name="report")
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), help="Write page, JSON and plots here.")
@click.option("--plots", multiple=True, type=click.Choice(["png", "svg", "pdf"]), help="Formats of plots to write.")
@click.option("--schema", is_flag=True, help="Print the JSON schema of report.json.")
@json_option
def report(path: Path | None, output: Path | None, plots: tuple[str, ...], schema: bool, as_json: bool) -> None:
    """Show a saved report: PATH is a report.json, its folder, or a folder that init wrote."""
    if schema:
        click.echo(files("eva_lora.reporting").joinpath("report.schema.json").read_text(encoding="utf-8"), nl=False)
        return
    if path is None:
        raise click.UsageError("Missing argument 'PATH'.")
    if plots and output is None:
        raise click.UsageError("--plots needs --output")
    from .. import EvaReport

    inner = path / "report"
    loaded = EvaReport.load(inner if (inner / "report.json").is_file() else path)
    if output is not None:
        loaded.save(output, plots=plots)
    if as_json:
        print_json(loaded.to_dict())
        return
    click.echo(str(loaded))


@click.command(cls=Command, name="compare")
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@json_option
def compare(first: Path, second: Path, as_json: bool) -> None:
    """Compare two runs: how far their subspaces overlap, how their ranks differ.

    FIRST and SECOND are folders that init wrote, plan files, or PEFT adapter folders.
    """
    from ..reporting import compare as compare_runs
    from ..reporting import load_directions

    result = compare_runs(load_directions(first), load_directions(second))
    if as_json:
        print_json(result.to_dict())
        return
    rows = [
        (name, a, b, f"{b - a:+d}" if b != a else "0", "-" if overlap is None else f"{overlap:.3f}")
        for (name, (a, b)), overlap in zip(result.ranks.items(), result.overlap.values(), strict=True)
    ]
    print_table(["layer", "first", "second", "change", "overlap"], rows)
    click.echo()
    mean = "-" if result.mean_overlap is None else f"{result.mean_overlap:.3f}"
    print_facts([("overlap", f"{mean}, mean over components"), ("ranks moved", str(result.moved))])
