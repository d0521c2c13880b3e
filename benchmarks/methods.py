"""What CorDA and PiSSA cost here and in PEFT, and how far both are from dense float64: the table of docs/methods.md.

    python benchmarks/methods.py [--models minilm smollm2] [--methods pissa corda] [--output FILE]
    python benchmarks/methods.py --table     # of eva_kernels/singular_ends: accuracy against cost
    python benchmarks/methods.py --widths    # CorDA from so many leading directions, beside that from all of R
    python benchmarks/methods.py --turns     # a whole start beside PEFT's, by turns in one process
    python benchmarks/methods.py --longer    # CorDA beside EVA, by turns, in the pass that benchmarks/end_to_end.py has

Each start runs in a process of its own, on one thread, after the model and the batches are loaded: seconds of the
processor's time for the pass and for the rest, which neighbours on the machine do not lengthen as they do the clock's,
and how far its memory rose above what was there (VmHWM, set back before). The batches are the same; PEFT's CorDA takes
one sample a forward, since it fails on more, and counts padding. "EVA" is EVA on the same batches, "ours" what
``initialize`` does unless it is told otherwise: as many directions of R as EVA keeps. ``--turns`` with ``--methods
corda`` is CorDA beside PEFT's, and beside the forwards alone.

Errors are ‖s B A − L‖ / ‖L‖ with L from a full singular value decomposition in float64 of the same W, and for CorDA of
the same R: each side's own, which is what is known of it here, and with PEFT's damping as it has it. Also the smallest
cosine between the two subspaces in layers whose singular values differ by more than ``GAP`` after the last one that is
taken, and in how many: where they do not, neither subspace is the answer. For PiSSA also what of the leading
directions' energy is lost. Of many layers every so many are compared.
"""

import argparse
import copy
import gc
import json
import math
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.layer import svd_lowrank
from torch import Tensor, nn

from eva_kernels.singular_ends import krylov, leading_singular
from eva_lora import EvaConfig, apply, collect, initialize, plan
from eva_lora.cli.demo import load_smollm2, packed_text
from eva_lora.planning import versions
from quantization import load as load_model

OUTPUT = Path(__file__).parents[1] / "docs" / "measured" / "methods.json"
RANK = 16
GAP = 0.01  # relative
COMPARED = 36  # layers, evenly
SIDES = {
    "pissa": ("ours", "PEFT, pissa", "PEFT, pissa_niter_16", "PEFT, pissa_niter_4"),
    "corda": ("EVA", "ours", "ours, 80 directions", "ours, whole moments", "PEFT"),
}
WIDTHS = (48, 80, 112)
PASSES: list[float] = []  # seconds, of this process


def load(name: str) -> tuple[nn.Module, list[dict[str, Tensor]], list[str]]:
    model, batches, layers = load_model(name)
    return model, batches[:8], layers


def memory(field: str) -> int:
    """Bytes that the process has (VmRSS), or had at most (VmHWM)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(field)).split()[1])


def started(side: str, method: str, model: nn.Module, batches: list[Any], layers: list[str]) -> tuple[nn.Module, Any]:
    """A PEFT model started by one side, and what of R its formula takes."""
    options: dict[str, Any] = {"r": RANK, "lora_alpha": RANK, "target_modules": layers}
    if side == "EVA":
        mine = get_peft_model(model, LoraConfig(**options))
        tick = time.process_time()
        known = collect(mine, batches, EvaConfig(max_batches=len(batches)), progress=False)
        PASSES.append(time.process_time() - tick)
        apply(mine, plan(known))
        return mine, None
    if side.startswith("ours"):
        mine = get_peft_model(model, LoraConfig(**options))
        if method == "pissa":
            initialize(mine, method="pissa")
            return mine, None
        config = EvaConfig(rho=1.0, max_batches=len(batches), keep_moments=side.endswith("moments"))
        if side.endswith("directions"):
            config = replace(config, oversampling=80 / RANK, statistic="subspace")
        tick = time.process_time()
        known = collect(mine, batches, config, progress=False)
        PASSES.append(time.process_time() - tick)
        initialize(mine, known, "corda", config, progress=False)
        return mine, {site.name: known.inputs[site.input] for site in known.sites}
    if method == "pissa":
        return get_peft_model(model, LoraConfig(**options, init_lora_weights=side.removeprefix("PEFT, "))), None
    corda = CordaConfig(corda_method="ipm", prune_temporary_fields=False)
    theirs = LoraConfig(**options, init_lora_weights="corda", corda_config=corda)

    def run() -> None:
        tick = time.process_time()
        for batch in batches:
            for i in range(len(batch["input_ids"])):
                model(**{key: value[i : i + 1] for key, value in batch.items()})
        PASSES.append(time.process_time() - tick)

    preprocess_corda(model, theirs, run_model=run)
    made = get_peft_model(model, theirs)
    return made, {n: _damped(model.get_submodule(n).base_layer.covariance_matrix) for n in layers}


def _whole(moment: Any) -> Tensor:  # (n, n) float64
    """R, as far as a side knows it."""
    if isinstance(moment, Tensor):
        return moment
    if moment.moment is not None:
        return moment.moment
    factor, rest = (part.double() for part in moment.second_moment())
    return factor @ factor.T + rest * torch.eye(len(factor))


def _damped(covariance: Tensor) -> Tensor:
    return covariance.double() + 0.01 * covariance.double().diagonal().mean() * torch.eye(len(covariance))


def measure(side: str, method: str, name: str) -> dict[str, Any]:
    """One start, in this process."""
    warnings.simplefilter("ignore")
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, batches, layers = load(name)
    weights = {n: model.get_submodule(n).weight.detach().clone() for n in layers}
    model(**batches[0])
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before, tick = memory("VmRSS"), time.process_time()
    made, moments = started(side, method, model, batches, layers)
    seconds, peak = time.process_time() - tick, memory("VmHWM") - before
    errors, lost, cosines = [], [], []
    for n in [] if side == "EVA" else layers[:: max(1, len(layers) // COMPARED)]:
        layer: Any = made.get_base_model().get_submodule(n)  # type: ignore[operator]
        b, a = layer.lora_B["default"].weight.double(), layer.lora_A["default"].weight.double()
        w = weights[n].double()
        u, s, _ = torch.linalg.svd(w if moments is None else w @ _whole(moments[n]), full_matrices=False)
        wanted = u[:, :RANK] @ (u[:, :RANK].T @ w)
        errors.append(float((layer.scaling["default"] * b @ a - wanted).norm() / wanted.norm()))
        q = torch.linalg.qr(b).Q
        lost.append(float(1 - (q.T @ w).square().sum() / s[:RANK].square().sum()) if moments is None else 0.0)
        if s[RANK - 1] - s[RANK] > GAP * s[RANK - 1]:
            cosines.append(float(torch.linalg.svdvals(u[:, :RANK].T @ q)[-1]))
    found: dict[str, Any] = {
        "model": name, "method": method, "side": side, "pass": sum(PASSES), "rest": seconds - sum(PASSES),
        "bytes": peak,
    }  # fmt: skip
    if errors:
        found |= {"error": statistics.median(errors), "worst": max(errors)}
    if cosines:
        found |= {"cosine": min(cosines), "apart": f"{len(cosines)} of {len(errors)}"}
    return found | ({"lost": max(lost)} if method == "pissa" else {})


def table() -> None:
    """Accuracy of leading singular vectors against their cost, on MiniLM's weights."""
    torch.set_num_threads(1)
    model, _, layers = load("minilm")
    weights = [model.get_submodule(n).weight.detach() for n in layers]
    exact = [torch.linalg.svd(w.double(), full_matrices=False) for w in weights]
    ways: dict[str, Any] = {
        f"pissa_niter_{n}": lambda w, n=n: svd_lowrank(w, RANK, niter=n)[0] for n in (4, 16)
    } | dict.fromkeys((f"depth {depth}" for depth in (4, 5, 6, 7, 8, 9)), lambda w: leading_singular(w, RANK).left)
    chosen = krylov.DEPTH, krylov.LOST, krylov.TURNED
    ways["as it is"] = lambda w: leading_singular(w, RANK).left
    ways["full SVD"] = lambda w: torch.linalg.svd(w, full_matrices=False)[0][:, :RANK]
    for name, way in ways.items():
        if name.startswith("depth"):
            krylov.DEPTH, krylov.LOST, krylov.TURNED = int(name.split()[1]), math.inf, math.inf  # no more than that
        else:
            krylov.DEPTH, krylov.LOST, krylov.TURNED = chosen
        way(weights[0])
        tick = time.process_time()
        found = [way(w) for w in weights]
        seconds = (time.process_time() - tick) / len(weights)
        lost, cosines = [], []
        for w, q, (u, s, _) in zip(weights, found, exact, strict=True):
            lost.append(float(1 - (q.double().T @ w.double()).square().sum() / s[:RANK].square().sum()))
            cosines.append(float(torch.linalg.svdvals(u[:, :RANK].T @ q.double())[-1]))
        print(
            f"{name}: {1e3 * seconds:.1f} ms, lost {max(lost):.1e} at worst, {statistics.mean(lost):.1e} on average; "
            f"cosine {min(cosines):.6f} at worst, median {statistics.median(cosines):.7f}",
            flush=True,
        )


@torch.no_grad()
def turns(name: str, method: str, rounds: int = 3, *, longer: bool = False) -> None:
    """Seconds of the processor's time that a whole start takes here and in PEFT, by turns; the median of the ratios to
    the last side, each to its own turn."""
    torch.set_num_threads(1)
    model, batches, layers = load(name)
    sides: tuple[str, ...] = ("ours", "PEFT, pissa_niter_16")
    if method == "corda":
        sides = ("forwards alone", "EVA", "ours", "ours, 80 directions", "PEFT")
    if longer:
        _, tokenizer = load_smollm2(echo=lambda message: None)
        batches, sides = packed_text(tokenizer, sequences=4, tokens=256)[:12], ("forwards alone", "EVA", "ours")
    taken: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            fresh = copy.deepcopy(model)
            gc.collect()  # as timeit has it: whose turn it is to tidy up is chance
            gc.disable()
            tick = time.process_time()
            if side == "forwards alone":
                for batch in batches:
                    fresh(**batch)
            else:
                started(side, method, fresh, batches, layers)
            taken[side].append(time.process_time() - tick)
            gc.enable()
    print(name, {side: [round(value, 2) for value in seconds] for side, seconds in taken.items()}, flush=True)
    last = taken[sides[-1]]
    for side in sides[:-1]:
        ratio = statistics.median(own / its for own, its in zip(taken[side], last, strict=True))
        print(f"{name}: {side} {ratio:.2f} of {sides[-1]}'s time", flush=True)


@torch.no_grad()
def widths(name: str) -> None:
    """How far CorDA's formula from a streamed subspace is from the same of all of R, by the subspace's columns."""
    torch.set_num_threads(1)
    model, batches, layers = load(name)
    adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers))
    config = EvaConfig(rho=1.0, max_batches=len(batches))
    whole = collect(adapted, batches, replace(config, keep_moments=True), progress=False)
    streamed = {
        columns: collect(
            adapted, batches, replace(config, oversampling=columns / RANK, statistic="subspace"), progress=False
        )
        for columns in WIDTHS
    }
    sites = whole.sites[:: max(1, len(whole.sites) // COMPARED)]
    found: dict[int, list[tuple[float, float]]] = {columns: [] for columns in WIDTHS}
    for site in sites:
        w = adapted.get_base_model().get_submodule(site.name).base_layer.weight.double()
        r = whole.inputs[site.input].moment.double()
        u, s, _ = torch.linalg.svd(w @ r, full_matrices=False)
        exact = u[:, :RANK] @ (u[:, :RANK].T @ w)
        for columns, statistics_ in streamed.items():
            theirs = next(other for other in statistics_.sites if other.name == site.name)
            known = statistics_.inputs[theirs.input].second_moment()
            image = (w @ known.factor.double()) @ known.factor.double().T + known.rest.double() * w
            v = torch.linalg.svd(image, full_matrices=False)[0][:, :RANK]
            lost = 1 - (v.T @ w @ r).square().sum() / s[:RANK].square().sum()
            found[columns].append((float((v @ (v.T @ w) - exact).norm() / exact.norm()), float(lost)))
    for columns, pairs in found.items():
        errors, losses = zip(*pairs, strict=True)
        print(
            f"{name}, {columns} columns: B A differs by {statistics.median(errors):.1e}, {max(errors):.1e}; "
            f"of W R's leading energy lost {statistics.median(losses):.1e}, {max(losses):.1e} (medians, worst)",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["minilm", "smollm2"], choices=["minilm", "smollm2"])
    parser.add_argument("--methods", nargs="+", default=["pissa", "corda"], choices=["pissa", "corda"])
    parser.add_argument("--sides", nargs="+", help="of those that there are; all if none is named")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--widths", action="store_true")
    parser.add_argument("--turns", action="store_true")
    parser.add_argument("--longer", action="store_true")
    parser.add_argument("--one", nargs=3, metavar=("SIDE", "METHOD", "MODEL"), help="what the processes are given")
    arguments = parser.parse_args()
    if arguments.table:
        table()
        return
    if arguments.longer:
        turns("smollm2", "corda", longer=True)
        return
    if arguments.widths or arguments.turns:
        for model in arguments.models:
            if arguments.widths:
                widths(model)
            for method in arguments.methods if arguments.turns else ():
                turns(model, method, rounds=9 if method == "pissa" else 3)
        return
    if arguments.one:
        print(json.dumps(measure(*arguments.one)))
        return
    cells = []
    for model in arguments.models:
        for method in arguments.methods:
            for side in (side for side in SIDES[method] if side in (arguments.sides or SIDES[method])):
                command = [sys.executable, __file__, "--one", side, method, model]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                cells.append(json.loads(done.stdout.splitlines()[-1]))
                print(json.dumps(cells[-1]), flush=True)
                arguments.output.parent.mkdir(parents=True, exist_ok=True)
                written = {"versions": versions(), "rank": RANK, "cells": cells}
                arguments.output.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
