"""The machine under measurement: what it is, and the rates that its products and copies reach."""

import os
import platform
import subprocess
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from eva_kernels._build import cpu_form

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "numpy", "peft", "transformers", "scikit-learn", "torch-incremental-pca", "triton")
GEMM = 2048  # side of the product whose rate counts as the peak
COPY_BYTES = 1 << 28  # far beyond any cache
TRIALS = 5


def synchronize(device: str) -> None:
    """Wait until a GPU has done what it was told; nothing to wait for on a CPU."""
    if device != "cpu":
        torch.cuda.synchronize()


def processor() -> str:
    """The CPU's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def commit() -> str:
    """Of the working tree, with "and changes" where tracked files differ from it; "unknown" outside a clone."""
    try:
        name = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name} and changes" if changed else name


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def provenance(device: str) -> dict[str, str | int]:
    """Where figures of this process come from. No host name and no path is in it."""
    known = {}
    for package in PACKAGES:
        try:
            known[package] = version(package)
        except PackageNotFoundError:
            known[package] = "not installed"
    return {
        "device": processor() if device == "cpu" else torch.cuda.get_device_name(),
        "kind": device,
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "cpu_form": cpu_form() or "none",
        "system": platform.system(),
        "python": platform.python_version(),
        **known,
        "commit": commit(),
    }


@cache
def gemm_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP a second of a large square product in ``dtype``, the best of a few."""
    side = GEMM if device == "cpu" else 4 * GEMM
    a = torch.randn(side, side, device=device).to(dtype)
    b = torch.randn(side, side, device=device).to(dtype)
    return 2 * side**3 / _fastest(lambda: a @ b, device)


@cache
def copy_rate(device: str) -> float:
    """Bytes a second, read and written, of a large copy, the best of a few."""
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / _fastest(lambda: target.copy_(source), device)


def _fastest(call: Callable[[], object], device: str) -> float:
    times = []
    for _ in range(TRIALS + 1):  # the first warms up
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])
