"""Subspace product: Y += (X − s)ᵀ ((X − s) Q) of one batch of rows, beside PyTorch's own two products."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from eva_kernels import subspace_accumulate_
from harness.paired import Candidate, Case
from rows import CASES, Rows, forward_of, rows_of

COLUMNS = 80  # of the basis, for r = 16 and rho 2 with the default oversampling


def error_of(product: Tensor, rows: Rows, basis: Tensor) -> Mapping[str, float]:
    """‖Y − exact‖_F / ‖exact‖_F, for the basis as it was given."""
    z = rows.centred.double()
    exact = z.T @ (z @ basis.double())
    return {"product": float(torch.linalg.norm(product.double() - exact) / torch.linalg.norm(exact))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("model", "name"), CASES)
def bench_subspace(
    compare: Callable[..., Any], device: str, quick: bool, model: str, name: str, dtype: torch.dtype
) -> None:
    rows = rows_of(model, name, dtype, device, quick=quick)
    n, d = rows.x.shape
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(d, COLUMNS, generator=generator)).Q.bfloat16().float().to(device)
    product = torch.zeros_like(basis)
    column_sum = torch.zeros(d, dtype=torch.float64, device=device)
    square_sum = torch.zeros((), dtype=torch.float64, device=device)

    def ours(into: Tensor = product) -> Tensor:
        subspace_accumulate_(into, column_sum, square_sum, rows.x, basis, rows.shift)
        return into

    def plain() -> Tensor:
        z = rows.x - rows.shift.to(dtype)
        return z.mT @ (z @ basis.to(dtype))

    compare(
        Case(
            "Subspace product",
            f"{model} {name}, {n} x {d}, {rows.dtype}",
            Candidate(ours, lambda: error_of(ours(torch.zeros_like(basis)), rows, basis)),
            {"two products": Candidate(plain, lambda: error_of(plain(), rows, basis))},
            forward_of(rows),
            forward_share=rows.forward_share,
            flops=4 * n * d * COLUMNS,
            nbytes=rows.nbytes + 12 * d * COLUMNS,
            dtype=dtype,
            facts={"model": model, "rows": n, "width": d, "columns": COLUMNS},
        ),
        device,
    )
