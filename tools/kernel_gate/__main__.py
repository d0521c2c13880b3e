"""``python -m tools.kernel_gate``: compile all variants, print and write the table, exit 1 on any failure.

Needs no GPU. The table holds what was compiled and what is modelled from it; nothing in it was timed.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import triton

from eva_kernels._cards import CARDS
from eva_kernels.gram.triton import GramTile
from eva_kernels.subspace.triton import SubspaceTile

from .bars import TRITON, UpdateLine, failures, fraction, product_clocks, updates
from .compiling import compile_all
from .machine_code import ARCHITECTURES, Code, links
from .model import CHIPS, gram_pass, occupancy
from .variants import Variant, all_variants, representative


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.kernel_gate", description=__doc__.splitlines()[0])
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--all", action="store_true", help="every variant, not those alone that ask for most")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("build/kernels.md"))
    arguments = parser.parse_args()

    supported = [name for name in arguments.architectures if CARDS[name].triton <= TRITON]
    known = [name for name in supported if links(name)]
    if left := sorted(set(arguments.architectures) - set(supported)):
        print(f"Triton {triton.__version__} has no kernels for {', '.join(left)}: left out", file=sys.stderr)
    if left := sorted(set(supported) - set(known)):
        print(
            f"Triton {triton.__version__} links {', '.join(left)} with ROCm's ld.lld, not here: left out",
            file=sys.stderr,
        )
    variants = all_variants(tuple(known))
    variants = variants if arguments.all else representative(variants)
    codes = compile_all(variants, arguments.jobs)
    failed: list[tuple[Variant | None, str]] = [
        (v, why) for v, code in zip(variants, codes, strict=True) for why in failures(v, code)
    ]
    lines = ["# Kernels as compiled", "", *variant_table(variants, codes), ""]
    for architecture in known:
        if architecture in CHIPS:
            passes = {
                v.tile: gram_pass(code, v.tile, CHIPS[architecture])
                for v, code in zip(variants, codes, strict=True)
                if v.architecture == architecture
                and isinstance(v.tile, GramTile)
                and v.barred
                and not v.flags["MASKED"]
            }
            table = updates(architecture, passes)
            lines += update_table(table)
            failed += [
                (None, f"{u.chip.name}: n = {u.n}, d = {u.d}: {u.ratio:.2f} times the ideal") for u in table if u.failed
            ]
    lines += product_table(variants, codes)
    text = "\n".join(lines)
    print(text)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(text + "\n")
    for variant, why in failed:
        print("FAILED", f"{variant.architecture} {variant.describe()}: {why}" if variant else why, file=sys.stderr)
    summary = Counter(v.architecture for v in variants)
    print(f"{len(variants)} variants {dict(summary)}, {len(failed)} failures", file=sys.stderr)
    return bool(failed)


def variant_table(variants: list[Variant], codes: list[Code]) -> list[str]:
    rows = [
        "| architecture | variant | registers | spills | shared memory | occupancy | tensor instruction "
        "| operand copies | instructions per product | modelled fraction of peak | |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- | --- | ---: | ---: | --- |",
    ]
    for variant, code in zip(variants, codes, strict=True):
        chip = CHIPS.get(variant.architecture)
        value = fraction(variant, code)
        copies = ", ".join(f"{count} {kind} of {width} B" for (kind, width), count in sorted(code.loads.items()))
        cells = [
            variant.architecture,
            variant.describe(),
            code.registers,
            code.spills,
            code.shared,
            f"{occupancy(code, variant.warps, chip):.2f}" if chip else "",
            ", ".join(sorted(code.tensor)),
            copies,
            f"{len(code.loop) / code.multiplies:.1f}" if code.multiplies else "",
            "" if value is None else f"{value:.2f}",
            "; ".join(failures(variant, code)),
        ]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return rows


def update_table(table: list[UpdateLine]) -> list[str]:
    rows = [
        f"## Modelled Gram updates, {table[0].chip.name}",
        "",
        "| rows | width | whole tiles | split x shares | µs | over ideal | over roofline |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for line in table:
        u = line.update
        shares = f"{u.plan.split} x {u.plan.splits}" if u.plan.split else ""
        rows.append(
            f"| {line.n} | {line.d} | {u.plan.whole} | {shares} | {u.seconds * 1e6:.1f} "
            f"| {line.ratio:.2f} | {u.seconds / u.roofline:.2f} |"
        )
    return [*rows, ""]


def product_table(variants: list[Variant], codes: list[Code]) -> list[str]:
    """Of thin products of plain bfloat16 rows, where there is a model of the chip."""
    rows = [
        "## Modelled thin products, clocks of a multiprocessor for one pass of the loop",
        "",
        "| | of columns | tensor cores | shared memory | instructions | L2 | memory |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for variant, code in zip(variants, codes, strict=True):
        flags, chip = variant.flags, CHIPS.get(variant.architecture)
        is_plain = variant.barred and variant.dtype == "bf16" and not flags["MASKED"]
        if chip and is_plain and isinstance(variant.tile, SubspaceTile):
            clocks = [f"{each:.0f}" for each in product_clocks(variant, code, chip).values()]
            cells = [f"{chip.name}, {variant.name}", f"{flags['USED']} of {flags['PADDED']}", *clocks]
            rows.append("| " + " | ".join([*cells, ""][:7]) + " |")
    return [*rows, ""]


if __name__ == "__main__":
    sys.exit(main())
