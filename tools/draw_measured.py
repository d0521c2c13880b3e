"""Draws docs/figures/, and tables of three pages in docs/, from the results in docs/measured/.

    python tools/draw_measured.py            writes them
    python tools/draw_measured.py --check    fails if they are not what the results say

Figures are SVG with a background of their own for light and for dark mode, so that they can be read wherever a page is
shown. The results: ``python benchmarks/choosing.py`` and ``python benchmarks/illustrations.py``.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from eva_lora.reporting.charts import HEIGHT, WIDTH, Line, line_chart

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MEASURED, FIGURES = DOCS / "measured", DOCS / "figures"
STYLE = (ROOT / "python" / "eva_lora" / "reporting" / "templates" / "report.css").read_text(encoding="utf-8")
ROW = 18  # height of a line of the legend


def themed() -> str:
    """The report page's palette, light and dark, and what of its style is about charts."""
    light, dark = re.findall(r":root \{(.+?)\}", STYLE, re.DOTALL)
    rules = [line for line in STYLE.splitlines() if line.startswith(("svg .mid", "svg .grid", "svg .rule", ".c"))]
    return (
        f":root {{{light}}} @media (prefers-color-scheme: dark) {{ :root {{{dark}}} }} "
        "text { fill: var(--soft); font: 12px system-ui, sans-serif; } .paper { fill: var(--paper); } "
        ".line path { fill: none; stroke: currentColor; stroke-width: 1.8; } "
        ".line circle, .key { fill: currentColor; } "
    ) + " ".join(rules).replace("svg .", ".")


def figure(lines: Sequence[Line], names: Sequence[str], **options: Any) -> str:
    """A chart with a legend below, as a file of its own."""
    chart = line_chart(lines, **options)
    legend = [
        Markup('<rect x="52" y="{0}" width="12" height="4" class="key c{1}"/><text x="70" y="{2}">{3}</text>').format(
            HEIGHT + ROW * row + 6, line.color, HEIGHT + ROW * row + 12, name
        )
        for row, (line, name) in enumerate(zip(lines, names, strict=True))
    ]
    height = HEIGHT + ROW * len(lines) + 8
    alternative = re.search(r'aria-label="([^"]*)"', chart)
    assert alternative is not None
    inner = Markup(re.sub(r"^<svg[^>]*>|</svg>$", "", chart))
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0} {1}" width="{2}" height="{3}" role="img">'
        "<title>{4}</title><style>{5}</style>"
        '<rect class="paper" width="{0}" height="{1}"/>{6}{7}</svg>\n'
    ).format(
        WIDTH, height, 3 * WIDTH // 2, 3 * height // 2, Markup(alternative[1]), Markup(themed()), inner,
        Markup("").join(legend),
    )  # fmt: skip


def spectra(found: dict[str, Any]) -> str:
    lines, names, reached = [], [], []
    for color, (label, ratios) in enumerate(found["spectra"].items()):
        total, points = 0.0, [(0.0, 0.0)]
        for index, ratio in enumerate(ratios, 1):
            total += ratio
            points.append((float(index), total))
        rank, width = found["rank"], found["widths"][label]
        share = points[rank][1]
        lines.append(Line(points, label, color, mark=(rank, share)))
        names.append(f"{label}: {share:.0%} in {rank} of {width}")
        reached.append(share)
    told = f"At 16 components from {min(reached):.0%} to {max(reached):.0%}; as many random directions hold 1 to 4 %."
    return figure(
        lines, names, title="Explained variance of four inputs of MiniLM by number of components", description=told,
        x_label="components", y_label="explained variance", y_range=(0, 1),
    )  # fmt: skip


def streaming(found: dict[str, Any]) -> str:
    curves = {
        name: [(float(batch), max(1 - share, 1e-6)) for batch, share in enumerate(shares, 1)]
        for name, shares in found["captured"].items()
    }
    lines = [Line(points, name, color) for color, (name, points) in enumerate(curves.items())]
    ends = ", ".join(f"{name} {points[-1][1]:.1e}" for name, points in curves.items())
    return figure(
        lines, list(curves), title="Share of the best possible variance that is missed, by batch",
        description=f"Mean over four inputs of MiniLM. At the end: {ends}.", x_label="batch", y_label="share missed",
        log=True,
    )  # fmt: skip


def ranks(found: dict[str, Any]) -> str:
    kinds: dict[str, list[tuple[float, float]]] = {}
    for name, rank in found["ranks"].items():
        block, kind = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+?)(?:\.dense)?", name).groups()  # type: ignore[union-attr]
        kinds.setdefault(kind, []).append((int(block) + 1.0, float(rank)))
    same: dict[str, list[str]] = {}
    for kind, points in kinds.items():
        same.setdefault(str(points), []).append(kind.removeprefix("attention.self."))
    lines, names = [], []
    for color, together in enumerate(same.values()):
        kind = together[0] if together[0] in kinds else f"attention.self.{together[0]}"
        lines.append(Line(kinds[kind], ", ".join(together), color))
        names.append(", ".join(together))
    low, high = min(found["ranks"].values()), max(found["ranks"].values())
    return figure(
        lines, names, title="Rank of each layer of MiniLM by block",
        description=f"Configured: {found['rank']} everywhere. After EVA from {low} to {high}.",
        x_label="block", y_label="rank", y_range=(0, high), rule=(found["rank"], f"configured, {found['rank']}"),
    )  # fmt: skip


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def common(row: dict[str, Any]) -> list[str]:
    batches = str(row["batches"]) if row["converged"] else f"{row['batches']}, not converged"
    return [batches, f"{row['captured_mean']:.2%}", f"{row['captured_worst']:.2%}", f"{row['ranks_off']:.2%}",
            f"{row['overhead']:.2f}"]  # fmt: skip


COMMON = ["batches", "captured, mean", "worst layer", "ranks off", "overhead"]


def tables(found: dict[str, Any]) -> dict[str, str]:
    """Name of each table → the table."""
    by_criterion = [[row["options"]["convergence"], f"{row['options']['tau']:g}", *common(row)] for row in found["tau"]]
    by_rho = [
        [row["options"]["convergence"], f"{row['options']['rho']:g}", str(row["batches"]), f"{row['explained']:.2%}",
         f"{row['ranks_moved']:.1%}", f"{row['smallest_rank']} to {row['largest_rank']}",
         f"{row['parameters']:,}"]
        for row in found["rho"]
    ]  # fmt: skip
    by_statistic = [
        [f"`{row['options']['statistic']}`", f"{row['options'].get('oversampling', 3):g}", *common(row),
         f"{row['statistic_bytes'] / 2**20:.1f} MiB"]
        for row in found["statistic"]
    ]  # fmt: skip
    return {
        "tau": table(["criterion", "tau", *COMMON], by_criterion),
        "rho": table(["criterion", "rho", "batches", "of all variance", "ranks moved", "ranks", "parameters"], by_rho),
        "statistic": table(["statistic", "oversampling", *COMMON, "memory"], by_statistic),
        "made": made(found),
    }


def missed(found: dict[str, Any]) -> str:
    """What each way of finding directions misses after some numbers of batches."""
    shown = [count for count in (1, 2, 4, 8, 16, 32, 48) if count <= min(map(len, found["captured"].values()))]
    rows = [[name, *(f"{1 - shares[i - 1]:.2%}" for i in shown)] for name, shares in found["captured"].items()]
    return table(["after batch", *map(str, shown)], rows)


MODELS = {"minilm": "MiniLM", "smollm2": "SmolLM2-135M"}
MEASURES = {
    "outputs": ("layers' outputs, E‖error‖² over E‖W x‖², mean over layers", ".2%"),
    "hidden": ("hidden states at the model's end, relative error", ".1%"),
    "perplexity": ("perplexity", ".2f"),
}


def quantization(found: dict[str, Any]) -> str:
    """What of a quantiser's error each start leaves: a table for each model and measure, the least in bold."""
    cells = found["cells"]
    parts = []
    for model, label in MODELS.items():
        for measure, (what, form) in MEASURES.items():
            mine = [cell for cell in cells if cell["model"] == model and measure in cell]
            if not mine:
                continue
            methods = list(dict.fromkeys(cell["method"] for cell in mine))
            rows = []
            for place in dict.fromkeys((cell["bits"], cell["group"], cell["rank"]) for cell in mine):
                values = {c["method"]: c[measure] for c in mine if (c["bits"], c["group"], c["rank"]) == place}
                least = min(values.values())
                shown = [f"{values[m]:{form}}" if m in values else "" for m in methods]
                bold = [
                    f"**{text}**" if values.get(m) == least else text for m, text in zip(methods, shown, strict=True)
                ]
                rows.append([*map(str, place), *bold])
            float_one = f"; {found['float'][model]:.2f} with float weights" if measure == "perplexity" else ""
            parts.append(f"{label}, {what}{float_one}:\n\n{table(['bits', 'group', 'rank', *methods], rows)}")
    return "\n\n".join(parts)


def fit_cost(found: dict[str, Any]) -> str:
    """Processor seconds of a fit beside LoftQ's decompositions: medians, and what part of LoftQ's they are."""
    rows = []
    for one in found["models"]:
        base = one["loftq"][0]
        shown = [f"{one[step][0]:.2f} s ({one[step][0] / base:.2f})" for step in ("fit", "call")]
        rows.append([MODELS[one["model"]], str(one["layers"]), f"{base:.2f} s", *shown, str(one["rounds"])])
    return table(["model", "layers", "LoftQ's decompositions", "the fit", "the whole call", "rounds"], rows)


def methods(found: dict[str, Any]) -> str:
    """What starts cost here and in PEFT, and how far they are from dense float64: a table for each model and method."""
    parts = []
    for model, label in MODELS.items():
        for method in dict.fromkeys(cell["method"] for cell in found["cells"]):
            mine = [cell for cell in found["cells"] if (cell["model"], cell["method"]) == (model, method)]
            rows = [
                [
                    cell["side"],
                    f"{cell['pass']:.1f} s" if cell["pass"] else "",
                    f"{cell['rest']:.1f} s",
                    f"{cell['bytes'] / 2**20:.0f} MiB",
                    *(f"{cell[name]:.1e}" if name in cell else "" for name in ("error", "worst", "lost")),
                    f"{cell['cosine']:.5f} ({cell['apart']})" if "apart" in cell else "",
                ]
                for cell in mine
            ]
            if rows:
                columns = ["", "pass", "rest", "memory", "error of B A, median", "worst", "energy lost, worst"]
                columns.append("cosine where there is a gap")
                parts.append(f"{label}, {method}, r = {found['rank']}:\n\n{table(columns, rows)}")
    return "\n\n".join(parts)


def made(found: dict[str, Any]) -> str:
    facts = found["made"]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return (
        f"`{facts['command']}`: {facts['model']}; {facts['data']}; {facts['lora']}; {facts['device']}, "
        f"{facts['threads']} thread; {versions}."
    )


def rendered() -> dict[Path, str]:
    """Every file that is made from the results → what it should hold."""
    illustrations, choosing = (
        json.loads((MEASURED / f"{name}.json").read_text(encoding="utf-8")) for name in ("illustrations", "choosing")
    )
    drawn = {"spectra": spectra, "streaming": streaming, "ranks": ranks}
    figures = {FIGURES / f"{name}.svg": draw(illustrations) for name, draw in drawn.items()}
    compared = {"missed": missed(illustrations), "made": made(illustrations)}
    chosen = filled(DOCS / "choosing.md", tables(choosing))
    repaired = json.loads((MEASURED / "quantization.json").read_text(encoding="utf-8"))
    cost = json.loads((MEASURED / "quantization_cost.json").read_text(encoding="utf-8"))
    starts = filled(DOCS / "quantised-bases.md", {"quantization": quantization(repaired), "fit cost": fit_cost(cost)})
    compared_methods = json.loads((MEASURED / "methods.json").read_text(encoding="utf-8"))
    started = filled(DOCS / "methods.md", {"methods": methods(compared_methods)})
    pages = {DOCS / "choosing.md": chosen, DOCS / "methods.md": started, DOCS / "quantised-bases.md": starts}
    return {**pages, DOCS / "comparison.md": filled(DOCS / "comparison.md", compared), **figures}


def filled(path: Path, contents: dict[str, str]) -> str:
    """A page with each table between its two comments."""
    page = path.read_text(encoding="utf-8")
    for name, content in contents.items():
        pattern = re.compile(rf"(<!-- measured: {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        page, count = pattern.subn(lambda match, content=content: f"{match[1]}\n{content}\n{match[2]}", page)
        if count != 1:
            raise SystemExit(f"{path}: expected one place for the table {name!r}, found {count}")
    return page


def main() -> None:
    stale = []
    for path, content in rendered().items():
        if not path.is_file() or path.read_text(encoding="utf-8") != content:
            stale.append(str(path.relative_to(ROOT)))
            if "--check" not in sys.argv:
                path.parent.mkdir(exist_ok=True)
                path.write_text(content, encoding="utf-8")
    print("changed:" if stale else "nothing to change", *stale)
    if stale and "--check" in sys.argv:
        raise SystemExit("not what the results say; run python tools/draw_measured.py")


if __name__ == "__main__":
    main()
