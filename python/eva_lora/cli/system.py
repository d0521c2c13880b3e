"""``eva-lora demo``, ``eva-lora doctor`` and ``eva-lora completion``."""

from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .running import Command, json_option, print_json

if TYPE_CHECKING:
    from eva_kernels.kernel_check import KernelCheck

LONGEST_OUTCOME = 160  # characters of one check in the line for reports; compilers write pages


@click.command(cls=Command, name="demo")
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


@click.command(cls=Command, name="doctor")
@click.option("--kernels", is_flag=True, help="Run every Triton kernel against its reference on this machine's GPU; "
              "the last line says it all, for a report.")  # fmt: skip
@json_option
def doctor(kernels: bool, as_json: bool) -> None:
    """Say what is built and what is not, why, and what to do about it; and what runs on each device there is."""
    from eva_kernels._build import build_info
    from eva_kernels._devices import device_info, seen_devices

    from ..planning import versions

    info = build_info()
    devices = {str(device): device_info(device) for device in seen_devices()}
    checks = _check_kernels() if kernels else []
    report = _in_one_line(versions(), checks) if kernels else None
    if as_json:
        found = {"devices": devices, "kernels": [*map(_as_json, checks)], "report": report}
        print_json({"versions": versions(), **info, **found})
    else:
        remedies = info.pop("remedies")
        for name, value in {**versions(), **info}.items():
            shown = ", ".join(value) if isinstance(value, list) else value
            click.echo(f"{name:<14} {shown or '-'}")
        for name, facts in devices.items():
            click.echo(f"{'on ' + name:<14} {', '.join(f'{what}: {how}' for what, how in facts.items())}")
        for remedy in remedies:
            click.echo(f"-> {remedy}")
        for check in checks:
            state = "ok" if check.passed else "WRONG"
            click.echo(f"{state:<6} {check.name:<40} {_outcome(check)}")
        if report is not None:
            click.echo(report)
    if not all(check.passed for check in checks):
        raise click.ClickException("--kernels: a kernel is wrong on this device; set impl='reference' and report it")


def _outcome(check: "KernelCheck") -> str:
    return check.failure or f"error {check.error:.1e}, allowed {check.allowed:.1e}"


def _as_json(check: "KernelCheck") -> dict[str, object]:
    numbers = {name: getattr(check, name) for name in ("error", "allowed")}
    finite = {name: value if isfinite(value) else None for name, value in numbers.items()}  # JSON has no NaN
    return {"name": check.name, "passed": check.passed, "failure": check.failure, **finite}


def _in_one_line(versions: dict[str, str], checks: list["KernelCheck"]) -> str:
    """What a report to us has to say of this machine."""
    import torch

    from eva_kernels._devices import described

    wrong = [f"{check.name}: {_outcome(check)[:LONGEST_OUTCOME]}" for check in checks if not check.passed]
    passed = f"{len(checks) - len(wrong)} of {len(checks)} kernel checks passed"
    known = ", ".join(f"{name} {version}" for name, version in versions.items())
    return "; ".join([known, described(torch.device("cuda", torch.cuda.current_device())), passed, *wrong])


def _check_kernels() -> list["KernelCheck"]:
    import torch

    from eva_kernels import check_kernels

    if not torch.cuda.is_available():
        raise click.ClickException("--kernels: expected a CUDA or HIP device, torch finds none")
    try:
        return check_kernels("cuda")
    except ValueError as error:
        raise click.ClickException(f"--kernels: there are none for this GPU: {error}") from error


@click.command(cls=Command, name="completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that completes eva-lora's commands and options in SHELL."""
    from click.shell_completion import get_completion_class

    from . import main

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(main, {}, "eva-lora", "_EVA_LORA_COMPLETE").source())
