"""What LoRA starts repair of a quantised base, before any training: the table of docs/quantised-bases.md.

    python benchmarks/quantization.py [--models minilm smollm2] [--bits 4 3 2] [--groups 32 128] [--ranks 4 16 64]

Weights of all linear layers (of SmolLM2 all but the head) are rounded to nearest, with a step for each group of a row.
Fitted is on text of the Python documentation, measured on other text of it: the mean over layers of the output's
error, E‖(W − Q − s B A) x‖² over E‖W x‖² with x from the float model; the model's hidden states, ‖h − h_float‖ over
‖h_float‖; and SmolLM2's perplexity. Methods: none; LoftQ, one round and five, each of which rounds W − s B A anew;
QERA's approximation (the diagonal of E x xᵀ); and ours, with every layer's own rank ("repair") and with ranks moved
("repair, rho 2").
"""

import argparse
import copy
import json
import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from eva_kernels.low_rank_fit import SecondMoment, fit_low_rank
from eva_lora import EvaConfig, collect, fit_quantization_error
from eva_lora.cli.demo import load_smollm2, packed_text
from eva_lora.planning import versions
from until_converged import load as load_minilm

OUTPUT = Path(__file__).parents[1] / "docs" / "measured" / "quantization.json"
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
    model: nn.Module, base: nn.Module, batches: list[Any], layers: list[str], bits: int, group: int, rank: int
) -> Iterator[tuple[str, Weights, float]]:
    """(method, what each layer computes with, seconds of the fit without the pass)."""
    w = {n: model.get_submodule(n).weight.detach() for n in layers}
    q = {n: base.get_submodule(n).weight.detach() for n in layers}
    yield "none", q, 0.0
    none = {n: SecondMoment(torch.empty(x.shape[1], 0), torch.ones(())) for n, x in w.items()}

    tick = time.perf_counter()
    fitted = {}
    for n in layers:  # as LoftQ and PEFT have it
        u, s, vt = torch.linalg.svd(w[n] - q[n], full_matrices=False)
        fitted[n] = (u[:, :rank] * s[:rank]) @ vt[:rank]
    yield "loftq", {n: q[n] + fitted[n] for n in layers}, time.perf_counter() - tick
    for _ in range(ROUNDS - 1):
        anew = {n: rounded(w[n] - fitted[n], bits, group) for n in layers}
        for n in layers:
            fit = fit_low_rank(w[n] - anew[n], none[n], rank)
            fitted[n] = fit.left @ fit.right
    yield f"loftq, {ROUNDS} rounds", {n: anew[n] + fitted[n] for n in layers}, math.nan

    squares = dict.fromkeys(layers, torch.zeros(()))
    for batch in batches:
        for n, x in inputs(base, layers, batch).items():
            squares[n] = squares[n] + x.square().sum(0)
    diagonal = {n: SecondMoment(none[n].factor, squares[n] / squares[n].mean()) for n in layers}
    changed = {}
    for n in layers:
        fit = fit_low_rank(w[n] - q[n], diagonal[n], rank)
        changed[n] = q[n] + fit.left @ fit.right
    yield "qera, diagonal", changed, math.nan

    for label, rho in (("repair", 1.0), ("repair, rho 2", 2.0)):
        ours = peft_of(base, layers, rank)
        config = EvaConfig(rho=rho, max_batches=len(batches), oversampling=5.0 / rho)
        statistics = collect(ours, batches, config, progress=False)
        tick = time.perf_counter()
        fit_quantization_error(ours, statistics, model, config, progress=False)
        seconds = time.perf_counter() - tick
        made = deltas(ours, layers)
        yield label, {n: q[n] + made[n] if n in made else q[n] for n in layers}, seconds


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
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)  # not converged in so few batches
    torch.set_grad_enabled(False)
    cells: list[dict[str, Any]] = []
    perplexities = {}
    for name in arguments.models:
        model, batches, layers = load(name)
        fitted, held = batches[HELD:], batches[:HELD]
        measured = Measured(model, held, layers)
        perplexities[name] = measured.float_perplexity()
        for bits in arguments.bits:
            for group in arguments.groups:
                base = copy.deepcopy(model)
                for n in layers:
                    weight = base.get_submodule(n).weight
                    weight.data.copy_(rounded(weight.data, bits, group))
                for rank in arguments.ranks:
                    for method, weights, seconds in starts(model, base, fitted, layers, bits, group, rank):
                        cell = {"model": name, "bits": bits, "group": group, "rank": rank, "method": method}
                        cells.append(
                            {**cell, **measured.of(weights), "seconds": None if math.isnan(seconds) else seconds}
                        )
                        print(json.dumps(cells[-1]), flush=True)
                    known = {name: value for name, value in perplexities.items() if not math.isnan(value)}
                    written = {"versions": versions(), "float": known, "cells": cells}
                    arguments.output.parent.mkdir(parents=True, exist_ok=True)
                    arguments.output.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
