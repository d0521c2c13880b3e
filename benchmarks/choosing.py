"""What rho, tau, the criterion and the statistic change: the tables of docs/choosing.md.

    python benchmarks/choosing.py [--output docs/measured/choosing.json]

The model, text and LoRA of ``until_converged.py``: all-MiniLM-L6-v2 in float32, 120 batches of 4 × 128 tokens,
shuffled, r = 16 on all linear layers of the encoder. Every run is held against exact statistics of all 120 batches:
what of the variance its A captures (over the most that any A of its ranks could, and over all there is), and how far
its ranks are from those that exact statistics give. ``overhead`` is the time beside the forwards over that of the
forwards, both of one run.
"""

import argparse
import json
import os
import statistics
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from eva_lora import EvaConfig, EvaStatistics, apply, collect, plan
from eva_lora.planning import versions
from until_converged import RANK, Batches, captured, exact_scatters, load, lora_layers, with_lora

RHOS = (1.0, 1.25, 1.5, 2.0, 3.0)
TAUS = (0.9, 0.95, 0.99, 0.995)
CRITERIA = ("subspace", "component", "captured")
STATISTICS: tuple[dict[str, Any], ...] = (
    {"statistic": "gram"},
    {"statistic": "auto"},
    *({"statistic": "subspace", "oversampling": c} for c in (2.0, 3.0, 4.0)),
)
OVERSAMPLING = 3.0  # of every criterion, so that they are compared at one width
MAX_BATCHES = 240  # two passes over the data: what has not converged by then is said to have not
OUTPUT = Path(__file__).parents[1] / "docs" / "measured" / "choosing.json"


def runs() -> Iterator[tuple[str, dict[str, Any]]]:
    """(table, options that differ from the defaults) of every run."""
    for criterion in CRITERIA:
        for tau in TAUS:
            yield "tau", {"convergence": criterion, "tau": tau}
    for criterion in CRITERIA[:2]:
        for rho in RHOS:
            yield "rho", {"convergence": criterion, "rho": rho}
    for options in STATISTICS:
        yield "statistic", options


def exact_ranks(base: Any, batches: Batches) -> dict[float, dict[str, int]]:
    """For every rho, the ranks that exact statistics of all batches give."""
    options: dict[str, Any] = {"statistic": "gram", "tau": 1.0, "max_batches": len(batches)}
    collected = collect(with_lora(base), batches, EvaConfig(rho=max(RHOS), **options), progress=False)
    return {rho: plan(collected, EvaConfig(rho=rho, **options)).ranks for rho in RHOS}


def measure(base: Any, exact: Any, batches: Batches, ranks: dict[str, int], config: EvaConfig) -> dict[str, Any]:
    model = with_lora(base)
    collected = collect(model, batches, config, progress=False)
    found = plan(collected)
    apply(model, found)
    shares = captured(model, exact)
    moved = sum(abs(rank - RANK) for rank in found.ranks.values()) // 2
    return {
        "batches": collected.num_batches,
        "converged": all(site.converged for site in collected.sites),
        "captured_mean": statistics.mean(shares),
        "captured_worst": min(shares),
        "explained": explained(model, exact),
        "ranks_moved": moved / found.budget,
        "ranks_off": sum(abs(rank - ranks[name]) for name, rank in found.ranks.items()) / 2 / found.budget,
        "largest_rank": max(found.ranks.values()),
        "smallest_rank": min(found.ranks.values()),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "overhead": overhead(collected),
        "statistic_bytes": sum(entry.nbytes for entry in collected.inputs),
        "kinds": sorted({entry.kind for entry in collected.inputs}),
    }


def explained(model: Any, exact: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Mean over all layers of the share of their input's whole variance that lies in A's rows; 0 without an adapter."""
    shares = dict.fromkeys(exact, 0.0)
    for name, layer in lora_layers(model).items():
        if "default" in layer.lora_A:
            q = torch.linalg.qr(layer.lora_A["default"].weight.detach().double().T).Q
            scatter, _ = exact[name]
            shares[name] = float(torch.trace(q.T @ scatter @ q) / torch.trace(scatter))
    return statistics.mean(shares.values())


def overhead(collected: EvaStatistics) -> float:
    """Time for statistics and refreshes, over that of the forwards without them."""
    seconds = collected.seconds
    return (seconds["statistics"] + seconds["refresh"]) / (seconds["forward"] - seconds["statistics"])


def provenance() -> dict[str, Any]:
    """Where and with what the numbers come from."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    device = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {
        "device": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "commit": commit or "unknown",
        "versions": versions(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    output = parser.parse_args().output
    warnings.simplefilter("ignore")
    base, batches = load()
    exact = exact_scatters(with_lora(base), batches)
    of_rho = exact_ranks(base, batches)
    known: dict[EvaConfig, dict[str, Any]] = {}
    tables: dict[str, list[dict[str, Any]]] = {}
    for table, options in runs():
        config = EvaConfig(**{"max_batches": MAX_BATCHES, "oversampling": OVERSAMPLING, **options})
        if config not in known:
            known[config] = measure(base, exact, batches, of_rho[config.settled_rho], config)
        row = {"options": options, **known[config]}
        tables.setdefault(table, []).append(row)
        print(table, json.dumps(row), flush=True)
    made = {
        "command": "python benchmarks/choosing.py",
        "model": "all-MiniLM-L6-v2, float32",
        "data": f"{len(batches)} batches of 4 x 128 tokens of pydoc_data.topics, shuffled",
        "lora": f"r = {RANK} on {len(exact)} linear layers",
        "max_batches": MAX_BATCHES,
        **provenance(),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"made": made, **tables}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
