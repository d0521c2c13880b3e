"""python -m benchmarks.evidence [--short] [--processes N] [--results FOLDER] [STUDY ...]

Runs what is not in the result files yet; it may be stopped and started again at any time. When all studies are done it
makes tables and pictures: in the pages from the committed results, beside the result files elsewhere.
"""

import os
from pathlib import Path

import click

from . import page
from .studies import STUDIES, run_all


@click.command(help=__doc__)
@click.argument("names", metavar="[STUDY]...", nargs=-1, type=click.Choice(list(STUDIES)))
@click.option("--short", is_flag=True, help="Tiny models and few steps: the same path in seconds.")
@click.option(
    "--processes", type=click.IntRange(1), default=os.cpu_count() or 1, show_default="the machine's cores",
    help="Studies that run side by side, each on one thread.",
)  # fmt: skip
@click.option("--results", type=click.Path(path_type=Path), default=page.RESULTS, help="Where the result files are.")
def main(names: tuple[str, ...], processes: int, short: bool, results: Path) -> None:
    if short and results == page.RESULTS:
        raise click.UsageError("--short: name a folder of its own with --results")
    run_all(names or tuple(STUDIES), results, processes, short=short)
    if names:
        return
    if results == page.RESULTS:
        page.main()
    else:
        page.write_beside(results)


if __name__ == "__main__":
    main()
