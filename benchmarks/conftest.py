"""Options and fixtures of the suites: which devices, how long, and where results go.

pytest benchmarks/bench_gram.py --benchmark-json=gram.json
pytest benchmarks --quick                                   # every path, few rounds, small shapes: no figures
"""

import shlex
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from harness.machine import copy_rate, gemm_rate, provenance, synchronize
from harness.paired import Case, Pairing

DTYPES = (torch.float32, torch.bfloat16)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("eva-kernels")
    group.addoption("--quick", action="store_true", help="few rounds and small shapes, to see that everything runs")
    group.addoption("--device", choices=("cpu", "cuda"), help="measure this one only (default: all there are)")


def _devices(config: pytest.Config) -> list[str]:
    there = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    asked = config.getoption("device")
    if asked and asked not in there:
        raise pytest.UsageError(f"--device: expected one of {there} on this machine, got {asked!r}")
    return [asked] if asked else there


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", _devices(metafunc.config), scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Cases that know of no device run on the CPU: not where another one is asked for."""
    if config.getoption("device") not in (None, "cpu"):
        left_out = [item for item in items if "device" not in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def quick(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("quick"))


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peers' own, about their versions and options
        yield


@pytest.fixture
def compare(benchmark: Any, quick: bool, capsys: pytest.CaptureFixture[str]) -> Callable[[Case, str], dict[str, Any]]:
    """Measure a case: ours by pytest-benchmark, the others in the setup of each of its rounds."""

    def measure(case: Case, device: str = "cpu") -> dict[str, Any]:
        pairing = Pairing(case, device, quick=quick)

        def ours() -> None:
            case.ours.call()
            synchronize(device)

        benchmark.group = case.group
        benchmark.pedantic(ours, setup=pairing.others_once, rounds=pairing.rounds)
        found = pairing.results(list(benchmark.stats.stats.data))
        benchmark.extra_info.update(found)
        with capsys.disabled():
            print(f"\n  {case.group} | {case.name}: {_line(found)}", end="", flush=True)
        return benchmark.extra_info  # to which the suite may add

    return measure


def _line(found: dict[str, Any]) -> str:
    ratios = {name: value["median"] for name, value in found["ratio"].items() if name != "ruler"}
    forward = ratios.pop("forward", None)
    parts = [f"{1e3 * found['seconds']['ours']['median']:.3f} ms"]
    parts += [f"{found['forward_share'] / forward:.2f} of the forward"] if forward else []
    return "; ".join([*parts, *(f"{name} {ratio:.2f}x" for name, ratio in ratios.items())])


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    """In place of pytest-benchmark's own, which holds the host's name."""
    info: dict[str, Any] = {}
    for device in _devices(config):
        rates = {str(dtype).removeprefix("torch."): gemm_rate(device, dtype) for dtype in DTYPES}
        info[device] = {**provenance(device), "flop_rate": rates, "copy_rate": copy_rate(device)}
    info["quick"] = bool(config.getoption("quick"))
    info["command"] = shlex.join(["pytest", *(a for a in sys.argv[1:] if not a.startswith("--benchmark-json"))])
    return info


def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict[str, Any]:
    return {}  # the provenance names the commit


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Keep what a report is made from: no single rounds, no options of the timer."""
    for entry in output_json["benchmarks"]:
        for key in ("options", "params", "param", "fullname"):
            entry.pop(key, None)
        entry["stats"].pop("data", None)
