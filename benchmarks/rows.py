"""Rows to measure with: of a real model's width, with the means and the decaying spectrum that activations have."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from harness.paired import Candidate
from shapes import MODELS, QUICK_CASES, ROW_CASES, Input

CASES = ROW_CASES
ROWS = {"cpu": 1024, "cuda": 2048}
QUICK_ROWS = 128
FORWARD_OUTPUTS = 1024  # of a wider layer this many outputs are computed, and the rest is taken to cost alike


@dataclass(frozen=True)
class Rows:
    """A batch of rows and the shift that statistics of them are taken about.

    Attributes:
        x: (n, d) float32 or bfloat16.
        shift: (d,) float32, their mean.
        source: The model's input that they stand for.
    """

    x: Tensor
    shift: Tensor
    source: Input

    @property
    def dtype(self) -> str:
        return str(self.x.dtype).removeprefix("torch.")

    @property
    def centred(self) -> Tensor:  # (n, d) float32
        return self.x.float() - self.shift

    @property
    def nbytes(self) -> int:
        return self.x.numel() * self.x.element_size()

    @property
    def forward_share(self) -> float:
        """Which part of the outputs of the layers that these rows feed ``forward_of`` computes."""
        outputs = sum(self.source.outputs)
        return min(outputs, FORWARD_OUTPUTS) / outputs


def power_law(n: int, d: int, *, seed: int = 0) -> Tensor:  # (n, d) float32
    """Rows whose i-th eigenvalue is 1/i, off the axes, about a mean ten times as long as their largest deviation.

    Batches of one stream differ by ``seed`` alone: mean and directions depend on d only.
    """
    fixed = torch.Generator().manual_seed(d)
    mean, *mirrors = torch.randn(4, d, generator=fixed)
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(1 + seed))
    x *= torch.arange(1, d + 1).float().rsqrt()
    for mirror in mirrors:  # Householder reflections: a rotation for the price of two thin products
        mirror = mirror / mirror.norm()
        x.addr_(x @ mirror, mirror, alpha=-2)
    return x + 10 * mean / d**0.5


def rows_of(model: str, name: str, dtype: torch.dtype, device: str, *, quick: bool) -> Rows:
    """A batch for the named input of a named model; skips the wide ones of a quick run."""
    if quick and (model, name) not in QUICK_CASES:
        pytest.skip("--quick")
    source = MODELS[model].input(name)
    x = power_law(QUICK_ROWS if quick else ROWS[device], source.width)
    return Rows(x.to(device, dtype), x.mean(0).to(device), source)


def forward_of(rows: Rows) -> Candidate:
    """The forward of the linear layers that these rows feed, in their dtype: X Wᵀ."""
    outputs = min(sum(rows.source.outputs), FORWARD_OUTPUTS)
    weight = torch.randn(outputs, rows.x.shape[1], device=rows.x.device).to(rows.x.dtype)
    return Candidate(lambda: torch.nn.functional.linear(rows.x, weight))
