"""Accuracy of the subspace statistic against its width and refresh schedule: the table in its README.

    python benchmarks/accuracy.py

Inputs of every third block of SmolLM2-135M, 12 batches of 4 × 256 tokens of real text, against the exact float64
covariance of the same rows and PEFT's IncrementalPCA. Holds the activations in memory (1.7 GB).
"""

import torch
from peft.utils.incremental_pca import IncrementalPCA
from torch import Tensor

from eva_kernels import SubspaceStatistic, refresh_
from eva_lora.cli.demo import load_smollm2, packed_text
from peers import variance_missed

R, K, BATCHES = 16, 32, 12
SCHEDULES = {
    "every one": set(range(1, BATCHES + 1)),
    "1, 2, 4, 8, 12": {1, 2, 4, 8, 12},
    "4, 8, 12": {4, 8, 12},
}


def record() -> dict[str, list[Tensor]]:
    """The inputs' rows per batch."""
    model, tokenizer = load_smollm2()
    rows: dict[str, list[Tensor]] = {}
    for i, block in list(enumerate(model.model.layers))[::3]:
        for layer in (block.self_attn.q_proj, block.self_attn.o_proj, block.mlp.gate_proj, block.mlp.down_proj):
            kept = rows.setdefault(f"{i}.{len(rows)}", [])
            layer.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0].flatten(0, -2).clone()))
    with torch.no_grad():
        for batch in packed_text(tokenizer, sequences=4, tokens=256)[:BATCHES]:
            model(input_ids=batch["input_ids"], use_cache=False)
    return rows


def losses(components: Tensor, scatter: Tensor, values: Tensor) -> tuple[float, float]:
    """Variance missed at r = 16 and over the top 32; components are (≥ 32, d) rows."""
    v = components[:K].double()
    captured = ((v @ scatter) * v).sum(1)
    return variance_missed(captured, values, R), variance_missed(captured, values, K)


def main() -> None:
    rows = record()
    exact = {}
    for name, batches in rows.items():
        x = torch.cat(batches).double()
        x -= x.mean(0)
        scatter = x.T @ x
        exact[name] = (scatter, torch.linalg.eigvalsh(scatter).flip(0))
    peft = {}
    for name, batches in rows.items():
        pca = IncrementalPCA(n_components=K, lowrank=True, lowrank_seed=42)
        for batch in batches:
            pca.partial_fit(batch)
        peft[name] = losses(pca.components_, *exact[name])
    print(f"{len(rows)} inputs, {BATCHES} batches; mean loss at r = {R} and over the top {K}; worse than PEFT")
    means = torch.tensor(list(peft.values())).mean(0)
    print(f"{'PEFT, every one':20} q =  64   {means[0]:.1e}   {means[1]:.1e}")
    for schedule, refreshes in SCHEDULES.items():
        for q in (64, 80, 96, 128):
            found = {}
            for seed, (name, batches) in enumerate(rows.items()):
                statistic = SubspaceStatistic(batches[0].shape[1], q, seed=seed)
                for number, batch in enumerate(batches, 1):
                    statistic.accumulate_(batch)
                    if number in refreshes:
                        refresh_([statistic])
                statistic.finish_()
                found[name] = losses(statistic.basis.T, *exact[name])
            means = torch.tensor(list(found.values())).mean(0)
            worse = sum(found[name][0] > peft[name][0] + 1e-4 for name in rows)
            print(f"{schedule:20} q = {q:3}   {means[0]:.1e}   {means[1]:.1e}   {worse} of {len(rows)}", flush=True)


if __name__ == "__main__":
    main()
