"""``eva-lora report`` and ``eva-lora compare``: what a run did, and how two differ."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import click

from .options import FROM_GRADIENTS, METHODS
from .running import Command, json_option, print_facts, print_json, print_table, require_run


@click.command(cls=Command, name="report")
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), help="Write page, JSON and plots here.")
@click.option("--plots", multiple=True, type=click.Choice(["png", "svg", "pdf"]), help="Formats of plots to write.")
@click.option("--schema", is_flag=True, help="Print the JSON schema of report.json.")
@json_option
def report(path: Path | None, output: Path | None, plots: tuple[str, ...], schema: bool, as_json: bool) -> None:
    """Show a saved report: PATH is a report.json, its folder, or a folder that init wrote.

    Reports of other methods (start.json) and of repairs (repair.json) are shown, too.
    """
    if schema:
        click.echo(files("eva_lora.reporting").joinpath("report.schema.json").read_text(encoding="utf-8"), nl=False)
        return
    if path is None:
        raise click.UsageError("Missing argument 'PATH'.")
    if plots and output is None:
        raise click.UsageError("--plots needs --output")
    from .. import EvaReport

    loaded = _saved(path)
    if plots and not isinstance(loaded, EvaReport):
        raise click.UsageError("--plots: only reports of EVA have a choice of them")
    if output is not None:
        loaded.save(output, **({"plots": plots} if plots else {}))
    if as_json:
        print_json(loaded.to_dict())
        return
    click.echo(str(loaded))


def _saved(path: Path) -> Any:
    """The report that a path names, of whichever kind."""
    from .. import EvaReport, RepairReport, StartReport

    kinds: dict[str, Any] = {"report.json": EvaReport, "start.json": StartReport, "repair.json": RepairReport}
    for folder in (path / "report", path):
        for name, kind in kinds.items():
            if (folder / name).is_file():
                return kind.load(folder)
    return kinds.get(path.name, EvaReport).load(path)


@click.command(cls=Command, name="compare")
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", required=False, type=click.Path(path_type=Path))
@click.option(
    "--method", "methods", multiple=True,
    type=click.Choice([name for name in METHODS if name not in ("eva", *FROM_GRADIENTS)]),
    help="Say what a method would take, from FIRST's statistics and its model's weights; repeatable.",
)  # fmt: skip
@json_option
def compare(first: Path, second: Path | None, methods: tuple[str, ...], as_json: bool) -> None:
    """Compare two runs: how far their subspaces overlap, how their ranks differ. Or methods on one run's statistics.

    FIRST and SECOND are folders that init wrote, plan files, or PEFT adapter folders. With --method FIRST is a folder
    that init wrote; nothing is written, and no data passes through the model. What methods take of outputs is said
    where that run has statistics, also of those that do not look at inputs.
    """
    if methods:
        if second is not None:
            raise click.UsageError("--method: compares methods on one run, SECOND is another")
        _compare_methods(first, methods, as_json)
        return
    if second is None:
        raise click.UsageError("Missing argument 'SECOND'.")
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


def _compare_methods(run: Path, methods: tuple[str, ...], as_json: bool) -> None:
    """What each method would take of a run's model, on the statistics that are saved there."""
    from .. import METHODS as TABLE
    from .. import EvaStatistics, initialize
    from .pretrained import Pretrained

    require_run("FIRST", run)
    kinds, path, to_keep = (
        {TABLE[method].data for method in methods}, run / "statistics.safetensors",
        run / "statistics-to-keep.safetensors",
    )  # fmt: skip
    if "two sets" in kinds and not to_keep.is_file():
        raise click.UsageError(f"--method sc-lora: {run} knows one set of inputs; init --method sc-lora saves both")
    statistics = EvaStatistics.load(path) if kinds != {"none"} or path.is_file() else None
    kept = EvaStatistics.load(to_keep) if "two sets" in kinds else None
    model = Pretrained(str(run / "lora")).load()
    found: list[Any] = []
    for method in methods:
        keep = kept if TABLE[method].data == "two sets" else None
        found.append(initialize(model, statistics, method, keep=keep, dry_run=True))
    shares = ("weight_share", "output_share", "kept_share")
    if as_json:
        print_json({"methods": [{"method": one.method, **{name: one.mean(name) for name in shares}} for one in found]})
        return
    rows = [
        (
            one.method,
            *("-" if (value := one.mean(name)) is None else f"{value:.4f}" for name in shares),
            f"{one.seconds:.1f}",
        )
        for one in found
    ]
    print_table(["method", "of weights", "of outputs", "of outputs to keep", "seconds"], rows)
