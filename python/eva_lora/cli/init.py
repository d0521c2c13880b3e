"""``eva-lora init``: from a model and data to an initialised adapter and its report."""

from pathlib import Path
from typing import Any

import click

from ..config import DEFAULT_MAX_BATCHES, EvaConfig
from .options import (
    FROM_GRADIENTS,
    METHODS,
    QUANTIZERS,
    SCORED,
    config_options,
    lora_options,
    model_options,
    take_config,
    take_pretrained,
)
from .running import (
    EXIT_NOT_CONVERGED,
    Command,
    duration,
    is_refusal,
    json_option,
    launched,
    print_facts,
    print_json,
    print_table,
    quiet_progress_bars,
    reason,
    require_new_folder,
    size,
)

MAX_LENGTH = 512
UNCOUNTED = -100  # the label that losses leave out
PREDICTION_BATCHES = 100  # the paper needs about 90


@click.command(cls=Command, name="init")
@click.argument("model")
@click.option("--data", multiple=True, metavar="PATH",
              help="jsonl, text, csv or parquet files, or one folder that datasets saved; repeatable.")  # fmt: skip
@click.option("--method", type=click.Choice([*METHODS]), default="eva", show_default=True,
              help="How A and B start; all but eva and gora keep ranks unless --rho or a budget is given.")  # fmt: skip
@click.option("--budget", type=click.IntRange(1), help="Ranks to give.  [default: the sum of the configured ranks]")
@click.option("--keep-data", multiple=True, metavar="PATH", help="For sc-lora: data of what is to be kept.")
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), help="Folder to write; must be new or empty."
)
@click.option(
    "--dry-run", is_flag=True, help="Print layers, shared inputs, memory and predicted time; load no weights."
)
@click.option("--require-convergence", is_flag=True, help="Exit with 3 if a layer had not converged.")
@model_options
@click.option(
    "--quantize", type=click.Choice([*QUANTIZERS]), help="Load the base with bitsandbytes' weights of this kind."
)
@click.option(
    "--repair", is_flag=True, help="Spend ranks on what quantising broke in MODEL's float weights, not on EVA."
)
@lora_options
@click.option("--split", default="train", show_default=True, help="Part of a saved dataset.")
@click.option("--limit", type=click.IntRange(1), help="Use only the first so many records.")
@click.option("--text-field", help="Field that holds the text.  [default: text, or the only text there is]")
@click.option("--chat-template", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Jinja file to render chats with.  [default: the tokenizer's own]")  # fmt: skip
@click.option("--assistant-only", is_flag=True, help="Count only the assistant's tokens of a chat.")
@click.option("--max-length", type=click.IntRange(1), help="Tokens per record.  [default: 512, or the model's context]")
@click.option("--batch-size", type=click.IntRange(1), default=4, show_default=True, help="Records per batch.")
@click.option("--shuffle/--no-shuffle", default=True, show_default=True, help="Shuffle records by --seed.")
@click.option("--plots", multiple=True, type=click.Choice(["png", "svg", "pdf"]), help="Save the figures, too.")
@click.option("--checkpoint", type=click.Path(dir_okay=False, path_type=Path), help="File to continue from.")
@click.option("--checkpoint-every", type=click.IntRange(1), metavar="BATCHES", help="How often to write it.")
@click.option("--quiet", is_flag=True, help="No progress line; it is never shown off a terminal.")
@json_option
@config_options()
@click.pass_context
def init(context: click.Context, /, model: str, output: Path | None, **params: Any) -> None:
    """Initialise LoRA for MODEL from data; write adapter, plan, statistics and report.

    With --method A and B start by another method (docs: Methods); some look at weights alone and take no --data.
    lora-ga, lora-ga-a2r, lora-one and gora start from gradients of a language model's own loss, whose labels are the
    data's tokens that count (docs: Gradients), of --max-batches batches, 32 if not given.

    With --quantize and --repair A and B undo most of what quantising the base did to its layers' outputs (docs:
    Quantised bases); adapter and report are written then.

    MODEL is a folder or id that transformers loads, or an adapter folder, whose base model and LoRA settings
    are then taken.

    Under torchrun every process takes its share of the batches, on a GPU of its own where there are any, and the first
    writes: torchrun --nproc-per-node 4 --no-python eva-lora init ...
    """
    config = take_config(params)
    dry_run = params["dry_run"]
    if output is None and not dry_run:
        raise click.UsageError("--output is needed, except with --dry-run")
    if params["repair"]:
        _require_repairable(params)
    _require_data(params)
    if output is not None:
        require_new_folder(output)
    with launched() as (rank, ranks):
        _run(context, model, output, config, params, rank, ranks)


def _run(
    context: click.Context,
    model: str,
    output: Path | None,
    config: EvaConfig,
    params: dict[str, Any],
    rank: int,
    ranks: int,
) -> None:
    quiet_progress_bars()
    from .datafiles import describe_files

    pretrained = take_pretrained(model, params)
    if params["method"] != "eva":
        assert output is not None
        if ranks > 1:
            raise ValueError(
                "method: expected one process; several start in Python: statistics of eva_lora.collect, or batches "
                "where gradients are taken, and eva_lora.initialize on each"
            )
        _start(pretrained, config, output, params)
        return
    batches, num_records = _batches(pretrained, config, params, (rank, ranks))
    if params["dry_run"]:
        if rank == 0:
            _dry_run(pretrained, batches, config, params["as_json"])
        return
    assert output is not None
    run = {
        "model": f"{pretrained.base}, {pretrained.model_class.__name__}",
        "computed in": f"{str(pretrained.dtype).removeprefix('torch.')} on {pretrained.device}"
        + (f", weights in {params['quantize']}" if params["quantize"] else ""),
        "LoRA": _describe_lora(pretrained.lora_config),
        "data": describe_files(params["data"], num_records),
        "batches": f"{len(batches)} of up to {params['batch_size']} x {batches.max_length} tokens, as {batches.kind}"
        + (f", on each of {ranks} ranks" if ranks > 1 else ""),
    }
    if params["repair"]:
        if ranks > 1:
            raise ValueError("repair: expected one process; several make statistics with eva_lora.collect")
        _repair(pretrained, batches, config, output, params)
        return
    report = _initialize(pretrained, batches, config, output, run, params, writes=rank == 0)
    if rank:
        return
    if params["as_json"]:
        print_json({"output": str(output), "report": report.to_dict()})
    else:
        click.echo(str(report))
        click.echo(f"\nadapter  {output / 'adapter'}\nreport   {output / 'report' / 'report.html'}")
    if params["require_convergence"] and not all(report.converged.values()):
        context.exit(EXIT_NOT_CONVERGED)


def _batches(
    pretrained: Any, config: EvaConfig, params: dict[str, Any], shard: tuple[int, int], *, for_loss: bool = False
) -> tuple[Any, int]:
    from .datafiles import read_records
    from .textdata import TextBatches

    records = read_records(params["data"], split=params["split"], limit=params["limit"])
    tokenizer, limits = pretrained.tokenizer(), pretrained.limits()
    if params["chat_template"]:
        tokenizer.chat_template = _read_template(params["chat_template"])
    max_length = _max_length(params["max_length"], limits.context)
    batches = TextBatches(
        records, tokenizer, batch_size=params["batch_size"], max_length=max_length,
        text_field=params["text_field"], assistant_only=params["assistant_only"],
        with_labels="always" if for_loss else pretrained.takes_labels,
        label_mask_value=UNCOUNTED if for_loss else config.label_mask_value,
        seed=config.seed if params["shuffle"] else None, shard=shard, vocabulary=limits.vocabulary,
        paths=params["data"], checked_batches=config.max_batches or DEFAULT_MAX_BATCHES,
    )  # fmt: skip
    return batches, len(records)


def _max_length(asked: int | None, context: int | None) -> int:
    if asked is not None and context is not None and asked > context:
        raise ValueError(f"max_length: expected at most {context}, the positions that the model has, got {asked}")
    return asked or min(MAX_LENGTH, context or MAX_LENGTH)


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"chat_template: {path} is no text in UTF-8") from error


def _initialize(
    pretrained: Any,
    batches: Any,
    config: Any,
    output: Path,
    run: dict[str, str],
    params: dict[str, Any],
    *,
    writes: bool,
) -> Any:
    from .. import EvaReport, apply, collect, plan
    from ..planning import command_line

    model = pretrained.load()
    try:
        statistics = collect(
            model, batches, _of_pass(config, params), progress=not (params["quiet"] or params["as_json"]),
            checkpoint=params["checkpoint"], checkpoint_every=params["checkpoint_every"],
        )  # fmt: skip
    except Exception as error:
        if not is_refusal(error):
            _require_forward(model, batches, pretrained)
        raise
    eva_plan = plan(statistics, config, params["budget"])
    apply(model, eva_plan)
    report = EvaReport.of(statistics, eva_plan, run={"command": command_line(), **run})
    if not writes:
        return report
    pretrained.lora_config.save_pretrained(output / "lora")
    statistics.save(output / "statistics.safetensors")
    eva_plan.save(output / "plan.safetensors")
    model.save_pretrained(output / "adapter")
    report.save(output / "report", plots=params["plots"])
    return report


def _of_pass(config: EvaConfig, params: dict[str, Any]) -> EvaConfig:
    """The options of a pass, which holds bounds of ranks against the configured ranks' sum: not what --budget gives."""
    from dataclasses import replace

    return replace(config, max_rank=None) if params["budget"] else config


def _require_data(params: dict[str, Any]) -> None:
    method, wanted = params["method"], METHODS[params["method"]]
    if wanted and not params["data"]:
        raise click.UsageError("Missing option '--data'.")
    if params["data"] and not wanted:
        raise click.UsageError(f"--data: --method {method} takes none")
    if (method == "sc-lora") != bool(params["keep_data"]):
        raise click.UsageError("--keep-data: is for --method sc-lora, which needs it")
    if params["budget"] and method not in SCORED:
        raise click.UsageError(f"--budget: {method} has no scores to give ranks by; {', '.join(SCORED)} have")
    if method != "eva":
        for name in ("checkpoint", "require_convergence", "plots", "dora", "dry_run", "quantize", "repair"):
            if params[name] and not (name == "quantize" and method in FROM_GRADIENTS):
                raise click.UsageError(f"--{name.replace('_', '-')}: not with --method {method}")


def _start(pretrained: Any, config: EvaConfig, output: Path, params: dict[str, Any]) -> None:
    """Another method than EVA: adapter and report, and the statistics where there are any."""
    from dataclasses import replace

    from .. import METHODS as TABLE
    from .. import EvaStatistics, collect, initialize
    from ..adapters import find_adapter
    from ..descending import DEFAULT_BATCHES
    from ..starting import config_for

    method, quiet = params["method"], params["quiet"] or params["as_json"]
    from_gradients = method in FROM_GRADIENTS
    if from_gradients and not pretrained.predicts_tokens:
        raise ValueError(
            f"model: method={method!r} takes the loss that a language model returns, a "
            f"{pretrained.model_class.__name__} has none of its tokens; call eva_lora.initialize with a loss_fn"
        )
    model = pretrained.load()
    if from_gradients:
        config = replace(config, max_batches=config.max_batches or DEFAULT_BATCHES)
    wanted = config_for(find_adapter(model), TABLE[method], config)

    def known(paths: Any) -> Any:
        batches, _ = _batches(pretrained, config, {**params, "data": paths}, (0, 1), for_loss=from_gradients)
        return batches if from_gradients else collect(model, batches, _of_pass(wanted, params), progress=not quiet)

    data, kept = (known(params[name]) if params[name] else None for name in ("data", "keep_data"))
    report = initialize(model, data, method, wanted, keep=kept, budget=params["budget"])
    pretrained.lora_config.save_pretrained(output / "lora")
    for name, one in (("statistics", data), ("statistics-to-keep", kept)):
        if isinstance(one, EvaStatistics):
            one.save(output / f"{name}.safetensors")
    model.save_pretrained(output / "adapter")
    report.save(output / "report")
    if params["as_json"]:
        print_json({"output": str(output), "report": report.to_dict()})
    else:
        click.echo(str(report))
        click.echo(f"\nadapter  {output / 'adapter'}\nreport   {output / 'report' / 'start.json'}")


def _require_repairable(params: dict[str, Any]) -> None:
    if not params["quantize"]:
        raise click.UsageError("--repair: needs --quantize, which says how the base is quantised")
    for name in ("checkpoint", "require_convergence", "plots", "budget"):
        if params[name]:
            raise click.UsageError(f"--{name.replace('_', '-')}: not with --repair")


def _repair(pretrained: Any, batches: Any, config: EvaConfig, output: Path, params: dict[str, Any]) -> None:
    from .. import fit_quantization_error

    model = pretrained.load()
    report = fit_quantization_error(
        model, batches, pretrained.base, config, progress=not (params["quiet"] or params["as_json"])
    )
    pretrained.lora_config.save_pretrained(output / "lora")
    model.save_pretrained(output / "adapter")
    report.save(output / "report")
    if params["as_json"]:
        print_json({"output": str(output), "report": report.to_dict()})
    else:
        click.echo(str(report))
        click.echo(f"\nadapter  {output / 'adapter'}\nreport   {output / 'report' / 'repair.json'}")


def _require_forward(model: Any, batches: Any, pretrained: Any) -> None:
    """Raises ValueError if the model fails on the batch made last without EVA, too: then it is no bug of ours."""
    import torch

    batch = {name: tensor.to(pretrained.device) for name, tensor in batches.remake().items()}
    try:
        with torch.no_grad():
            model(**batch)
    except Exception as error:
        raise ValueError(
            f"model: {pretrained.base} fails, without EVA too, on the batch of {batches.describe_last()}: "
            f"{reason(error)}"
        ) from error


def _describe_lora(config: Any) -> str:
    targets = config.target_modules
    named = targets if isinstance(targets, str) else ", ".join(sorted(targets))
    variants = [name for name, on in (("rsLoRA", config.use_rslora), ("DoRA", config.use_dora)) if on]
    return ", ".join([f"rank {config.r}, alpha {config.lora_alpha:g}, {named}", *variants])


def _dry_run(pretrained: Any, batches: Any, config: Any, as_json: bool) -> None:
    from .. import estimate
    from ..collecting import matmul_rate

    try:
        expected = estimate(pretrained.shapes(), batches.example(), config)
    except Exception as error:
        if is_refusal(error):
            raise
        raise ValueError(f"model: its forward cannot be rehearsed: {reason(error)}") from error
    rate = matmul_rate(pretrained.device, pretrained.dtype)
    seconds = expected.seconds_per_batch(rate)
    if as_json:
        print_json({**vars(expected), "flops_per_second": rate, "seconds_per_batch": seconds})
        return
    kinds = dict(zip((names[0] for names in expected.inputs), expected.statistic, strict=True))
    print_table(
        ["input", "width", "statistic", "fed to"],
        [
            (i, expected.in_features[names[0]], kinds[names[0]], ", ".join(names))
            for i, names in enumerate(expected.inputs)
        ],
    )
    click.echo()
    planned = min(expected.max_batches, PREDICTION_BATCHES)
    print_facts(
        [
            ("layers", f"{len(expected.ranks)}, fed by {len(expected.inputs)} distinct inputs"),
            ("budget", f"{sum(expected.ranks.values())} ranks"),
            ("weights", f"{size(expected.weight_bytes)}, {str(pretrained.dtype).removeprefix('torch.')}"),
            ("statistics", size(expected.statistics_bytes)),
            ("one batch", f"{expected.rows:,} tokens at most: forward {expected.forward_flops / 1e9:,.1f} GFLOP, "
                          f"statistics {expected.statistics_flops / 1e9:,.1f} GFLOP"),
            ("predicted", f"{duration(seconds)} a batch, {duration(seconds * planned)} for {planned} batches "
                          f"(a run ends when converged, at {expected.max_batches} batches at the latest)"),
            ("based on", f"a 1024 x 1024 product on {pretrained.device}, {rate / 1e9:,.0f} GFLOP/s just now; "
                         "reading data and small algebra come on top, padding comes off"),
        ]
    )  # fmt: skip
