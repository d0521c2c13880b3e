"""The report of a run: one HTML page and one Markdown text, compared with an earlier run.

    python benchmarks/report.py build/bench/results.json                      # again, from what `make bench` measured
    python benchmarks/report.py build/bench/results.json --publish            # its results become the committed ones

Publishing copies the results to `benchmarks/results/`, named after the kind of device, and writes their tables and
figures into `docs/performance.md`, whose text and data can so not drift apart.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.figures import standalone
from harness.page import markdown, render
from harness.plots import figures_of
from harness.regression import Change, changes
from harness.results import Results
from harness.tables import threads

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
FIGURES = ROOT / "docs" / "figures"
CAPTIONS = {"peers": "every peer's time over ours", "forward": "our time over the forward's"}
SHOWN = (("End to end", "peers"), ("Streams", "peers"), ("Gram", "forward"), ("Subspace product", "forward"))
_GENERATED = re.compile(r"(<!-- generated: begin -->\n).*?(<!-- generated: end -->)", re.DOTALL)


def published_file(results: Results) -> Path:
    """Where the committed results of this kind of device are: of CPUs, by the form of the compiled code that ran."""
    return PUBLISHED / ("cuda.json" if "cuda" in results.machine else f"cpu-{results.cpu_form}.json")


def write_report(results: Results, folder: Path, before: Results | None) -> Sequence[Change] | None:
    """The page and the Markdown into ``folder``; what changed since ``before``."""
    found = changes(results, before) if before is not None else None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.html").write_text(render(results, found), encoding="utf-8")
    text = "# Benchmarks of eva-kernels\n\n" + markdown(results, found)
    (folder / "report.md").write_text(text, encoding="utf-8")
    return found


def figure_files(results: Results) -> dict[str, tuple[str, str]]:
    """The documentation's figures: file name -> caption and SVG."""
    found = {}
    for group, name in SHOWN:
        figure = figures_of(results, group).get(name) if results.of(group) else None
        if figure is not None:
            file = f"{published_file(results).stem}-{group.lower().replace(' ', '-')}-{name}.svg"
            found[file] = (f"{group}: {CAPTIONS[name]}", standalone(figure))
    return found


def committed() -> list[Results]:
    """All results that are published, one per kind of device."""
    return [Results.load(file) for file in (*sorted(PUBLISHED.glob("cpu-*.json")), *PUBLISHED.glob("cuda.json"))]


def with_results(page: str, published: Sequence[Results]) -> str:
    """``page`` with what is between its marks replaced by the tables and figures of all published results.

    Raises:
        ValueError: the marks are not there.
    """
    if not _GENERATED.search(page):
        raise ValueError("page: expected the marks <!-- generated: begin --> and <!-- generated: end -->")
    body = ""
    for results in published:
        body += f"## {_devices(results)}\n\n{markdown(results)}\n### Figures\n"
        for file, (caption, _) in figure_files(results).items():
            body += f"\n{caption}:\n\n![{caption}](figures/{file})\n"
    return _GENERATED.sub(lambda match: match[1] + body + match[2], page)


def _devices(results: Results) -> str:
    return " and ".join(f"{info['device']}, {threads(info)}" for info in results.machine.values())


def publish(results: Results) -> None:
    results.save(published_file(results))
    published = committed()  # with numbers rounded, as a reader of the files finds them
    PAGE.write_text(with_results(PAGE.read_text(encoding="utf-8"), published), encoding="utf-8")
    FIGURES.mkdir(exist_ok=True)
    for stored in published:
        for file, (_, figure) in figure_files(stored).items():
            (FIGURES / file).write_text(figure, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--against", type=Path, help="earlier results (default: the committed ones, if there are any)")
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    parser.add_argument("--publish", action="store_true")
    arguments = parser.parse_args()
    results = Results.load(arguments.results)
    earlier = arguments.against or published_file(results)
    before = Results.load(earlier) if earlier.exists() and earlier.resolve() != arguments.results.resolve() else None
    found = write_report(results, arguments.output, before)
    for change in found or ():
        if change.verdict != "same":
            print(f"{change.verdict}: {change.record.group}, {change.record.case}: cost {change.factor:.2f} of before")
    if arguments.publish:
        publish(results)
    print(f"wrote {arguments.output / 'report.html'} and {arguments.output / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
