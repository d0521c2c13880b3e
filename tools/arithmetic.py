"""The numeric tests under other arithmetic than this machine's own: ``make test-arithmetic``.

MKL, ATen and oneDNN choose their code by the processor, and each adds up in another order. A tolerance that holds for
one of them is one of that machine; under all of these settings the same tests have to pass. ``arithmetic`` in the table
is a digest of a few products and factorisations: rows with the same digest have, for all that shows, run the same code,
as where a library ignores a setting on this processor.

Default dtypes have tests of their own, written for them: the others make their inputs without a dtype.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from eva_kernels._build import build_info

ROOT = Path(__file__).parents[1]
# Its ranks are forked. A child of a process whose OpenMP has run threads may wait for them for ever: one thread only.
FORKING = "tests/distributed/test_tensor_parallel.py"
SHORT = ("tests/kernels", "tests/faults/test_numerics.py", "tests/lora/test_criteria.py", FORKING)
WHOLE = (
    *SHORT, "tests/core/test_allocation.py", "tests/core/test_convergence.py", "tests/core/test_compare_bases.py",
    "tests/lora/test_real_models.py::test_exact_statistic_captures_the_optimum_on_every_layer",
)  # fmt: skip
DEFAULTS = ("tests/faults/test_process_defaults.py",)
PLAIN = {
    "MKL_CBWR": "COMPATIBLE",
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "EVA_CPU_ISA": "none",
}
AVX2 = {"MKL_CBWR": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}

PROBE = """
import hashlib, torch
g = torch.Generator().manual_seed(0)
x, w = torch.randn(300, 200, generator=g), torch.randn(200, 64, generator=g)
gram = x.double().T @ x.double()
values = [x @ w, x.T @ (x @ w), x @ w[:, 0], gram, torch.linalg.eigh(gram)[1], torch.linalg.qr(x)[0]]
values += [torch.linalg.cholesky(gram + torch.eye(200)), x.bfloat16() @ w.bfloat16()]
values += [x.sum(0), x.exp().sum(1), torch.softmax(x, 1), torch.tanh(x)]
print(hashlib.sha256(b"".join(v.contiguous().view(torch.uint8).numpy().tobytes() for v in values)).hexdigest()[:8])
"""


@dataclass(frozen=True)
class Setting:
    """A row of the table: what is set in the environment, and which tests run under it."""

    name: str
    environment: dict[str, str] = field(default_factory=dict)
    threads: int = 1
    tests: tuple[str, ...] = WHOLE


def alone(variable: str, *values: str) -> list[Setting]:
    return [Setting(f"{variable}={value}", {variable: value}) for value in values]


SETTINGS = [
    Setting("this machine's own"),
    Setting("two threads", threads=2),
    *alone("MKL_CBWR", "AVX2", "AVX512", "COMPATIBLE"),
    *alone("MKL_ENABLE_INSTRUCTIONS", "AVX2"),
    *alone("ATEN_CPU_CAPABILITY", "default", "avx2", "avx512"),
    *alone("ONEDNN_MAX_CPU_ISA", "AVX2", "AVX512_CORE"),
    *alone("EVA_CPU_ISA", "none", *build_info()["cpu_forms"][1:]),  # the first is this machine's own
    Setting("default dtypes", tests=DEFAULTS),
]
SHORT_SETTINGS = [
    Setting("plainest of all", PLAIN, tests=SHORT),
    Setting("AVX2 of all", AVX2, tests=SHORT),
    Setting("MKL_CBWR=COMPATIBLE, compiled", {"MKL_CBWR": "COMPATIBLE"}, threads=2, tests=SHORT),
]
UNSET = {name for setting in SETTINGS for name in setting.environment}


@dataclass(frozen=True)
class Outcome:
    """What a setting's tests came to."""

    setting: Setting
    arithmetic: str
    passed: int
    skipped: int
    failed: list[str]
    seconds: float


def run(setting: Setting, folder: Path) -> Outcome:
    """Its tests in a process of their own; the output stays in ``folder``."""
    inherited = {name: value for name, value in os.environ.items() if name not in UNSET}
    threads = str(setting.threads)
    environment = {**inherited, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}
    environment |= setting.environment
    probed = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=True)
    name = "".join(letter if letter.isalnum() else "-" for letter in setting.name)
    results = folder / f"{name}.xml"
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "not slow", "-p", "no:cacheprovider", f"--junitxml={results}"]
    tests = [test for test in setting.tests if setting.threads == 1 or test != FORKING]
    started = time.perf_counter()
    with (folder / f"{name}.txt").open("w") as output:
        code = subprocess.run(
            [*command, *tests], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False
        ).returncode
    seconds = time.perf_counter() - started
    cases = list(ElementTree.parse(results).iter("testcase")) if results.exists() else []
    failed = list(failures(cases))
    if code and not failed:
        failed = [f"pytest ended with {code}: see {results.with_suffix('.txt')}"]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return Outcome(setting, probed.stdout.strip(), len(cases) - skipped - len(failed), skipped, failed, seconds)


def failures(cases: list[ElementTree.Element]) -> Iterator[str]:
    """The name of each test that failed, and its error's first line."""
    for case in cases:
        for kind in ("failure", "error"):
            found = case.find(kind)
            if found is not None:
                lines = [line.strip() for line in (found.get("message") or "").splitlines() if line.strip()]
                yield f"{case.get('classname')}::{case.get('name')}: {'; '.join(lines[:6])}"


def main() -> None:
    parser = argparse.ArgumentParser(description="The numeric tests under other arithmetic than this machine's own.")
    parser.add_argument("--short", action="store_true", help="three settings that differ most, without the real model")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="settings at a time")
    parser.add_argument("--only", default="", help="only settings with this in their name")
    arguments = parser.parse_args()
    folder = ROOT / "build" / "arithmetic"
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [s for s in (SHORT_SETTINGS if arguments.short else SETTINGS) if arguments.only in s.name]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        outcomes = list(pool.map(lambda setting: run(setting, folder), chosen))
    print(f"{'setting':<34} {'arithmetic':<10} {'passed':>6} {'skipped':>7} {'failed':>6} {'seconds':>7}")
    for o in outcomes:
        print(
            f"{o.setting.name:<34} {o.arithmetic:<10} {o.passed:>6} {o.skipped:>7} {len(o.failed):>6} {o.seconds:>7.0f}"
        )
    for o in outcomes:
        for failure in o.failed:
            print(f"{o.setting.name}: {failure}")
    sys.exit(any(o.failed for o in outcomes) or not outcomes)


if __name__ == "__main__":
    main()
