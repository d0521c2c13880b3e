"""The first minutes on a real GPU, in one file: ``make first-gpu-run``.

    python -m tools.first_gpu_run          # on a GPU, under ten minutes: build/first-gpu-run.md
    python -m tools.first_gpu_run --dry    # the same steps, tiny and on the CPU: to try this tool

The driver's own view, ``eva-lora doctor --kernels``, the suite of ``make test-gpu``, B1 on the device, the eigensolver
beside PyTorch's, and what a pass costs the host. Each step is a process of its own. One that fails, hangs or is not
there is written down, and the others run all the same; the file is written anew after each, so that a run which is cut
off leaves what it had.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.harness.machine import provenance

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "build" / "first-gpu-run.md"
GRACE = 5  # seconds that a step has to say what it has found, once it is interrupted
DOCTOR = "kernel checks passed"  # is in the line that `eva-lora doctor --kernels` ends with
B1 = "E/F ="
MOST_LINES = 2000  # of a step's output that are kept, the last ones
QUIET = {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "120", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Step:
    """A command, and how long it may take; what the steps before it have left of theirs is added."""

    name: str
    command: tuple[str, ...]
    seconds: float
    about: str = ""  # what is in the line of its output that stands in the table


@dataclass(frozen=True)
class Outcome:
    """What came of a step."""

    step: Step
    status: str  # "passed", or what else happened
    seconds: float
    output: str

    @property
    def line(self) -> str:
        """The last one that the step is about; without one the last that is not empty."""
        lines = [line.strip(" =") for line in self.output.splitlines() if line.strip(" =")]
        return next((line for line in reversed(lines) if self.step.about in line), lines[-1] if lines else "")


def steps(*, dry: bool) -> list[Step]:
    python, pytest = sys.executable, (sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider")
    doctor = str(Path(python).with_name("eva-lora"))
    b1 = (python, "benchmarks/end_to_end.py", "--dtype", "bfloat16")
    eigen = (*pytest, "benchmarks/bench_eigen.py", "--benchmark-quiet")
    if dry:
        tiny = ("--batches", "2", "--tokens", "8", "--passes", "1", "--no-peft", "--no-accuracy")
        return [
            Step("driver", (python, "-c", "print('not asked')"), 60),
            Step("doctor", (doctor, "doctor"), 120),
            Step("test-gpu", (*pytest, "tests/gpu"), 120),
            Step("B1", (*b1, *tiny), 300, B1),
            Step("eigensolver", (*eigen, "--quick", "--device", "cpu"), 300),
            Step("host", (python, "benchmarks/host.py", "--help"), 60),
        ]
    return [
        Step("driver", ("nvidia-smi",) if torch.version.hip is None else ("rocm-smi", "-a"), 10),
        Step("doctor", (doctor, "doctor", "--kernels"), 100, DOCTOR),
        Step("test-gpu", (*pytest, "tests/gpu"), 180),
        Step("B1", (*b1, "--device", "cuda"), 160, B1),
        Step("eigensolver", (*eigen, "--device", "cuda"), 50),
        Step("host", (python, "benchmarks/host.py"), 70),
    ]


def _heed_interrupts() -> None:
    """What a shell runs in the background ignores them, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(step: Step, seconds: float) -> Outcome:
    """Run a step for that long at most. What it starts ends with it."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                step.command, cwd=ROOT, env={**os.environ, **QUIET}, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_heed_interrupts,
            )  # fmt: skip
        except OSError as error:
            return Outcome(step, f"not run: {error.strerror}: {error.filename}", 0.0, "")
        try:
            code = process.wait(seconds)
            status = "passed" if code == 0 else f"failed with exit status {code}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {seconds:.0f} s"
            os.killpg(process.pid, signal.SIGINT)  # pytest then lists the failures so far
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        text = output.read().decode(errors="replace")
    return Outcome(step, status, time.perf_counter() - start, shown(text))


def shown(text: str) -> str:
    """The last lines, each as a terminal ends up showing it: of a progress bar its last state."""
    lines = [line.rstrip().rpartition("\r")[2] for line in text.split("\n")]
    left_out = len(lines) - MOST_LINES
    return "\n".join([f"({left_out} lines left out)", *lines[left_out:]] if left_out > 0 else lines).strip("\n")


def report(outcomes: Sequence[Outcome], to_come: Iterable[Step], *, dry: bool) -> str:
    """The file, as Markdown."""
    here = ", ".join(f"{name} {value}" for name, value in provenance("cpu").items() if name != "kind")
    title = "# Dry run: nothing here was run on a GPU" if dry else "# First run on a GPU"
    lines = [title, "", f"Host: {here}.", ""]
    for outcome in outcomes:
        if DOCTOR in outcome.line:
            lines += ["```text", outcome.line, "```", ""]
    lines += ["| step | outcome | seconds | of its output |", "| --- | --- | ---: | --- |"]
    for outcome in outcomes:
        last = outcome.line.replace("|", "\\|")
        lines.append(f"| {outcome.step.name} | {outcome.status} | {outcome.seconds:.0f} | {last} |")
    lines += [f"| {step.name} | not run yet | | |" for step in to_come]
    for outcome in outcomes:
        fence = "`" * (3 + outcome.output.count("```"))
        lines += ["", f"## {outcome.step.name}: {outcome.status}", "", f"`{' '.join(said(outcome.step))}`", ""]
        lines += [f"{fence}text", outcome.output or "(no output)", fence]
    return "\n".join(lines) + "\n"


def said(step: Step) -> list[str]:
    """The command without where this machine keeps its programs."""
    return [Path(part).name if Path(part).is_absolute() else part for part in step.command]


def run_all(chosen: Sequence[Step], path: Path, *, dry: bool) -> list[Outcome]:
    """Run every step, and write the file after each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    left = 0.0
    for number, step in enumerate(chosen):
        print(f"[{number + 1}/{len(chosen)}] {step.name} ...", end=" ", flush=True)
        left += step.seconds
        outcomes.append(run(step, left))
        left -= outcomes[-1].seconds
        print(f"{outcomes[-1].status}, {outcomes[-1].seconds:.0f} s: {outcomes[-1].line}", flush=True)
        path.write_text(report(outcomes, chosen[number + 1 :], dry=dry), encoding="utf-8")
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="the same steps, tiny and on the CPU")
    parser.add_argument("--output", type=Path, default=REPORT)
    arguments = parser.parse_args()
    if not arguments.dry and not torch.cuda.is_available():
        print("first-gpu-run: expected a CUDA or HIP device, torch finds none: nothing was run", file=sys.stderr)
        return 1
    outcomes = run_all(steps(dry=arguments.dry), arguments.output, dry=arguments.dry)
    failed = [outcome.step.name for outcome in outcomes if outcome.status != "passed"]
    print("nothing was run on a GPU; " if arguments.dry else "", f"all of it is in {arguments.output}", sep="")
    if failed:
        print(f"not passed: {', '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
