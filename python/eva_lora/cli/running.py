"""How every command runs: errors, exit codes, output for people and for machines."""

import json
import linecache
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import click

EXIT_REFUSED = 1
EXIT_NOT_CONVERGED = 3
EXIT_BUG = 70
EXIT_INTERRUPTED = 130

Decorator = Callable[[Any], Any]

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")


class Group(click.Group):
    """A group whose commands are imported when they are needed."""

    def __init__(self, *args: Any, commands_in: Mapping[str, str], **options: Any) -> None:
        super().__init__(*args, **options)
        self._commands_in = commands_in

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self._commands_in)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in self._commands_in:
            return None
        module = import_module(f"eva_lora.cli.{self._commands_in[name]}")
        return next(c for c in vars(module).values() if isinstance(c, click.Command) and c.name == name)


class Command(click.Command):
    """A command whose refusals are one sentence and whose bugs are tracebacks, each with its exit code."""

    def invoke(self, context: click.Context) -> Any:
        as_json = bool(context.params.get("as_json"))
        debug = bool((context.obj or {}).get("debug"))
        with warnings.catch_warnings():
            _quiet_libraries()
            try:
                return super().invoke(context)
            except (click.ClickException, click.exceptions.Exit, click.Abort):
                raise
            except KeyboardInterrupt:
                click.echo("interrupted; nothing was written after this point", err=True)
                context.exit(EXIT_INTERRUPTED)
            except BrokenPipeError:  # whoever read the output has enough; click ends quietly
                raise
            except Exception as error:
                if is_refusal(error):
                    if debug:
                        traceback.print_exc()
                    _fail(context, str(error), EXIT_REFUSED, as_json)
                traceback.print_exc()
                hint = "this is a bug in eva-lora: please report it with the output of `eva-lora doctor`"
                _fail(context, f"{type(error).__name__}: {error}\n{hint}", EXIT_BUG, as_json)


def _fail(context: click.Context, message: str, code: int, as_json: bool) -> NoReturn:
    if as_json:
        click.echo(json.dumps({"error": message, "exit_code": code}))
    click.echo(f"error: {message}", err=True)
    context.exit(code)


def is_refusal(error: BaseException) -> bool:
    """Whether the error is no bug: its innermost frame is a ``raise`` of ours, or the machine refuses."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, without importing it
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return True  # the operating system's word, which names the file
    frames = list(traceback.walk_tb(error.__traceback__))
    if not frames or not isinstance(error, (ValueError, TypeError, RuntimeError, OSError, ImportError)):
        return False
    frame, line = frames[-1]
    ours = frame.f_globals.get("__name__", "").partition(".")[0] in ("eva_lora", "eva_kernels")
    text = linecache.getline(frame.f_code.co_filename, line)
    compiled = "core." in text and isinstance(
        error, ValueError
    )  # what the compiled module raises has no frame of its own
    return ours and (compiled or text.lstrip().startswith("raise "))


def reason(error: BaseException) -> str:
    """An error of somebody else's in one line, with its type where the text alone may say little."""
    lines = str(error).strip().splitlines()
    if lines and isinstance(error, (ValueError, OSError)):
        return lines[0]
    return ": ".join([type(error).__name__, *lines[:1]])


def require_new_folder(output: Path) -> None:
    """Raises a usage error where a folder holds anything, or cannot be made: before work, not after it."""
    if output.exists() and any(output.iterdir()):
        raise click.UsageError(f"--output: {output} is not empty")
    there = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise click.UsageError(f"--output: {output} cannot be made in {there}")


def require_run(argument: str, run: Path) -> None:
    """Raises a usage error unless a path is a folder that init wrote, which knows its model."""
    if not (run / "lora" / "adapter_config.json").is_file():
        raise click.UsageError(f"{argument}: with --method expected a folder that init wrote, {run} is none")


def _quiet_libraries() -> None:
    """Keep the libraries' own chatter off the screen; warnings of ours come as one line."""
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", message="EVA ")
    for name in ("torchao", "transformers", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what it logs as an error, it raises too

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        click.echo(f"warning: {message}", err=True)

    warnings.showwarning = show


def need_libraries(*names: str) -> None:
    """Import what a command needs; raises ImportError saying how to install what is missing."""
    for name in names:
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            raise ImportError(f"{error.name} is not installed; this needs: pip install 'eva-kernels[cli]'") from error


def quiet_progress_bars() -> None:
    """No bars of the libraries' own, for loading weights and reading data."""
    need_libraries("datasets", "transformers", "peft")
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


@contextmanager
def launched() -> Iterator[tuple[int, int]]:
    """(rank, ranks) of the processes that torchrun has started; within it they are a process group."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1 or "MASTER_ADDR" not in os.environ:
        yield 0, 1
        return
    import torch

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield torch.distributed.get_rank(), ranks
    finally:
        torch.distributed.destroy_process_group()


def print_json(value: Mapping[str, Any]) -> None:
    click.echo(json.dumps(value, indent=1))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> None:
    """A table: drawn by rich on a terminal, aligned columns elsewhere; numbers to the right."""
    texts = [[str(value) for value in row] for row in rows]
    numeric = [all(_is_number(row[i]) for row in texts) for i in range(len(columns))]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title or None, title_justify="left", header_style="bold")
        for name, right in zip(columns, numeric, strict=True):
            table.add_column(name, justify="right" if right else "left", overflow="fold")
        for row in texts:
            table.add_row(*(Text(value) for value in row))  # names are text, not markup
        Console().print(table)
        return
    if title:
        click.echo(title)
    widths = [max(len(row[i]) for row in [list(columns), *texts]) for i in range(len(columns))]
    for row in [list(columns), *texts]:
        cells = [
            v.rjust(w) if right else v.ljust(w) for v, w, right in zip(row, widths, numeric, strict=True)
        ]  # fmt: skip
        click.echo("  ".join(cells).rstrip())


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    pairs = list(facts)
    width = max(len(label) for label, _ in pairs)
    for label, value in pairs:
        click.echo(f"{click.style(label.ljust(width), bold=True)}  {value}")


def size(nbytes: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def duration(seconds: float) -> str:
    """Seconds for people, to about two digits."""
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _is_number(text: str) -> bool:
    try:
        float(text.removesuffix("%").strip() or "0")
    except ValueError:
        return text in ("-", "")
    return True
