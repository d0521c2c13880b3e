"""What fine-tuning keeps of a start on a quantised base: steps to the loss that LoRA reaches on the float base.

    python benchmarks/quantized_tuning.py [--methods repair qlora ...] [--rates 1e-3 3e-3] [--seeds 0 1 2 3 4]
                                          [--steps 40] [--tokens 256]

SmolLM2-135M, each weight of its layers replaced by what bitsandbytes' nf4 (blocks of 64) makes of it, in float32; LoRA
of rank 16 on all linear layers, alpha 32. Trained with AdamW on text of the Python documentation, ``--tokens`` a step,
each seed in an order of its own; the loss is that on text which no step and no fit has seen, every ``--every`` steps.
Methods: "float" (default LoRA on the float base), "qlora" (default LoRA on the quantised one), "loftq", "eva", "repair"
and "eva+repair" (half of the rank).

Runs are kept one by one in the output file, and those in it are not run again: what was stopped goes on. ``--short``
tries it all on a model of random weights, in seconds. ``--summary`` only prints the table.
"""

import argparse
import copy
import json
import warnings
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from eva_lora import EvaConfig, eva_initialize, fit_quantization_error
from eva_lora.cli.demo import load_smollm2, packed_text
from eva_lora.planning import versions

OUTPUT = Path(__file__).parents[1] / "docs" / "measured" / "quantized_tuning.json"
METHODS = ("float", "qlora", "loftq", "eva", "repair", "eva+repair")
FITTED, HELD = 8, 2  # batches
RANK = 16
Batches = list[dict[str, Tensor]]


def load(short: bool) -> tuple[nn.Module, Batches, Batches, Batches]:
    """A float model, and batches for the fit, for training and held back."""
    if short:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
        )
        rows = torch.randint(0, 97, (FITTED + HELD + 8, 2, 16))
        batches = [{"input_ids": ids, "labels": ids} for ids in rows]
        return LlamaForCausalLM(config), batches[:FITTED], batches[FITTED + HELD :], batches[FITTED : FITTED + HELD]
    model, tokenizer = load_smollm2(echo=lambda message: None)
    batches = [
        {"input_ids": b["input_ids"], "labels": b["labels"]} for b in packed_text(tokenizer, sequences=2, tokens=128)
    ]
    places = [i * len(batches) // (FITTED + HELD) for i in range(FITTED + HELD)]
    used = [batches[i] for i in places]
    trained = [batch for i, batch in enumerate(batches) if i not in places]
    return model, used[HELD:], trained, used[:HELD]


def quantised(model: nn.Module) -> nn.Module:
    """A copy that computes with what nf4 makes of the weights of its layers, but for the head."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    base = copy.deepcopy(model)
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            packed, state = quantize_4bit(module.weight.data, blocksize=64, quant_type="nf4")
            module.weight.data.copy_(dequantize_4bit(packed, state))
    return base


def started(method: str, model: nn.Module, base: nn.Module, fitted: Batches, seed: int) -> Any:
    torch.manual_seed(seed)
    inside = copy.deepcopy(model if method == "float" else base)
    lora = get_peft_model(inside, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
    config = EvaConfig(rho=1.0, max_batches=len(fitted), oversampling=5.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # not converged in so few batches
        if method == "eva":
            eva_initialize(lora, fitted, config, progress=False)
        elif method not in ("float", "qlora"):
            fit_quantization_error(
                lora, None if method == "loftq" else fitted, model, config, method=method, hold_back=0, progress=False
            )  # type: ignore[arg-type]
    return lora


@torch.no_grad()
def held_loss(model: nn.Module, held: Batches) -> float:
    model.eval()
    return mean(float(model(**batch).loss) for batch in held)


def run(
    lora: Any, trained: Batches, held: Batches, *, rate: float, seed: int, steps: int, every: int, tokens: int
) -> list[float]:
    """The held loss before the first step, and after every so many."""
    order = torch.randperm(len(trained), generator=torch.Generator().manual_seed(seed)).tolist()
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    losses = [held_loss(lora, held)]
    for step in range(steps):
        batch = {n: x.reshape(1, -1)[:, :tokens] for n, x in trained[order[step % len(order)]].items()}
        lora.train()
        lora(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % every == 0:
            losses.append(held_loss(lora, held))
    return losses


def summary(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Each method at its best rate, by the loss at the end: means over the seeds that all methods and rates have."""
    runs: dict[tuple[str, float], dict[int, list[float]]] = {}
    for one in found["runs"]:
        runs.setdefault((one["method"], one["rate"]), {})[one["seed"]] = one["losses"]
    seeds = sorted(set.intersection(*map(set, runs.values()))) if runs else []
    if not seeds:
        return []
    curves = {key: [mean(at) for at in zip(*(by[s] for s in seeds), strict=True)] for key, by in runs.items()}
    rows = []
    for method in METHODS:
        mine = {rate: curve for (name, rate), curve in curves.items() if name == method}
        if mine:
            rate = min(mine, key=lambda rate: mine[rate][-1])
            rows.append({"method": method, "seeds": seeds, "rates": sorted(mine), "rate": rate, "losses": mine[rate]})
    goal = next((row["losses"][-1] for row in rows if row["method"] == "float"), -1.0)
    for row in rows:
        reached = [i * found["every"] for i, loss in enumerate(row["losses"]) if loss <= goal]
        row["steps_to_float"] = reached[0] if reached else None
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    how = {name: getattr(arguments, name) for name in ("steps", "every", "tokens")}
    found: dict[str, Any] = {"versions": versions(), **how, "runs": []}
    if arguments.output.is_file():
        found = json.loads(arguments.output.read_text(encoding="utf-8"))
        if any(found[name] != value for name, value in how.items()) and not arguments.summary:
            raise SystemExit(f"{arguments.output} holds runs of other steps or tokens; give another --output")
    done = {(one["method"], one["rate"], one["seed"]) for one in found["runs"]}
    wanted = [
        (seed, rate, method) for seed in arguments.seeds for rate in arguments.rates for method in arguments.methods
    ]
    if not arguments.summary:
        model, fitted, trained, held = load(arguments.short)
        base = quantised(model)
        for seed, rate, method in wanted:
            if (method, rate, seed) in done:
                continue
            lora = started(method, model, base, fitted, seed)
            losses = run(lora, trained, held, rate=rate, seed=seed, **how)
            found["runs"].append({"method": method, "rate": rate, "seed": seed, "losses": losses})
            print(json.dumps(found["runs"][-1]), flush=True)
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for row in summary(found):
        print(f"{row['method']:<11} rate {row['rate']:g} of {row['rates']}, {len(row['seeds'])} seeds, to float: "
              f"{row['steps_to_float']}; " + " ".join(f"{loss:.3f}" for loss in row["losses"]))  # fmt: skip


if __name__ == "__main__":
    main()
