"""Builds eva_kernels._core from csrc/: C++17 and pybind11, and CUDA where nvcc is found. No torch headers.

Environment: EVA_BUILD_CUDA=auto|0|1 (auto: where nvcc is found, 1: fail without it), CUDA_HOME,
TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX, CFLAGS. Without a compiler the package installs in pure Python. What was
built, or why not, is kept in eva_kernels/_build_record.json for `eva-lora doctor`. Metadata: pyproject.toml.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

RECORD = Path("eva_kernels") / "_build_record.json"
SOURCES = [
    "csrc/allocation.cpp",
    "csrc/tracker.cpp",
    "csrc/bindings.cpp",
    "csrc/cpu/memory.cpp",
    "csrc/cpu/parallel.cpp",
    "csrc/cpu/forms.cpp",
    "csrc/cpu/form_avx2.cpp",
    "csrc/cpu/form_avx512.cpp",
    "csrc/cpu/form_avx512bf16.cpp",
    "csrc/cpu/form_amx.cpp",
    "csrc/cpu/bindings.cpp",
]
CUDA_SOURCES = ["csrc/cuda/compare_bases.cu", "csrc/cuda/bindings.cpp"]
# Contraction to fused multiply-adds would make results depend on the processor.
CXX_FLAGS = ["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
DEFAULT_ARCHITECTURES = "8.0;9.0;10.0+PTX"
NAMED_ARCHITECTURES = {"Turing": "7.5", "Ampere": "8.0;8.6", "Ada": "8.9", "Hopper": "9.0", "Blackwell": "10.0;12.0"}


def run(command: list[str]) -> str:
    """Its output; CompileError with the last lines where it fails or does not exist."""
    try:
        return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout
    except FileNotFoundError:
        raise CompileError(f"{command[0]} not found") from None
    except subprocess.CalledProcessError as error:
        raise CompileError("\n".join(error.stdout.strip().splitlines()[-20:])) from None


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME if that is set, else the one on PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


def architectures(nvcc: str) -> list[str]:
    """What to generate code for, as sm_80 or (PTX) compute_100."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    supported = re.findall(r"compute_(\w+)", run([nvcc, "--list-gpu-arch"]))
    targets = []
    for entry in re.split(r"[;\s]+", (asked or DEFAULT_ARCHITECTURES).strip()):
        name, plus, _ = entry.partition("+PTX")
        for version in NAMED_ARCHITECTURES.get(name, name).split(";"):
            if not re.fullmatch(r"\d+\.\d[af]?", version):
                raise CompileError(f"TORCH_CUDA_ARCH_LIST: expected entries like 8.0, 9.0a or 10.0+PTX, got {entry!r}")
            number = version.replace(".", "")
            if asked or number in supported:  # an nvcc too old for all of ours builds what it can
                targets.append(f"sm_{number}")
        if plus and targets:
            targets.append(targets[-1].replace("sm", "compute"))
    return list(dict.fromkeys(targets))


def assembles_tiles(compiler: list[str], folder: Path) -> bool:
    """Whether the compiler's assembler knows the instructions of AMX; older ones build everything else."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiles.cpp").write_text('void release() { __asm__ volatile("tdpbf16ps %tmm0, %tmm1, %tmm2"); }\n')
    try:
        run([*compiler, "-c", str(folder / "tiles.cpp"), "-o", str(folder / "tiles.o")])
    except CompileError:
        return False
    return True


class BuildExtension(build_ext):
    """Compiles with ninja where there is one, C++ with the configured compiler and CUDA with nvcc."""

    record: dict[str, Any]

    def run(self) -> None:
        self.record = {"core": "not built", "cuda": "not built"}
        in_place = self.inplace or self.editable_mode
        try:
            super().run()
        finally:
            for root in [Path(self.build_lib), *([Path()] if in_place else [])]:
                (root / RECORD).parent.mkdir(parents=True, exist_ok=True)
                (root / RECORD).write_text(json.dumps(self.record, indent=1) + "\n")

    def build_extension(self, ext: Extension) -> None:
        wanted = os.environ.get("EVA_BUILD_CUDA", "auto")
        if wanted not in ("auto", "0", "1"):
            raise SystemExit(f"EVA_BUILD_CUDA: expected auto, 0 or 1, got {wanted!r}")
        ext.optional = wanted != "1"
        nvcc = find_nvcc()
        if nvcc and wanted != "0":
            try:
                return self.build(ext, nvcc)
            except CompileError as error:
                self.record["cuda"] = f"not built: {error}"
                if wanted == "1":
                    raise
                self.warn(f"building without CUDA, because this failed: {error}")
        elif wanted == "1":
            raise CompileError("EVA_BUILD_CUDA=1, but there is no nvcc in CUDA_HOME or on PATH")
        else:
            self.record["cuda"] = f"not built: {'EVA_BUILD_CUDA=0' if nvcc else 'no nvcc in CUDA_HOME or on PATH'}"
        try:
            self.build(ext, None)
        except CompileError as error:
            self.record["core"] = f"not built: {error}"
            raise

    def build(self, ext: Extension, nvcc: str | None) -> None:
        if self.compiler.compiler_type != "unix":
            raise CompileError("only compilers with the command line of GCC or Clang are supported")
        try:
            from pybind11 import get_include
        except ImportError:
            raise CompileError("pybind11 is not installed in the environment of the build") from None
        compiler = self.compiler.compiler_so_cxx
        cxx = [*compiler, *CXX_FLAGS, *(["-DEVA_CUDA"] if nvcc else []), f"-I{get_include()}"]
        has_tiles = assembles_tiles(compiler, Path(self.build_temp))
        cxx += ["-DEVA_AMX"] if has_tiles else []
        cxx += [f"-I{directory}" for directory in self.include_dirs]
        version = run([compiler[0], "--version"]).splitlines()[0]
        link = list(self.compiler.linker_so_cxx)
        targets: list[str] = []
        if nvcc:
            targets = architectures(nvcc)
            code = [f"-gencode=arch={t.replace('sm', 'compute')},code={t}" for t in targets]
            cuda = [nvcc, f"-ccbin={compiler[0]}", *NVCC_FLAGS, *code]
            # nvcc knows where its libraries are. The runtime is linked in, and hidden from torch's own.
            link = [nvcc, f"-ccbin={compiler[0]}", "-shared", "-cudart=static", "-Xlinker=--exclude-libs=ALL"]

        commands: dict[str, list[str]] = {}
        for source in [*ext.sources, *(CUDA_SOURCES if nvcc else [])]:
            target = str(Path(self.build_temp).resolve() / Path(source).with_suffix(f"{Path(source).suffix}.o"))
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            tool = cuda if source.endswith(".cu") else cxx
            commands[target] = [*tool, "-MMD", "-MF", f"{target}.d", "-c", source, "-o", target]
        compile_all(commands, Path(self.build_temp) / "build.ninja")
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        run([*link, *commands, "-ldl", "-o", str(output)])  # dlsym is in libdl before glibc 2.34

        self.record["core"], self.record["compiler"] = "built", version
        self.record["assembles_tiles"] = has_tiles
        if nvcc:
            release = re.search(r"release ([\d.]+)", run([nvcc, "--version"]))
            self.record.update(cuda="built", nvcc=release and release[1], architectures=targets)


def compile_all(commands: dict[str, list[str]], ninja_file: Path) -> None:
    """Run the command that makes each file, in parallel and only where needed if there is a ninja."""
    ninja = shutil.which("ninja")
    if ninja is None:
        for command in commands.values():
            print(run(command), end="")
        return

    def escape(path: str | Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(path))

    rules = [
        f"builddir = {escape(ninja_file.parent)}\nrule compile\n  command = $line\n  depfile = $out.d\n  deps = gcc\n"
    ]
    for target, command in commands.items():
        line = shlex.join(command).replace("$", "$$")
        rules.append(f"build {escape(target)}: compile\n  line = {line}\n")
    ninja_file.write_text("\n".join(rules))
    jobs = [f"-j{os.environ['MAX_JOBS']}"] if "MAX_JOBS" in os.environ else []
    print(run([ninja, "-f", str(ninja_file), *jobs]), end="")


setup(
    packages=find_packages(include=["eva_kernels*"]) + find_packages("python"),
    ext_modules=[Extension("eva_kernels._core", SOURCES, language="c++")],
    cmdclass={"build_ext": BuildExtension},
)
