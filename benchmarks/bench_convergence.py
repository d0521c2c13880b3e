"""Convergence step: convergence, ranks, done and reopened over all sites at once.

Beside the compiled tracker stand its NumPy twin and the loop over layers that PEFT runs after each batch, written
anew here from its description: thresholds per layer, then a list of every ratio as a tensor of its own, one sort
and a counter. The error is the share of ranks placed otherwise than the twin does: ties only.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from eva_kernels.convergence import ConvergenceTracker
from harness.paired import Candidate, Case
from shapes import MODELS

TAU = 0.99
CLASSIC = (300, 256)  # sites x candidates of the figures in eva_kernels/convergence/README.md


class Refreshes:
    """Numbers of one refresh of ``sites`` sites with ``columns`` candidates each, budget half of them."""

    def __init__(self, sites: int, columns: int) -> None:
        rng = np.random.default_rng(0)
        self.sites, self.columns, self.budget = sites, columns, sites * columns // 2
        decay = rng.uniform(0.5, 1.5, (sites, 1))
        spectra = np.arange(1, columns + 1) ** -decay * rng.uniform(0.9, 1.1, (sites, columns))
        ratios = -np.sort(-spectra / spectra.sum(axis=1, keepdims=True), axis=1)
        self.ratios: NDArray[np.float64] = ratios.astype(np.float32).astype(np.float64)  # the loop's precision
        self.cosines = 1 - rng.exponential(0.002, (sites, columns))
        self.overlaps = np.cumsum(self.cosines, axis=1)

    def tracker(self, impl: str, **options: Any) -> Callable[[], NDArray[np.int64]]:
        candidates = np.full(self.sites, self.columns)
        tracker = ConvergenceTracker(candidates, budget=self.budget, tau=TAU, impl=impl, **options)
        gains = 1 - self.cosines
        return lambda: tracker.update(self.cosines, self.ratios, self.overlaps, gains).ranks


class LayerLoop:
    """What PEFT does per batch with the cosines and ratios of its layers."""

    def __init__(self, refreshes: Refreshes) -> None:
        names = [f"layers.{i}.linear" for i in range(refreshes.sites)]
        self.ratios: dict[str, Tensor] = dict(zip(names, torch.from_numpy(refreshes.ratios).float(), strict=True))
        self.cosines: dict[str, Tensor] = dict(zip(names, torch.from_numpy(refreshes.cosines).float(), strict=True))
        self.budget, self.ranks = refreshes.budget, dict.fromkeys(names, refreshes.columns)

    def step(self) -> dict[str, int]:
        done = {}
        for name, cosines in self.cosines.items():
            done[name] = bool(torch.all((cosines >= TAU)[: self.ranks[name]]))
        owners, values = [], []
        for name, ratios in self.ratios.items():
            for ratio in ratios:
                owners.append(name)
                values.append(ratio)
        order = torch.stack(values).argsort(descending=True)
        counts = Counter(owners[i] for i in order[: self.budget])
        self.ranks = {name: counts.get(name, 0) for name in self.ratios}
        return self.ranks


def placed_otherwise(ranks: NDArray[np.int64], expected: NDArray[np.int64]) -> Mapping[str, float]:
    return {"ranks": float(np.abs(ranks - expected).sum() / 2 / expected.sum())}


def _sizes() -> list[Any]:
    models = [pytest.param(model.layers, 32, id=name) for name, model in MODELS.items()]
    return [*models, pytest.param(*CLASSIC, id="x".join(map(str, CLASSIC)))]


@pytest.mark.parametrize(("sites", "columns"), _sizes())
def bench_convergence(
    compare: Callable[..., Any], request: pytest.FixtureRequest, quick: bool, sites: int, columns: int
) -> None:
    if quick and sites * columns > 10_000:
        pytest.skip("--quick")
    refreshes = Refreshes(sites, columns)
    twin, loop = refreshes.tracker("reference"), LayerLoop(refreshes)
    core, expected = refreshes.tracker("auto"), twin()
    compare(
        Case(
            "Convergence step",
            f"{request.node.callspec.id}, {sites} sites x {columns} candidates",
            Candidate(core, lambda: placed_otherwise(core(), expected)),
            {
                "NumPy twin": Candidate(twin, lambda: placed_otherwise(twin(), expected)),
                "loop over layers": Candidate(
                    loop.step, lambda: placed_otherwise(np.array(list(loop.step().values())), expected)
                ),
            },
            nbytes=16.0 * sites * columns,
            facts={"sites": sites, "columns": columns},
        )
    )


@pytest.mark.parametrize(
    "options", [{"criterion": "subspace"}, {"criterion": "captured"}, {"divisors": [1, 2]}], ids=str
)
def bench_variants(compare: Callable[..., Any], quick: bool, options: dict[str, Any]) -> None:
    """The other criteria, and ranks that divide by 1 and 2 in turn, beside the default."""
    sites, columns = (36, 32) if quick else CLASSIC
    refreshes = Refreshes(sites, columns)
    if "divisors" in options:
        options = {"divisors": np.resize(options["divisors"], sites)}
    label = options.get("criterion", "divisors 1 and 2")
    compare(
        Case(
            "Convergence step",
            f"{label}, {sites} sites x {columns} candidates",
            Candidate(refreshes.tracker("auto", **options)),
            {"NumPy twin": Candidate(refreshes.tracker("reference", **options))},
            facts={"sites": sites, "columns": columns},
        )
    )


@pytest.mark.parametrize("sites", [30, 100, 300, 1000, 3000, 10_000])
def bench_growth(compare: Callable[..., Any], quick: bool, sites: int) -> None:
    if quick and sites > 100:
        pytest.skip("--quick")
    refreshes = Refreshes(sites, CLASSIC[1])
    compare(
        Case(
            "Scaling",
            f"convergence step, {sites} sites x {CLASSIC[1]} candidates",
            Candidate(refreshes.tracker("auto")),
            facts={"curve": "convergence step", "axis": "sites", "x": sites},
        )
    )
