"""Orthonormalisation: the bases of all inputs of one width together, beside Householder QR."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from eva_kernels import orthonormalize
from harness.paired import Candidate, Case
from shapes import MODELS

COLUMNS = 80
AT_ONCE = 4  # matrices: what a CPU's cache holds of narrow ones


def errors_of(q: Tensor, y: Tensor) -> Mapping[str, float]:
    """Largest entry of QᵀQ − 1, and what of Y is outside the span of Q, relative."""
    q, y = q.double(), y.double()
    y = y / y.norm(dim=-2, keepdim=True)
    outside = y - q @ (q.mT @ y)
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    return {"orthonormality": float((q.mT @ q - eye).abs().max()), "span": float(outside.norm() / y.norm())}


@pytest.mark.parametrize(
    ("model", "name"),
    [("SmolLM2-135M", "attention"), ("SmolLM2-135M", "down"), ("Llama-3-8B", "attention"), ("Llama-3-8B", "down")],
)
def bench_orthonormal(compare: Callable[..., Any], device: str, quick: bool, model: str, name: str) -> None:
    d = MODELS[model].input(name).width
    if quick and d > 1536:
        pytest.skip("--quick")
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(AT_ONCE, d, COLUMNS, generator=generator)
    y = (y @ torch.randn(COLUMNS, COLUMNS, generator=generator) * 10 ** torch.linspace(0, -3, COLUMNS)).to(device)
    compare(
        Case(
            "Orthonormalisation",
            f"{model} {name}, {AT_ONCE} x {d} x {COLUMNS}",
            Candidate(lambda: orthonormalize(y), lambda: errors_of(orthonormalize(y), y)),
            {"torch.linalg.qr": Candidate(lambda: torch.linalg.qr(y), lambda: errors_of(torch.linalg.qr(y).Q, y))},
            flops=4 * AT_ONCE * d * COLUMNS**2,  # Gram and product, once
            nbytes=4 * 3 * y.numel(),
            facts={"model": model, "width": d, "columns": COLUMNS, "matrices": AT_ONCE},
        ),
        device,
    )
