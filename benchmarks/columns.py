"""Accuracy against the number of a basis's columns, for few and many components: what the default width rests on.

    PYTHONPATH=tests OMP_NUM_THREADS=1 python benchmarks/columns.py

Inputs of all-MiniLM-L6-v2 (24 batches of 96 tokens) and of every third block of SmolLM2-135M (24 batches of 256), real
text, against the exact float64 covariance of the same rows and PEFT's IncrementalPCA. A loss is the share of the most
variance that k directions can hold which the k found do not; mean and worst over inputs. Refreshes come as in a pass.
The cost is that of the products: the columns that are multiplied on a CPU, which takes 16 at a time, and on a GPU, and
process time on this CPU for 1024 rows of 1536.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from eva_kernels import subspace_accumulate_
from eva_kernels.subspace.triton import padded_columns
from eva_lora.cli.demo import load_smollm2, packed_text
from eva_lora.config import default_columns
from peers import ours_subspace, peft_pca, variance_missed
from support.models import load_minilm, minilm_text_batches

COMPONENTS = (4, 8, 16, 32, 64)
RULES = {
    "2 k": lambda k: 2 * k,
    "2.5 k": lambda k: round(2.5 * k),
    "k + 16": lambda k: k + 16,
    "k + 32": lambda k: k + 32,
    "default": lambda k: default_columns(k),
    "4 k": lambda k: 4 * k,
}
Rows = dict[str, list[Tensor]]  # input -> (n, d) a batch


def minilm_rows() -> Rows:
    model = load_minilm()
    tokens = torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for batch in minilm_text_batches()])
    names = ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
    layers = {n: m for n, m in model.named_modules() if n.startswith("encoder") and n.endswith(names)}
    return recorded(model, layers, tokens[: 24 * 96].view(24, 1, 96))


def smollm2_rows() -> Rows:
    model, tokenizer = load_smollm2()
    tokens = torch.cat([batch["input_ids"] for batch in packed_text(tokenizer, sequences=1, tokens=256)[:24]])
    names = ("q_proj", "o_proj", "gate_proj", "down_proj")
    layers = {n: m for n, m in model.named_modules() if n.endswith(names) and int(n.split(".")[2]) % 3 == 0}
    return recorded(model, layers, tokens[:, None])


def recorded(model: Any, layers: dict[str, Any], batches: Tensor) -> Rows:
    rows: Rows = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, kept=rows[name]: kept.append(args[0].flatten(0, -2).clone()))
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch)
    return rows


def losses(rows: Rows) -> Iterator[tuple[int, str, int | None, float, float]]:
    """For every k, of PEFT and of every rule: k, whose, columns, mean and worst loss over the inputs."""
    exact = {}
    for name, batches in rows.items():
        x = torch.cat(batches).double()
        x -= x.mean(0)
        exact[name] = x.T @ x
    values = {name: torch.linalg.eigvalsh(scatter).flip(0) for name, scatter in exact.items()}

    def loss(name: str, components: Tensor, k: int) -> float:
        v = components[:k].double()
        return variance_missed(((v @ exact[name]) * v).sum(1), values[name], k)

    for k in COMPONENTS:
        found = [loss(name, peft_pca(batches, k), k) for name, batches in rows.items()]
        yield k, "PEFT", None, statistics.mean(found), max(found)
        for rule, columns in RULES.items():
            found = [loss(name, ours_subspace(batches, k, columns(k)), k) for name, batches in rows.items()]
            yield k, rule, columns(k), statistics.mean(found), max(found)


def product_seconds(columns: Sequence[int]) -> dict[int, float]:
    """Median process time of one product for each number of columns, taken in turn."""
    x, shift = torch.randn(1024, 1536), torch.zeros(1536)
    taken: dict[int, list[float]] = {q: [] for q in columns}
    for _ in range(15):
        for q, seconds in taken.items():
            basis = torch.randn(1536, q)
            state = torch.zeros(1536, q), shift.double(), torch.zeros((), dtype=torch.float64)
            start = time.process_time()
            subspace_accumulate_(*state, x, basis, shift)
            seconds.append(time.process_time() - start)
    return {q: statistics.median(seconds) for q, seconds in taken.items()}


def main() -> None:
    seconds = product_seconds(sorted({rule(k) for rule in RULES.values() for k in COMPONENTS}))
    for model, rows in (("all-MiniLM-L6-v2", minilm_rows()), ("SmolLM2-135M", smollm2_rows())):
        print(f"\n{model}, {len(rows)} inputs\n")
        print("| k | columns | q | mean loss | worst | multiplied on a CPU | on a GPU | ms on this CPU |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for k, rule, q, mean, worst in losses(rows):
            cost = f"{-(-q // 16) * 16} | {padded_columns(q, True)} | {seconds[q] * 1e3:.2f}" if q else "| |"
            print(f"| {k} | {rule} | {q or ''} | {mean:.1e} | {worst:.1e} | {cost} |", flush=True)


if __name__ == "__main__":
    main()
