"""Gram: G += (X − s)ᵀ (X − s) of one batch of rows, beside the full product and BLAS' symmetric one."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from eva_kernels import gram_accumulate_
from harness.paired import Candidate, Case
from rows import CASES, Rows, forward_of, rows_of

CPU_WIDEST = 4096  # beyond it "auto" keeps a subspace; one product takes seconds on a CPU


def error_of(gram: Tensor, rows: Rows) -> Mapping[str, float]:
    """‖G − exact‖_F / ‖exact‖_F."""
    exact = rows.centred.double().T @ rows.centred.double()
    return {"gram": float(torch.linalg.norm(gram.double() - exact) / torch.linalg.norm(exact))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("model", "name"), CASES)
def bench_gram(
    compare: Callable[..., Any], device: str, quick: bool, model: str, name: str, dtype: torch.dtype
) -> None:
    rows = rows_of(model, name, dtype, device, quick=quick)
    n, d = rows.x.shape
    if device == "cpu" and d > CPU_WIDEST:
        pytest.skip(f"{d} columns: the exact statistic is not for a CPU")
    gram = torch.zeros(d, d, device=device)
    column_sum = torch.zeros(d, dtype=torch.float64, device=device)
    square_sum = torch.zeros((), dtype=torch.float64, device=device)

    def ours(into: Tensor = gram) -> Tensor:
        gram_accumulate_(into, column_sum, square_sum, rows.x, rows.shift)
        return into

    def full() -> Tensor:
        z = rows.x - rows.shift.to(dtype)
        return z.mT @ z

    compare(
        Case(
            "Gram",
            f"{model} {name}, {n} x {d}, {rows.dtype}",
            Candidate(ours, lambda: error_of(ours(torch.zeros_like(gram)), rows)),
            {"full product": Candidate(full, lambda: error_of(full(), rows))},
            forward_of(rows),
            forward_share=rows.forward_share,
            flops=n * d * (d + 1),
            nbytes=rows.nbytes + 8 * d * (d + 1) / 2,
            dtype=dtype,
            facts={"model": model, "rows": n, "width": d},
        ),
        device,
    )
