"""What LoRA starts repair of a quantised base, before any training: the table of docs/quantised-bases.md.

    python benchmarks/quantization.py [--models minilm smollm2] [--bits 4 3 2] [--groups 32 128] [--ranks 4 16 64]
                                      [--methods none "repair, in parts" ...]
    python benchmarks/quantization.py --cost

Weights of all linear layers (of SmolLM2 all but the head) are rounded to nearest, with a step for each group of a row.
Fitted is on text of the Python documentation, measured on other text of it: the mean over layers of the output's
error, E‖(W − Q − s B A) x‖² over E‖W x‖² with x from the float model; the model's hidden states, ‖h − h_float‖ over
‖h_float‖; and SmolLM2's perplexity. Methods: none; LoftQ, one round and five, each of which rounds W − s B A anew;
QERA's approximation (the diagonal of E x xᵀ); and ours, with every layer's own rank ("repair"), with ranks moved
("repair, rho 2"), with the model fitted in parts, one after the other ("repair, in parts": 12 of MiniLM's, 6 of
SmolLM2's, or ``--parts``), and on the inputs of the float model beside those of the quantised one ("repair, float
inputs"). Cells that the file has already stay, unless they are measured anew.

``--cost``: at 4 bits, groups of 128 and rank 16, seconds that the process computed on one thread, which the work of
others does not change much: of LoftQ's singular value decompositions, one of each layer, as LoftQ and PEFT have them;
of our fit of the same layers; and of the whole call with statistics at hand, which reads, checks and writes as well. In
turn, ``--rounds`` times. What the pass costs that makes the statistics says ``benchmarks/end_to_end.py``.
"""

import argparse
import copy
import json
import math
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from eva_kernels.low_rank_fit import SecondMoment, fit_low_rank
from eva_lora import EvaConfig, collect, fit_quantization_error
from eva_lora.cli.demo import load_smollm2, packed_text
from eva_lora.planning import versions
from until_converged import load as load_minilm

MEASURED = Path(__file__).parents[1] / "docs" / "measured"
OUTPUT, COST = MEASURED / "quantization.json", MEASURED / "quantization_cost.json"
METHODS = (
    "none",
    "loftq",
    "loftq, 5 rounds",
    "qera, diagonal",
    "repair",
    "repair, rho 2",
    "repair, in parts",
    "repair, float inputs",
)
PARTS = {"minilm": 12, "smollm2": 6}
KEY = ("model", "bits", "group", "rank", "method")
FITTED, HELD = 10, 3  # batches
ROUNDS = 5
Weights = dict[str, Tensor]


def rounded(weight: Tensor, bits: int, group: int) -> Tensor:  # (out, in)
    groups = weight.reshape(len(weight), -1, math.gcd(group, weight.shape[1]))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp_min(1e-12)
    return (((groups - low) / step).round() * step + low).reshape(weight.shape)


def load(name: str) -> tuple[nn.Module, list[dict[str, Tensor]], list[str]]:
    """A float model, its batches (some to be held back), and the layers to quantise."""
    if name == "smollm2":
        model, tokenizer = load_smollm2(echo=lambda message: None)
        batches = [
            {"input_ids": b["input_ids"], "attention_mask": b["attention_mask"]}
            for b in packed_text(tokenizer, sequences=4, tokens=128)
        ]
    else:
        model, batches = load_minilm()
    count = FITTED + HELD
    batches = [batches[i * len(batches) // count] for i in range(count)]
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in ("lm_head", "pooler.dense")]
    return model.eval(), batches, layers


def inputs(model: nn.Module, layers: list[str], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows of a batch that each layer sees, padding left out."""
    seen: dict[str, Tensor] = {}
    keep = batch["attention_mask"].flatten().bool()
    hooks = [
        model.get_submodule(n).register_forward_pre_hook(
            lambda _, args, n=n: seen.__setitem__(n, args[0].flatten(0, -2)[keep])
        )
        for n in layers
    ]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


def peft_of(base: nn.Module, layers: list[str], rank: int) -> nn.Module:
    return get_peft_model(copy.deepcopy(base), LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers))


def deltas(model: Any, layers: list[str]) -> Weights:
    root = model.get_base_model()
    return {
        n: root.get_submodule(n).get_delta_weight("default").detach()
        for n in layers
        if hasattr(root.get_submodule(n), "lora_A")
    }


def starts(
    model: nn.Module,
    base: nn.Module,
    batches: list[Any],
    layers: list[str],
    bits: int,
    group: int,
    rank: int,
    parts: int,
    methods: Collection[str],
) -> Iterator[tuple[str, Weights]]:
    """(method, what each layer computes with)."""
    w = {n: model.get_submodule(n).weight.detach() for n in layers}
    q = {n: base.get_submodule(n).weight.detach() for n in layers}
    if "none" in methods:
        yield "none", q
    none = {n: SecondMoment(torch.empty(x.shape[1], 0), torch.ones(())) for n, x in w.items()}

    if {"loftq", "loftq, 5 rounds"} & {*methods}:
        anew, fitted = q, {n: fitted_to(w[n] - q[n], none[n], rank) for n in layers}
        yield "loftq", {n: q[n] + fitted[n] for n in layers}
        for _ in range(ROUNDS - 1):
            anew = {n: rounded(w[n] - fitted[n], bits, group) for n in layers}
            fitted = {n: fitted_to(w[n] - anew[n], none[n], rank) for n in layers}
        yield f"loftq, {ROUNDS} rounds", {n: anew[n] + fitted[n] for n in layers}

    if "qera, diagonal" in methods:
        squares = dict.fromkeys(layers, torch.zeros(()))
        for batch in batches:
            for n, x in inputs(base, layers, batch).items():
                squares[n] = squares[n] + x.square().sum(0)
        diagonal = {n: SecondMoment(none[n].factor, squares[n] / squares[n].mean()) for n in layers}
        yield "qera, diagonal", {n: q[n] + fitted_to(w[n] - q[n], diagonal[n], rank) for n in layers}

    options: dict[str, tuple[float, dict[str, Any]]] = {
        "repair": (1.0, {}),
        "repair, rho 2": (2.0, {}),
        "repair, in parts": (1.0, {"passes": parts}),
        "repair, float inputs": (1.0, {"float_inputs": True}),
    }
    for label, (rho, chosen) in options.items():
        if label not in methods:
            continue
        ours = peft_of(base, layers, rank)
        config = EvaConfig(rho=rho, max_batches=len(batches), oversampling=5.0 / rho)
        fit_quantization_error(ours, batches, model, config, progress=False, hold_back=0, **chosen)
        made = deltas(ours, layers)
        yield label, {n: q[n] + made[n] if n in made else q[n] for n in layers}


def fitted_to(error: Tensor, moment: SecondMoment, rank: int) -> Tensor:
    fit = fit_low_rank(error, moment, rank)
    return fit.left @ fit.right


def quantised(model: nn.Module, layers: list[str], bits: int, group: int) -> nn.Module:
    base = copy.deepcopy(model)
    for n in layers:
        weight = base.get_submodule(n).weight
        weight.data.copy_(rounded(weight.data, bits, group))
    return base


def cost(name: str, rounds: int) -> dict[str, Any]:
    """Processor seconds of a fit of all layers, and of what it stands beside."""
    model, batches, layers = load(name)
    fitted = batches[HELD:]
    base = quantised(model, layers, 4, 128)
    config = EvaConfig(rho=1.0, max_batches=len(fitted), oversampling=5.0)
    ours = [peft_of(base, layers, 16) for _ in range(rounds + 1)]
    statistics = collect(ours[0], fitted, config, progress=False)
    of = {site.name: statistics.inputs[site.input].second_moment() for site in statistics.sites}
    w = {n: model.get_submodule(n).weight.detach() for n in layers}
    q = {n: base.get_submodule(n).weight.detach() for n in layers}

    def loftq() -> None:
        for n in layers:
            torch.linalg.svd(w[n] - q[n], full_matrices=False)

    steps: dict[str, Callable[[], object]] = {
        "loftq": loftq,
        "fit": lambda: [fit_low_rank(w[n] - q[n], of[n], 16) for n in layers],
        "call": lambda: fit_quantization_error(ours.pop(), statistics, model, config, progress=False),
    }
    taken: dict[str, list[float]] = {step: [] for step in steps}
    for _ in range(rounds):
        for step, run in steps.items():
            tick = time.process_time()
            run()
            taken[step].append(time.process_time() - tick)
    found = {"model": name, "layers": len(layers), "batches": len(fitted), "rounds": rounds}
    return {**found, **{step: statistics_of(seconds) for step, seconds in taken.items()}}


def statistics_of(seconds: list[float]) -> list[float]:
    """The median, the least and the most."""
    return [round(value, 4) for value in (median(seconds), min(seconds), max(seconds))]


class Measured:
    """Errors against a float model on batches that were held back."""

    def __init__(self, model: nn.Module, batches: list[Any], layers: list[str]) -> None:
        self._model, self._batches, self._layers = model, batches, layers
        self._inputs = [inputs(model, layers, batch) for batch in batches]
        self._hidden = [self._run(model, batch) for batch in batches]
        self._probe = copy.deepcopy(model)

    def of(self, weights: Weights) -> dict[str, float]:
        errors = []
        for n in self._layers:
            w = self._model.get_submodule(n).weight
            wrong, right = (sum(float((x[n] @ m.T).square().sum()) for x in self._inputs) for m in (w - weights[n], w))
            errors.append(wrong / right)
            self._probe.get_submodule(n).weight.data.copy_(weights[n])
        squares, losses = [0.0, 0.0], []
        for batch, (true, _) in zip(self._batches, self._hidden, strict=True):
            hidden, loss = self._run(self._probe, batch)
            squares[0] += float((hidden - true).square().sum())
            squares[1] += float(true.square().sum())
            losses.append(loss)
        found = {"outputs": sum(errors) / len(errors), "hidden": (squares[0] / squares[1]) ** 0.5}
        return found if math.isnan(losses[0]) else {**found, "perplexity": math.exp(sum(losses) / len(losses))}

    def float_perplexity(self) -> float:
        return math.exp(sum(loss for _, loss in self._hidden) / len(self._hidden))

    @staticmethod
    def _run(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, float]:
        out = model(**batch, output_hidden_states=True)
        keep = batch["attention_mask"].bool()
        logits = getattr(out, "logits", None)
        loss = math.nan
        if logits is not None:
            loss = float(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten()))
        return out.hidden_states[-1][keep], loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["minilm", "smollm2"], choices=["minilm", "smollm2"])
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2])
    parser.add_argument("--groups", nargs="+", type=int, default=[32, 128])
    parser.add_argument("--ranks", nargs="+", type=int, default=[4, 16, 64])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--parts", type=int, help='of the model in "repair, in parts"')
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)  # not converged in so few batches
    torch.set_grad_enabled(False)
    output = arguments.output or (COST if arguments.cost else OUTPUT)
    if arguments.cost:
        torch.set_num_threads(1)
        found = {"versions": versions(), "models": [cost(name, arguments.rounds) for name in arguments.models]}
        print(json.dumps(found, indent=1))
        output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return
    before = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {"cells": [], "float": {}}
    cells: dict[tuple[Any, ...], dict[str, Any]] = {tuple(cell[k] for k in KEY): cell for cell in before["cells"]}
    perplexities = before["float"]
    for name in arguments.models:
        model, batches, layers = load(name)
        fitted, held = batches[HELD:], batches[:HELD]
        measured = Measured(model, held, layers)
        perplexities[name] = measured.float_perplexity()
        for bits in arguments.bits:
            for group in arguments.groups:
                base = quantised(model, layers, bits, group)
                for rank in arguments.ranks:
                    made = starts(
                        model,
                        base,
                        fitted,
                        layers,
                        bits,
                        group,
                        rank,
                        arguments.parts or PARTS[name],
                        arguments.methods,
                    )
                    for method, weights in made:
                        key = (name, bits, group, rank, method)
                        cells[key] = {**dict(zip(KEY, key, strict=True)), **measured.of(weights)}
                        print(json.dumps(cells[key]), flush=True)
                    known = {name: value for name, value in perplexities.items() if not math.isnan(value)}
                    written = {"versions": versions(), "float": known, "cells": in_order(cells.values())}
                    output.parent.mkdir(parents=True, exist_ok=True)
                    output.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


def in_order(cells: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(cells, key=lambda c: (c["model"], -c["bits"], c["group"], c["rank"], METHODS.index(c["method"])))


if __name__ == "__main__":
    main()
