"""One step of the bookkeeping over all sites: convergence, ranks, done and reopened.

    python benchmarks/bench_convergence.py

Beside the compiled tracker stand its NumPy twin and the loop over layers that PEFT runs after each batch, written
anew here from its description: thresholds per layer, then a list of every ratio as a tensor of its own, one sort
and a counter. Both get the same numbers and must give the same ranks before anything is timed.
"""

import argparse
import platform
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eva_kernels._build import build_info
from eva_kernels.convergence import ConvergenceTracker

TAU = 0.99


class Refresh:
    """Numbers of one refresh of ``sites`` sites with ``columns`` candidates each, budget half of them."""

    def __init__(self, sites: int, columns: int) -> None:
        rng = np.random.default_rng(0)
        self.sites, self.columns, self.budget = sites, columns, sites * columns // 2
        decay = rng.uniform(0.5, 1.5, (sites, 1))
        spectra = np.arange(1, columns + 1) ** -decay * rng.uniform(0.9, 1.1, (sites, columns))
        self.ratios: NDArray[np.float64] = -np.sort(-spectra / spectra.sum(axis=1, keepdims=True), axis=1)
        self.cosines = 1 - rng.exponential(0.002, (sites, columns))
        self.overlaps = np.cumsum(self.cosines, axis=1)


def percentiles(step: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median and 90th percentile of the time of a step, in milliseconds, after two to warm up."""
    times = []
    for _ in range(repeats + 2):
        start = perf_counter()
        step()
        times.append(1e3 * (perf_counter() - start))
    return float(np.percentile(times[2:], 50)), float(np.percentile(times[2:], 90))


def tracker_step(refresh: Refresh, impl: str, criterion: str = "component", divisors: bool = False) -> Callable:
    tracker = ConvergenceTracker(
        np.full(refresh.sites, refresh.columns),
        budget=refresh.budget,
        tau=TAU,
        criterion=criterion,
        divisors=np.arange(refresh.sites) % 2 + 1 if divisors else None,
        impl=impl,
    )
    gains = 1 - refresh.cosines
    return lambda: tracker.update(refresh.cosines, refresh.ratios, refresh.overlaps, gains)


class LayerLoop:
    """What PEFT does per batch with the cosines and ratios of its layers."""

    def __init__(self, refresh: Refresh) -> None:
        names = [f"layers.{i}.linear" for i in range(refresh.sites)]
        self.ratios: dict[str, Tensor] = dict(zip(names, torch.from_numpy(refresh.ratios).float(), strict=True))
        self.cosines: dict[str, Tensor] = dict(zip(names, torch.from_numpy(refresh.cosines).float(), strict=True))
        self.budget, self.ranks = refresh.budget, dict.fromkeys(names, refresh.columns)

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=300)
    parser.add_argument("--columns", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=50)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{processor()}, one thread; Python {platform.python_version()}, NumPy {np.__version__}, ", end="")
    print(f"torch {torch.__version__}, {build_info()['compiler']}")

    refresh = Refresh(arguments.sites, arguments.columns)
    refresh.ratios = refresh.ratios.astype(np.float32).astype(np.float64)  # the loop's precision: same ties
    core, loop = tracker_step(refresh, "core"), LayerLoop(refresh)
    ranks, theirs = core().ranks, np.array(list(loop.step().values()))
    agreement = f"{np.abs(ranks - theirs).sum() // 2} of {ranks.sum()} ranks placed otherwise (ties only)"

    print(f"\none step, {refresh.sites} sites x {refresh.columns} candidates, budget {refresh.budget}; {agreement}")
    print(f"{'':34}{'median':>10}{'p90':>10} ms")
    rows = {
        "core, component": (core, arguments.repeats),
        "core, subspace": (tracker_step(refresh, "core", "subspace"), arguments.repeats),
        "core, captured": (tracker_step(refresh, "core", "captured"), arguments.repeats),
        "core, divisors 1 and 2": (tracker_step(refresh, "core", divisors=True), arguments.repeats),
        "reference, component": (tracker_step(refresh, "reference"), 10),
        "loop over layers": (loop.step, 5),
    }
    medians = {}
    for name, (step, repeats) in rows.items():
        medians[name], p90 = percentiles(step, repeats)
        print(f"{name:34}{medians[name]:10.3f}{p90:10.3f}")
    print(f"loop / core: {medians['loop over layers'] / medians['core, component']:.0f}")

    print(f"\ngrowth with the number of sites, {refresh.columns} candidates each")
    print(f"{'sites':>8}{'core ms':>12}{'µs a site':>12}")
    for sites in (30, 100, 300, 1000, 3000, 10000):
        median, _ = percentiles(tracker_step(Refresh(sites, refresh.columns), "core"), 10)
        print(f"{sites:8}{median:12.3f}{1e3 * median / sites:12.3f}")


def processor() -> str:
    """The CPU's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
