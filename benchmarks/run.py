"""`make bench`: the tests that figures rest on, then every suite, then the report.

    python benchmarks/run.py                     # everything, under 20 minutes on two cores
    python benchmarks/run.py --quick             # every path, few rounds: to see that it works, no figures
    python benchmarks/run.py --suite gram --suite streaming

No figure comes from code whose tests fail. Each suite is a process of its own: one that fails is named in the
report and the others are measured all the same.
"""

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

from harness.results import Results, merged
from report import published_file, write_report

ROOT = Path(__file__).parents[1]
SUITES = (
    "gram",
    "subspace",
    "orthonormal",
    "low_rank_update",
    "eigen",
    "streaming",
    "convergence",
    "allocation",
    "hooks",
    "scaling",
    "initialisations",
    "end_to_end",
)
ON_CUDA = ("gram", "subspace", "orthonormal", "eigen", "streaming", "scaling")  # the others have no device of their own
GATE = (
    "tests/kernels",
    "tests/core/test_allocation.py",
    "tests/core/test_convergence.py",
    "tests/lora/test_initialize.py",
    "tests/lora/test_criteria.py",
    "tests/bench",
)
QUICK_GATE = ("tests/kernels/test_orthonormalize.py",)
TIME_LIMIT = 1200  # seconds a suite


def passes_gate(tests: tuple[str, ...]) -> bool:
    """Whether the tests of what is measured pass, and on a GPU every kernel its own check."""
    command = [sys.executable, "-m", "pytest", *tests, "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider"]
    if subprocess.run(command, cwd=ROOT).returncode != 0:
        return False
    if torch.cuda.is_available():
        from eva_kernels import check_kernels

        failed = [check for check in check_kernels("cuda") if not check.passed]
        print(*failed, sep="\n")
        return not failed
    return True


def run_suite(name: str, output: Path, options: list[str]) -> dict[str, str | float]:
    """Run one suite; its results are then in ``output`` if it passed or failed in part."""
    command = [sys.executable, "-m", "pytest", f"benchmarks/bench_{name}.py", f"--benchmark-json={output}"]
    command += ["-q", "-p", "no:cacheprovider", "--benchmark-quiet", "--benchmark-columns=median", *options]
    start = time.perf_counter()
    try:
        code = subprocess.run(command, cwd=ROOT, timeout=TIME_LIMIT).returncode
        status = "passed" if code == 0 else f"failed with exit status {code}"
    except subprocess.TimeoutExpired:
        status = f"stopped after {TIME_LIMIT} s"
    return {"status": status, "seconds": time.perf_counter() - start}


def _without_paths(arguments: list[str]) -> list[str]:
    """What decides the figures: not where they were written or what they were compared with."""
    kept = []
    left_out = ("--output", "--against")
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if before not in left_out and not argument.startswith(left_out):
            kept.append(argument)
    return kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--suite", action="append", choices=SUITES)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: all there are")
    parser.add_argument("--against", type=Path, help="earlier results (default: the committed ones, if there are any)")
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    arguments = parser.parse_args()

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA or HIP device: nothing measured")
        return 0
    gate = QUICK_GATE if arguments.quick else GATE
    print(f"gate: {' '.join(gate)}", flush=True)
    start = time.perf_counter()
    if not passes_gate(gate):
        print("the gate failed: nothing is measured", file=sys.stderr)
        return 1
    gate_seconds = time.perf_counter() - start

    options = ["--quick"] if arguments.quick else []
    options += ["--device", arguments.device] if arguments.device else []
    output = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    chosen = [name for name in SUITES if arguments.suite is None or name in arguments.suite]
    if arguments.device == "cuda":
        chosen = [name for name in chosen if name in ON_CUDA]
    suites: dict[str, dict[str, str | float]] = {}
    for number, name in enumerate(chosen, 1):
        print(f"\n[{number}/{len(chosen)}] {name}, {(time.perf_counter() - start) / 60:.1f} minutes so far", flush=True)
        file = output / f"{name}.json"
        file.unlink(missing_ok=True)
        suites[name] = run_suite(name, file, options)
    files = [output / f"{name}.json" for name in chosen]
    command = shlex.join(["python", "benchmarks/run.py", *_without_paths(sys.argv[1:])])
    results = merged(
        [file for file in files if file.exists() and file.stat().st_size],
        suites,
        command,
        f"{' '.join(gate)} passed in {gate_seconds:.0f} s",
    )
    results.save(output / "results.json")
    results = Results.load(output / "results.json")
    earlier = arguments.against or published_file(results)
    before = Results.load(earlier) if earlier.exists() else None
    for change in write_report(results, output, before) or ():
        if change.verdict != "same":
            print(f"{change.verdict}: {change.record.group}, {change.record.case}: cost {change.factor:.2f} of before")
    failed = [name for name, suite in suites.items() if suite["status"] != "passed"]
    print(f"\n{(time.perf_counter() - start) / 60:.1f} minutes; see {arguments.output / 'report.html'}", *failed)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
