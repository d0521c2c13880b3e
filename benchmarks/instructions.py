"""Exact instruction counts of the compiled hot paths, against recorded ones: what wall time is too noisy for.

    python benchmarks/instructions.py             # print the table; a report, it fails for no count
    python benchmarks/instructions.py --record    # and keep these counts as the ones to compare with

valgrind's callgrind runs `hot_paths.cpp`, compiled as the module is, and counts what one call executes: the same
number every time. It knows no AVX-512, so products in those forms are run by the processor itself, one instruction at
a time (ptrace), where that is allowed. What cannot be counted is named.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from eva_kernels._build import build_info

ROOT = Path(__file__).parents[1]
RECORDED = ROOT / "benchmarks" / "results" / "instructions.json"
SOURCES = (
    "benchmarks/hot_paths.cpp", "csrc/tracker.cpp", "csrc/allocation.cpp", "csrc/cpu/memory.cpp",
    "csrc/cpu/parallel.cpp", "csrc/cpu/forms.cpp", "csrc/cpu/form_avx2.cpp", "csrc/cpu/form_avx512.cpp",
    "csrc/cpu/form_avx512bf16.cpp", "csrc/cpu/form_amx.cpp",
)  # fmt: skip
FLAGS = ("-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-pthread")  # as in setup.py
UNSUPPORTED = 3  # exit status of a path whose instructions the processor, or valgrind's, does not have
NOTICEABLE = 0.01  # a change of this part is pointed out


@dataclass(frozen=True)
class Count:
    """Instructions of one call; None where nothing here can count them."""

    instructions: int | None
    how: str


def compile_paths(folder: Path) -> Path:
    """Raises FileNotFoundError where there is no compiler."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise FileNotFoundError("no C++ compiler")
    program = folder / "hot_paths"
    amx = ["-DEVA_AMX"] if "amx" in build_info()["built_forms"] else []
    command = [compiler, *FLAGS, *amx, "-I", "csrc", *SOURCES, "-o", str(program), "-ldl"]
    subprocess.run(command, cwd=ROOT, check=True)
    return program


def compiler_version() -> str:
    done = subprocess.run([os.environ.get("CXX", "c++"), "--version"], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()[0]


def paths(program: Path) -> list[str]:
    return subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()


def count(program: Path, path: str, folder: Path) -> Count:
    for how, counting in (("callgrind", count_with_callgrind), ("single steps", count_steps)):
        counted = counting(program, path, folder)
        if counted is not None:
            return Count(counted, how)
    return Count(None, "not counted: valgrind or this processor lacks its instructions, or stepping is not allowed")


def count_with_callgrind(program: Path, path: str, folder: Path) -> int | None:
    """Instructions inside ``hot_path``; None without valgrind, or where its processor lacks those that it needs."""
    if shutil.which("valgrind") is None:
        return None
    output = folder / "callgrind.out"
    options = ["--tool=callgrind", f"--callgrind-out-file={output}", "--toggle-collect=hot_path"]
    done = subprocess.run(["valgrind", *options, program, path], capture_output=True, text=True)
    if done.returncode == UNSUPPORTED or "Unrecognised instruction" in done.stderr:
        return None
    done.check_returncode()
    return int(re.findall(r"^(?:summary|totals): (\d+)", output.read_text(), re.MULTILINE)[0])


def count_steps(program: Path, path: str, _: Path) -> int | None:
    """Instructions of one call as the processor runs them; None where it lacks them or may not be stepped."""
    done = subprocess.run([program, path, "steps"], capture_output=True, text=True)
    return int(done.stdout) if done.returncode == 0 else None


def table(counts: dict[str, Count], recorded: dict[str, Count]) -> str:
    lines = ["| path | instructions a call | recorded | change | |", "| --- | ---: | ---: | ---: | --- |"]
    for path, entry in counts.items():
        known = recorded.get(path)
        before = known.instructions if known is not None and known.how == entry.how else None
        if entry.instructions is None:
            lines.append(f"| {path} | | | | {entry.how} |")
            continue
        change, remark = "", "new"
        if before is not None:
            part = entry.instructions / before - 1
            change = f"{part:+.2%}" if part else "0"
            remark = "" if abs(part) < NOTICEABLE else "**more**" if part > 0 else "fewer"
        remark = ", ".join(filter(None, (remark, entry.how)))
        lines.append(
            f"| {path} | {entry.instructions:,} | {'' if before is None else f'{before:,}'} | {change} | {remark} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            program = compile_paths(folder)
        except FileNotFoundError as error:
            print(f"instruction counts: {error}, nothing counted")
            return 0
        counts = {path: count(program, path, folder) for path in paths(program)}
    version = compiler_version()
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {"compiler": version, "counts": {}}
    if recorded["compiler"] == version:
        before = {path: Count(**entry) for path, entry in recorded["counts"].items()}
    else:
        before = {}
        print(f"recorded with {recorded['compiler']}, here {version}: not compared\n")
    print(table(counts, before))
    if arguments.record:
        known = {path: vars(entry) for path, entry in counts.items() if entry.instructions is not None}
        RECORDED.parent.mkdir(parents=True, exist_ok=True)
        RECORDED.write_text(json.dumps({"compiler": version, "counts": known}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
