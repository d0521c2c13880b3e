"""Writes `docs/roofline.md`: what EVA's kernels should cost on GPUs that nobody here has, and how to find out.

    python benchmarks/roofline.py              # the page, from the recorded figures of the kernel gate
    python benchmarks/roofline.py --compile    # compile the kernels anew first and record what the gate reads in them

Everything is arithmetic on shapes, published figures of the chips, and machine code; nothing was timed.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shapes import MODELS, Model

ROOT = Path(__file__).parents[1]
HOST = ROOT / "benchmarks" / "results" / "host.json"
sys.path.insert(0, str(ROOT))  # the kernel gate is a package beside this folder

from eva_kernels.gram.triton import ALIGNED_TILES, GramTile  # noqa: E402
from eva_kernels.subspace.triton import choose_tile  # noqa: E402
from tools.kernel_gate.bars import product_fraction  # noqa: E402
from tools.kernel_gate.compiling import compile_all  # noqa: E402
from tools.kernel_gate.model import CHIPS, Chip, Pass, gram_pass, gram_update  # noqa: E402
from tools.kernel_gate.variants import Variant, all_variants  # noqa: E402

RECORDED = ROOT / "benchmarks" / "results" / "gate.json"
PAGE = ROOT / "docs" / "roofline.md"
SHOWN = ("Qwen2.5-0.5B", "Llama-3-8B", "Llama-3-70B")
ROWS = 2048
COLUMNS, PADDED = 80, 128  # r = 16, rho 2, default oversampling; the kernels multiply the next power of two
SWEEPS = 8  # of the Jacobi eigensolver, for float64: assumed
REFRESH_PERIOD = 4
LAUNCH_SECONDS = 2.5e-6  # of the driver, in each launch: assumed
FLOAT32 = {"sm_80": 19.5e12, "sm_90": 67e12, "sm_100": 75e12}  # published FLOP/s outside the tensor cores
FLOAT64 = {"sm_80": 9.7e12, "sm_90": 34e12, "sm_100": 37e12}

Gate = Mapping[str, Mapping[str, Any]]
Host = Mapping[str, Mapping[str, Any]]


def read_gate(jobs: int) -> dict[str, dict[str, Any]]:
    """Per architecture the fractions of the thin products, and the passes of the Gram kernel's tiles by their index."""
    wanted = [variant for variant in all_variants(tuple(CHIPS)) if _is_shown(variant)]
    gate: dict[str, dict[str, Any]] = {architecture: {"gram": {}} for architecture in CHIPS}
    for variant, code in zip(wanted, compile_all(wanted, jobs), strict=True):
        chip, mine = CHIPS[variant.architecture], gate[variant.architecture]
        if isinstance(variant.tile, GramTile):
            tiles = [tile for _, tile in ALIGNED_TILES[variant.architecture]]
            mine["gram"][str(tiles.index(variant.tile))] = asdict(gram_pass(code, variant.tile, chip))
        else:
            mine[variant.name] = product_fraction(variant, code, chip)
    return gate


def _is_shown(variant: Variant) -> bool:
    flags = variant.flags
    plain = variant.dtype == "bf16" and variant.barred and not flags["MASKED"]
    return plain and (variant.name == "gram" or flags.get("PADDED") == PADDED)


def peak(chip: Chip) -> float:
    """Dense bf16 FLOP/s."""
    return 2 * chip.processors * chip.multiply_adds * chip.clock


def forward_seconds(model: Model, chip: Chip) -> float:
    return model.forward_flops(ROWS, ROWS) / peak(chip)


def products_seconds(model: Model, architecture: str, gate: Mapping[str, Any]) -> float:
    """X Q from memory, then Xᵀ P with X from L2, each at the fraction of that bandwidth its machine code allows."""
    import torch

    chip, tile = CHIPS[architecture], choose_tile(architecture, torch.bfloat16, True, PADDED)
    seconds = 0.0
    for entry in model.inputs:
        x_bytes = 2 * ROWS * entry.width
        lifted = x_bytes * (1 + COLUMNS / tile.columns)  # X, and P once for every block of columns
        seconds += x_bytes / chip.memory / gate["project"] + lifted / (chip.l2_bytes * chip.clock) / gate["lift"]
    return model.blocks * seconds


def gram_seconds(model: Model, architecture: str, gate: Mapping[str, Any]) -> float:
    """The exact statistic of every distinct input, as the gate models an update."""
    chip, seconds = CHIPS[architecture], 0.0
    entries = ALIGNED_TILES[architecture]
    for entry in model.inputs:
        index, (_, tile) = max(
            ((i, pair) for i, pair in enumerate(entries) if pair[0] <= entry.width), key=lambda found: found[1][0]
        )
        seconds += gram_update(ROWS, entry.width, tile, Pass(**gate["gram"][str(index)]), chip).seconds
    return model.blocks * seconds


def refresh_seconds(model: Model, architecture: str) -> float:
    """Seven d × q × q products in float32 with what they move, and all q × q eigenproblems by Jacobi in float64."""
    chip = CHIPS[architecture]
    inputs, width = model.blocks * len(model.inputs), sum(entry.width for entry in model.inputs) * model.blocks
    arithmetic = 7 * 2 * width * COLUMNS**2 / FLOAT32[architecture]
    moved = 14 * 4 * width * COLUMNS / chip.memory
    rotations = 6 * 2 * PADDED**3 * SWEEPS  # matrix and vectors
    waves = -(-inputs // chip.processors)
    eigen = waves * rotations / (FLOAT64[architecture] / chip.processors)
    return max(arithmetic, moved) + eigen


def state_bytes(model: Model, kind: str) -> int:
    widths = [entry.width for entry in model.inputs]
    if kind == "gram":
        return 4 * model.blocks * sum(d * (d + COLUMNS) for d in widths)
    return model.blocks * sum(4 * 3 * d * COLUMNS + 2 * d * PADDED for d in widths)  # and the operand of the products


def host_seconds(model: Model, host: Host) -> tuple[float, float]:
    """Of a forward, and of what a pass adds to it: measured, but for launches; a refresh by its operators."""

    def of(what: str) -> dict[str, Any]:
        return next(entry for case, entry in host["figures"].items() if case.startswith(f"{model.name}: {what}"))

    forward, batch, refresh = of("a forward"), of("a batch beside it"), of("a refresh")
    operator = forward["microseconds"] / forward["operators"]
    added = batch["microseconds"] + operator * refresh["operators"] / REFRESH_PERIOD
    return 1e-6 * forward["microseconds"], 1e-6 * added + LAUNCH_SECONDS * batch["launches"]


def batch_table(gate: Gate, host: Host) -> list[str]:
    lines = [
        "## A batch: the larger of host and device",
        "",
        "| modelled | forward: host, ms | device, ms | with the pass: host, ms | device, ms | a batch, ms | set by "
        "| forwards |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    for name in SHOWN:
        model = MODELS[name]
        host_forward, host_added = host_seconds(model, host)
        for architecture, chip in CHIPS.items():
            forward = forward_seconds(model, chip)
            added = products_seconds(model, architecture, gate[architecture])
            added += refresh_seconds(model, architecture) / REFRESH_PERIOD
            on_host, on_device = host_forward + host_added, forward + added
            batch = max(on_host, on_device)
            cells = [f"{1e3 * t:.1f}" for t in (host_forward, forward, on_host, on_device, batch)]
            cells += ["host" if on_host > on_device else "device", f"{batch / max(host_forward, forward):.2f}"]
            lines.append(f"| {name}, {chip.name} | {' | '.join(cells)} |")
    return lines


def model_table(model: Model, gate: Gate) -> list[str]:
    lines = [
        f"### {model.name}",
        "",
        f"{model.layers} adapted layers, {model.blocks * len(model.inputs)} distinct inputs; "
        f"{model.forward_flops(1, ROWS) / 1e9:.2f} GFLOP a token without the head. State: subspace "
        f"{state_bytes(model, 'subspace') / 2**20:,.0f} MiB, exact Gram {state_bytes(model, 'gram') / 2**30:,.1f} GiB.",
        "",
        "| modelled | forward, ms | subspace products, ms | a refresh, ms | subspace, of the forward "
        "| exact Gram, ms | Gram, of the forward |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for architecture, chip in CHIPS.items():
        forward = forward_seconds(model, chip)
        products = products_seconds(model, architecture, gate[architecture])
        refresh, gram = refresh_seconds(model, architecture), gram_seconds(model, architecture, gate[architecture])
        part = (products + refresh / REFRESH_PERIOD) / forward
        lines.append(
            f"| {chip.name} | {1e3 * forward:.1f} | {1e3 * products:.2f} | {1e3 * refresh:.2f} | {part:.1%} "
            f"| {1e3 * gram:.1f} | {gram / forward:.0%} |"
        )
    return lines


HEAD = f"""# Roofline: what it should cost on a GPU

**Everything on this page is modelled. No figure on it was measured on a GPU, and none has run these kernels yet.** It
is written by `make roofline` from the shapes of the models, published figures of the chips, the machine code of the
compiled kernels as the kernel gate reads it (`make kernels`), and what a pass costs the host (`make bench-host`).

A batch is {ROWS} tokens in bfloat16; the adapters have r = 16 and rho 2, so that a basis has {COLUMNS} columns: the
kernels read these, and multiply {PADDED}.

- *forward*: FLOPs of the linear layers and of causal attention over {ROWS} tokens, without the LM head, at the chip's
  dense bfloat16 peak. Real forwards reach half to two thirds of that; the shares below are too large by as much.
- *subspace products*: X Q with X from memory and Xᵀ P with X from the L2 cache, each at the fraction of that
  bandwidth that the kernel's own inner loop allows. Gaps between launches are not in it, nor is the sum of what was
  split, and an X that has left the L2 cache is read twice.
- *a refresh*: seven products of (d, q) with (q, q) outside the tensor cores, and one eigenproblem of order q per input,
  {SWEEPS} sweeps of Jacobi in float64 (assumed). There is one after 1, 2, 4, 8 batches and after every {REFRESH_PERIOD}
  from then on: a quarter of it goes into the share.
- *exact Gram*: every input's symmetric update, waves, flush and reduction included, as the gate models it. "auto" does
  not take it at these widths.
- *host*: it launches, and the device works behind it; a batch takes as long as the slower of the two, and *forwards* is
  that over the same for a forward alone. Measured on {{PROCESSOR}} with launches that do nothing, by models of these
  depths and tiny widths, whose operators on a CPU stand for their launches on a GPU. For the driver
  {1e6 * LAUNCH_SECONDS:.1f} µs are added to each launch of ours (assumed); an operator of a refresh costs what one of
  the forward does.

Where others have published both, measured speeds of such kernels were 0.6 of such a model.
"""

TAIL = """## Replacing a prediction by a measurement

On a machine with the GPU, from a clone:

| prediction | command | where it then stands |
| --- | --- | --- |
| that the kernels are right at all | `make test-gpu` | its exit status |
| subspace products | `python benchmarks/run.py --device cuda --suite subspace` | "Subspace product", of the forward |
| exact Gram | `python benchmarks/run.py --device cuda --suite gram` | "Gram", of the forward and of the peak |
| a refresh | `python benchmarks/run.py --device cuda --suite eigen` | "Refresh" and "Eigenproblems" |
| all of it, beside the peers | `make bench-gpu` | `build/bench/report.html` |

`python benchmarks/report.py build/bench/results.json --publish` keeps the results in `benchmarks/results/cuda.json`
and their tables in [the page on performance](performance.md). Peaks and bandwidth are then those that the GPU reached
in the same run.
"""


def page(gate: Gate, host: Host) -> str:
    sections = ["\n".join(model_table(MODELS[name], gate)) for name in SHOWN]
    fractions = ["## What the machine code allows", "", "| | X Q, of memory bandwidth | Xᵀ P, of L2 bandwidth "
                 "| Gram, of tensor peak, narrow to wide tiles |", "| --- | ---: | ---: | ---: |"]  # fmt: skip
    for architecture, chip in CHIPS.items():
        mine = gate[architecture]
        passes = [Pass(**mine["gram"][key]) for key in sorted(mine["gram"], key=int)]
        grams = ", ".join(f"{one.fraction:.2f}" for one in passes)
        fractions.append(f"| {chip.name} ({architecture}) | {mine['project']:.2f} | {mine['lift']:.2f} | {grams} |")
    tables = ["## Modelled cost of a batch", *sections, "\n".join(batch_table(gate, host)), "\n".join(fractions)]
    head = HEAD.replace("{PROCESSOR}", str(host["processor"]))
    return "\n\n".join([head.rstrip(), *tables, TAIL])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.compile:
        RECORDED.parent.mkdir(parents=True, exist_ok=True)
        RECORDED.write_text(json.dumps(read_gate(arguments.jobs), indent=1) + "\n")
    PAGE.write_text(page(json.loads(RECORDED.read_text()), json.loads(HOST.read_text())), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
