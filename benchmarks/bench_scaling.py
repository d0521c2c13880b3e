"""Scaling: what a batch costs as rows, width and layers grow. Processes: `distributed.py`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from end_to_end import load_smollm2, packed_text
from eva_kernels import GramStatistic, Statistic, SubspaceStatistic
from harness.paired import Candidate, Case
from rows import Rows, forward_of, power_law
from scaling import cut_model, pass_over
from shapes import Input

COLUMNS = 80
KINDS: dict[str, type[Statistic]] = {"gram": GramStatistic, "subspace": SubspaceStatistic}


def accumulated(kind: str, rows: int, width: int, dtype: torch.dtype, device: str, axis: str) -> Case:
    x = power_law(rows, width).to(device, dtype)
    statistic = KINDS[kind](width, COLUMNS, device=device)
    statistic.accumulate_(x)
    batch = Rows(x, x.float().mean(0), Input("", width, (width,)))
    return Case(
        "Scaling",
        f"{kind}, {rows} x {width}, {batch.dtype}",
        Candidate(lambda: statistic.accumulate_(x)),
        forward=forward_of(batch),
        forward_share=batch.forward_share,
        dtype=dtype,
        facts={"curve": kind, "axis": axis, "x": rows if axis == "rows" else width},
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [256, 512, 1024, 2048, 4096, 8192])
def bench_rows(compare: Callable[..., Any], device: str, quick: bool, rows: int, kind: str) -> None:
    if quick and rows > 512:
        pytest.skip("--quick")
    compare(accumulated(kind, rows, 576, torch.bfloat16, device, "rows"), device)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [384, 768, 1536, 3072, 6144, 12_288])
def bench_width(compare: Callable[..., Any], device: str, quick: bool, width: int, kind: str) -> None:
    if quick and width > 768:
        pytest.skip("--quick")
    if kind == "gram" and width > 3072 and device == "cpu":
        pytest.skip(f"{width} columns: the exact statistic is not for a CPU")
    compare(accumulated(kind, 512, width, torch.bfloat16, device, "width"), device)


@pytest.mark.parametrize("blocks", [6, 12, 24])
def bench_layers(compare: Callable[..., Any], quick: bool, blocks: int) -> None:
    """SmolLM2-135M cut to so many blocks; a pass over a few batches beside their whole forwards."""
    if quick and blocks > 6:
        pytest.skip("--quick")
    batches = packed_text(load_smollm2()[1], sequences=4, tokens=32 if quick else 256)[: 2 if quick else 8]
    model = cut_model(blocks)

    def forward() -> None:
        with torch.no_grad(), model.disable_adapter():
            for batch in batches[:2]:
                model(input_ids=batch["input_ids"], use_cache=False)

    compare(
        Case(
            "Scaling",
            f"pass over {len(batches)} batches, {blocks} blocks of SmolLM2-135M, bfloat16",
            Candidate(lambda: pass_over(model, batches), long=True),
            forward=Candidate(forward),
            forward_share=2 / len(batches),
            dtype=torch.bfloat16,
            facts={"curve": "pass", "axis": "layers", "x": 7 * blocks},
        )
    )
