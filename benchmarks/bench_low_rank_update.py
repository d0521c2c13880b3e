"""A matrix of low rank added to a weight in place, with what is rounded off, beside plain PyTorch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from eva_kernels.low_rank_update import add_low_rank_
from harness.paired import Candidate, Case

SHAPES = ((576, 576), (1536, 576), (4096, 4096))
RANK = 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def bench_low_rank_update(
    compare: Callable[..., Any], device: str, quick: bool, m: int, n: int, dtype: torch.dtype
) -> None:
    if quick and m > 1536:
        pytest.skip("a large one is not quick")
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(m, n, generator=generator).to(device, dtype)
    left, right = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(device) * 1e-3
        for shape in ((m, RANK), (RANK, n))
    )

    def ours() -> float:
        return add_low_rank_(matrix, left, right)

    def plain() -> float:
        return add_low_rank_(matrix, left, right, impl="reference")

    compare(
        Case(
            "Low-rank update",
            f"{m} x {n}, r = {RANK}, {str(dtype).removeprefix('torch.')}",
            Candidate(ours),
            {"plain PyTorch": Candidate(plain)},
            flops=2 * m * n * RANK,
            nbytes=2 * m * n * dtype.itemsize,
            dtype=dtype,
            facts={"rows": m, "width": n, "rank": RANK},
        ),
        device,
    )
