"""What can be done with a run's files, without the data: ``plan``, ``apply``, ``export``."""

from pathlib import Path
from typing import Any

import click

from .options import (
    METHODS,
    PLANNING_FIELDS,
    SCORED,
    config_options,
    lora_options,
    model_options,
    take_config,
    take_pretrained,
)
from .running import (
    Command,
    json_option,
    need_libraries,
    print_facts,
    print_json,
    quiet_progress_bars,
    require_new_folder,
    require_run,
)


@click.command(cls=Command, name="plan")
@click.argument("statistics", type=click.Path(path_type=Path))
@click.option("--budget", type=click.IntRange(1), help="Ranks to give.  [default: the sum of the configured ranks]")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Plan file to write.")
@click.option("--report", type=click.Path(file_okay=False, path_type=Path), help="Folder to write a report to.")
@click.option("--method", type=click.Choice([*METHODS]), default="eva", show_default=True,
              help="By the scores of another method, which need the weights of the model that init was called with: "
                   "STATISTICS is init's folder then, and nothing but a report is written.")  # fmt: skip
@json_option
@config_options(PLANNING_FIELDS)
def plan(
    statistics: Path, budget: int | None, output: Path | None, report: Path | None, method: str, **params: Any
) -> None:
    """Allot ranks anew from saved STATISTICS (a file, or a folder that init wrote). Runs no model."""
    if method not in SCORED:
        raise click.UsageError(f"--method: {method} has no scores to give ranks by; {', '.join(SCORED)} have")
    if method != "eva":
        if output is not None:
            raise click.UsageError(
                f"--output: not with --method {method}, whose start init writes with the same --budget"
            )
        _plan_by(method, statistics, budget, report, params)
        return
    from .. import EvaReport, EvaStatistics
    from .. import plan as make_plan

    path = statistics / "statistics.safetensors" if statistics.is_dir() else statistics
    loaded = EvaStatistics.load(path)
    made = make_plan(loaded, take_config(params, loaded.config), budget)
    if output is not None:
        made.save(output)
    if report is not None:
        EvaReport.of(loaded, made).save(report)
    _tell(made, output, params["as_json"])


def _plan_by(method: str, run: Path, budget: int | None, report: Path | None, params: dict[str, Any]) -> None:
    """Ranks by the scores of another method than EVA."""
    from dataclasses import replace

    from .. import EvaConfig, EvaStatistics, initialize
    from .pretrained import Pretrained

    require_run("STATISTICS", run)
    statistics = EvaStatistics.load(run / "statistics.safetensors") if METHODS[method] else None
    as_init = EvaConfig() if statistics is None else statistics.config
    config = take_config(params, replace(as_init, rho=None, budget_parameters=None))
    quiet_progress_bars()
    model = Pretrained(str(run / "lora")).load()
    made = initialize(model, statistics, method, config, budget=budget, dry_run=True)
    if report is not None:
        made.save(report)
    _tell(made, None, params["as_json"])


def _tell(made: Any, output: Path | None, as_json: bool) -> None:
    from ..reporting import Grid

    if as_json:
        print_json({"budget": made.budget, "ranks": made.ranks, "output": None if output is None else str(output)})
        return
    print_facts([("budget", str(made.budget)), ("given", str(sum(made.ranks.values())))])
    for note in made.notes:
        click.echo(f"! {note}")
    click.echo()
    click.echo(Grid.of(made.ranks).text())


@click.command(cls=Command, name="apply")
@click.argument("plan_file", metavar="PLAN", type=click.Path(path_type=Path))
@click.argument("model")
@click.option("--output", required=True, type=click.Path(file_okay=False, path_type=Path),
              help="Adapter folder to write; must be new or empty.")  # fmt: skip
@model_options
@lora_options
@json_option
def apply(plan_file: Path, model: str, output: Path, as_json: bool, **params: Any) -> None:
    """Write PLAN into a new adapter for MODEL. Runs no forward pass.

    MODEL and the LoRA options are those of init; the folder lora/ that init wrote stands for all of them.
    """
    from .. import EvaPlan
    from .. import apply as apply_plan

    require_new_folder(output)
    path = plan_file / "plan.safetensors" if plan_file.is_dir() else plan_file
    loaded = EvaPlan.load(path)
    quiet_progress_bars()
    adapted = take_pretrained(model, params).load()
    apply_plan(adapted, loaded)
    adapted.save_pretrained(output)
    if as_json:
        print_json({"adapter": str(output), "ranks": loaded.ranks})
    else:
        click.echo(f"adapter  {output}")


@click.command(cls=Command, name="export")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder to write.")
@click.option(
    "--rank", type=click.IntRange(1), help="Rank to pad to; with --plain to cut down to.  [default: the largest]"
)
@click.option("--vllm", is_flag=True, help="Pad to the smallest rank that vLLM knows and that fits.")
@click.option(
    "--plain",
    is_flag=True,
    help="In place of that: an ordinary adapter for the base as it was, of twice the rank where this one took part of "
    "its base, or of --rank.",
)
@click.option(
    "--initial", type=click.Path(path_type=Path),
    help="With --plain, of PEFT's own pissa, olora, corda and lora_ga: the adapter before training.",
)  # fmt: skip
@json_option
def export(
    adapter: Path, output: Path, rank: int | None, vllm: bool, plain: bool, initial: Path | None, as_json: bool
) -> None:
    """Write ADAPTER anew with one rank and a scaling of 1, as serving engines need it.

    With --plain: one that started by another method, whose base lacks what it took, as an ordinary LoRA.
    """
    if rank is not None and vllm:
        raise click.UsageError("--rank and --vllm exclude each other")
    if plain and vllm:
        raise click.UsageError("--plain and --vllm exclude each other: export the plain adapter once more")
    if initial is not None and not plain:
        raise click.UsageError("--initial: is for --plain")
    need_libraries("peft")
    from ..adapters import VLLM_RANKS, export_plain, export_uniform

    if not (adapter / "adapter_config.json").is_file() and (adapter / "adapter").is_dir():
        adapter = adapter / "adapter"  # a folder that init wrote
    if output.resolve() == adapter.resolve():
        raise click.UsageError("--output: expected another folder than the adapter's own")
    told: dict[str, Any] = {"adapter": str(output)}
    if plain:
        made = export_plain(adapter, output, rank=rank, initial=initial)
        told |= {"ranks": made.ranks, "errors": made.errors}
    else:
        export_uniform(adapter, output, rank=rank, buckets=VLLM_RANKS if vllm else None)
    if as_json:
        print_json(told)
        return
    facts = [("adapter", str(output))]
    if plain:
        layer, worst = max(made.errors.items(), key=lambda entry: entry[1])
        lost = f"{worst:.2g} of its change at most, of {layer}" if worst else "nothing"
        facts += [("largest rank", str(max(made.ranks.values()))), ("left out", lost)]
    print_facts(facts)
