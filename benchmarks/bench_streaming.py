"""Streams of batches: from rows to components, beside every other way to them, with the variance that each misses.

Rows are inputs of real layers on real text where the model comes as a package, and of a power-law spectrum with the
widths of models that do not.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from end_to_end import load_model, recorded
from harness.paired import Candidate, Case
from peers import OURS, PEERS, Method, centred_rows, leading_eigenvalues, variance_missed
from rows import Rows, forward_of, power_law
from shapes import MODELS

K = 32  # candidates of a layer with r = 16 under rho 2
BATCHES, SYNTHETIC_BATCHES, SYNTHETIC_ROWS = 8, 6, 512
SLOW_WIDTH = 4096  # beyond it, methods that decompose the whole width or all rows take minutes on a CPU
SCALABLE = ("PEFT IncrementalPCA", "torch.svd_lowrank", "torch.pca_lowrank")


@cache
def real_rows(model: str, name: str, count: int) -> list[Tensor]:
    """The inputs' rows, batch by batch, float32, of the layer in the middle of the network."""
    layer = {"attention": "self_attn.q_proj", "down": "mlp.down_proj"}[name]
    return recorded(*load_model(torch.float32, count), f"layers.{MODELS[model].blocks // 2}.{layer}")


def stream(model: str, name: str, quick: bool) -> list[Tensor]:
    if quick:
        return [power_law(64, 384, seed=i) for i in range(3)]
    if model == "SmolLM2-135M":
        return real_rows(model, name, BATCHES)
    width = MODELS[model].input(name).width
    return [power_law(SYNTHETIC_ROWS, width, seed=i) for i in range(SYNTHETIC_BATCHES)]


@pytest.mark.parametrize(
    ("model", "name", "kind", "dtype"),
    [
        ("SmolLM2-135M", "attention", "gram", torch.float32),
        ("SmolLM2-135M", "attention", "subspace", torch.bfloat16),
        ("SmolLM2-135M", "down", "subspace", torch.bfloat16),
        ("Qwen2.5-0.5B", "down", "subspace", torch.bfloat16),
        ("Llama-3-8B", "attention", "subspace", torch.bfloat16),
        ("Llama-3-8B", "down", "subspace", torch.bfloat16),
    ],
)
def bench_streaming(
    compare: Callable[..., Any], device: str, quick: bool, model: str, name: str, kind: str, dtype: torch.dtype
) -> None:
    if quick and (model, name) != ("SmolLM2-135M", "attention"):
        pytest.skip("--quick")
    batches = [batch.to(device, dtype) for batch in stream(model, name, quick)]
    n, d = batches[0].shape
    exact = centred_rows(batches)
    values = leading_eigenvalues(exact, K)

    found: dict[Method, Tensor] = {}

    def candidate(method: Method) -> Candidate:
        def call() -> None:
            found[method] = method(batches, K)

        def errors() -> Mapping[str, float]:
            basis = torch.linalg.qr(found[method][:K].T.to(exact)).Q  # float32 rows are orthonormal to 1e-7 only
            captured = (exact @ basis).square().sum(0)
            return {f"variance missed by {k}": variance_missed(captured, values, k) for k in (K // 2, K)}

        return Candidate(call, errors)

    peers = {
        peer: candidate(method)
        for peer, method in PEERS.items()
        if d < SLOW_WIDTH or peer in SCALABLE or device != "cpu"
    }
    entry = MODELS[model].input(name)
    label = str(dtype).removeprefix("torch.")
    rows = Rows(batches[0], batches[0].float().mean(0), entry)
    one = forward_of(rows)
    compare(
        Case(
            "Streams",
            f"{model} {name}, {kind}, {len(batches)} x {n} x {d}, {label}",
            candidate(OURS[kind]),
            peers,
            one,
            forward_share=rows.forward_share / len(batches),
            nbytes=sum(batch.nbytes for batch in batches),
            dtype=dtype,
            facts={
                "model": model,
                "width": d,
                "kind": kind,
                "rows": "real text" if model == "SmolLM2-135M" and not quick else "power law",
            },
        ),
        device,
    )
