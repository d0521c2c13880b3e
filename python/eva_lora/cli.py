"""The ``eva-lora`` command."""

from pathlib import Path

import click


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="eva-kernels")
def main() -> None:
    """EVA: initialise LoRA from the data it will be trained on."""


@main.command()
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), default=".", show_default=True,
              help="Folder that eva_report/ and eva_adapter/ are written to.")  # fmt: skip
@click.option("--max-batches", type=click.IntRange(2), default=24, show_default=True, help="Batches EVA may see.")
@click.option("--steps", type=click.IntRange(1), default=8, show_default=True, help="Training steps of each run.")
def demo(output: Path, max_batches: int, steps: int) -> None:
    """Run EVA on SmolLM2-135M and real text, reload the adapter, train a little."""
    from . import demo as module

    try:
        module.run(output, max_batches=max_batches, steps=steps, echo=click.echo)
    except (FileNotFoundError, ImportError) as error:
        raise click.ClickException(f"{error}\nThe demo needs: pip install 'eva-kernels[demo]'") from error


@main.command()
@click.option("--kernels", is_flag=True, help="Run every Triton kernel against its reference on this machine's GPU.")
def doctor(kernels: bool) -> None:
    """Say what is built and what is not, why, and what to do about it."""
    from eva_kernels._build import build_info

    from .report import versions

    info = build_info()
    remedies = info.pop("remedies")
    for name, value in {**versions(), **info}.items():
        shown = ", ".join(value) if isinstance(value, list) else value
        click.echo(f"{name:<14} {shown or '-'}")
    for remedy in remedies:
        click.echo(f"-> {remedy}")
    if kernels:
        _check_kernels()


def _check_kernels() -> None:
    import torch

    from eva_kernels import check_kernels

    if not torch.cuda.is_available():
        raise click.ClickException("--kernels: expected a CUDA or HIP device, torch finds none")
    checks = check_kernels("cuda")
    for check in checks:
        state = "ok" if check.passed else "WRONG"
        click.echo(f"{state:<6} {check.name:<40} error {check.error:.1e}, allowed {check.allowed:.1e}")
    if not all(check.passed for check in checks):
        raise click.ClickException("--kernels: a kernel is wrong on this device; set impl='reference' and report it")
