"""The ``eva-lora`` command."""

from typing import Any

import click

from .running import Group

#: Command → module of this package that holds it, loaded when it is called: help and completion stay fast.
COMMANDS = {
    "init": "init",
    "plan": "later",
    "apply": "later",
    "export": "later",
    "report": "looking",
    "compare": "looking",
    "demo": "system",
    "doctor": "system",
    "completion": "system",
}


@click.command(
    cls=Group,
    commands_in=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done; 1 refused, with the reason on standard error; 2 wrong usage; 3 done, but not all "
    "layers converged (with --require-convergence); 70 a bug in eva-lora; 130 interrupted.",
)
@click.version_option(package_name="eva-kernels", prog_name="eva-lora")
@click.option("--debug", is_flag=True, help="Show the traceback of refusals, too.")
@click.pass_context
def main(context: click.Context, debug: bool) -> Any:
    """EVA: initialise LoRA from the data it will be trained on."""
    context.obj = {"debug": debug}


__all__ = ["main"]
