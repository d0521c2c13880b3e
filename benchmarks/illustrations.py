"""The data behind the figures of docs/how-eva-works.md.

    python benchmarks/illustrations.py [--output docs/measured/illustrations.json]

The model, text and LoRA of ``until_converged.py``. Of four inputs of all-MiniLM-L6-v2: their spectra, and what a
streaming basis captures of the variance of all batches after each batch, for the exact Gram matrix, the streaming
subspace as a run keeps it, and PEFT's IncrementalPCA. Of a run with the defaults: the ranks. ``tools/draw_figures.py``
draws them.
"""

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft.utils.incremental_pca import IncrementalPCA
from torch import Tensor

from choosing import provenance
from eva_kernels import GramStatistic, Statistic, SubspaceStatistic, refresh_
from eva_lora import eva_initialize
from eva_lora.config import REFRESH_PERIOD, default_columns
from until_converged import RANK, Batches, load, lora_layers, with_lora

INPUTS = {
    "block 1, attention": "encoder.layer.0.attention.self.query",
    "block 4, attention": "encoder.layer.3.attention.self.query",
    "block 4, after attention": "encoder.layer.3.attention.output.dense",
    "block 6, after the nonlinearity": "encoder.layer.5.output.dense",
}
CANDIDATES = 2 * RANK
SHOWN = 64  # components of each spectrum
STREAMED = 48  # batches
OUTPUT = Path(__file__).parents[1] / "docs" / "measured" / "illustrations.json"


def record(model: Any, batches: Batches) -> dict[str, list[Tensor]]:
    """Rows (tokens, d) of each input, batch by batch."""
    rows: dict[str, list[Tensor]] = {label: [] for label in INPUTS}
    layers = lora_layers(model)
    handles = [
        layers[name].register_forward_pre_hook(lambda _, args, kept=rows[label]: kept.append(args[0].flatten(0, -2)))
        for label, name in INPUTS.items()
    ]
    with torch.no_grad(), model.disable_adapter():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return rows


def scatter_of(rows: list[Tensor]) -> Tensor:
    x = torch.cat(rows).double()
    x -= x.mean(0)
    return x.T @ x


def share(basis: Tensor, scatter: Tensor, best: float) -> float:
    """Variance in the first ``RANK`` columns of ``basis``, over the most there is for that rank."""
    q = torch.linalg.qr(basis[:, :RANK].double()).Q
    return float(torch.trace(q.T @ scatter @ q)) / best


def streamed(rows: list[Tensor], scatter: Tensor) -> dict[str, list[float]]:
    """Method → share captured after each batch; a statistic's is that of its last refresh."""
    width = rows[0].shape[1]
    best = float(torch.linalg.eigvalsh(scatter)[-RANK:].sum())
    columns = min(width, default_columns(CANDIDATES))
    statistics: dict[str, Statistic] = {
        "exact (gram)": GramStatistic(width, columns),
        "streaming subspace": SubspaceStatistic(width, columns),
    }
    peft = IncrementalPCA(n_components=CANDIDATES, lowrank=True, lowrank_seed=42)
    found: dict[str, list[float]] = {**{name: [] for name in statistics}, "PEFT's IncrementalPCA": []}
    for number, batch in enumerate(rows, 1):
        for name, statistic in statistics.items():
            statistic.accumulate_(batch)
            if number % REFRESH_PERIOD["subspace"] == 0 or number in (1, 2):
                refresh_([statistic])
            found[name].append(share(statistic.basis, scatter, best))
        peft.partial_fit(batch)
        found["PEFT's IncrementalPCA"].append(share(peft.components_.T, scatter, best))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    output = parser.parse_args().output
    warnings.simplefilter("ignore")
    base, batches = load()
    model = with_lora(base)
    rows = record(model, batches)
    spectra, widths, curves = {}, {}, []
    for label, pieces in rows.items():
        scatter = scatter_of(pieces)
        values = torch.linalg.eigvalsh(scatter).flip(0)
        spectra[label] = [round(v, 6) for v in (values / values.sum())[:SHOWN].tolist()]
        widths[label] = len(scatter)
        curves.append(streamed(pieces[:STREAMED], scatter))
    means = {
        name: [round(sum(each) / len(curves), 6) for each in zip(*(curve[name] for curve in curves), strict=True)]
        for name in curves[0]
    }
    report = eva_initialize(model, batches, progress=False)
    made = {
        "command": "python benchmarks/illustrations.py",
        "model": "all-MiniLM-L6-v2, float32",
        "data": f"{len(batches)} batches of 4 x 128 tokens of pydoc_data.topics, shuffled",
        "lora": f"r = {RANK} on {len(report.ranks)} linear layers",
        **provenance(),
    }
    found = {"made": made, "rank": RANK, "widths": widths, "spectra": spectra, "captured": means}
    found |= {"ranks": report.ranks, "batches": report.num_batches}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
