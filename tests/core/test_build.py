"""The build: what setup.py does without a compiler or nvcc, what nvcc makes of the CUDA sources, what is reported."""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from eva_kernels._build import CPU_FORMS, CPU_ISA, build_info, use_core

ROOT = Path(__file__).parents[2]

needs_sources = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="no sources beside the tests")


def build(into: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], dict[str, object]]:
    """Runs setup.py's build, all of its output below ``into``; the finished process and the build record."""
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(into), "build_ext"]
    command += ["--build-lib", str(into / "lib"), "--build-temp", str(into / "temp")]
    process = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, text=True, capture_output=True, check=False
    )
    record = into / "lib" / "eva_kernels" / "_build_record.json"
    return process, json.loads(record.read_text()) if record.exists() else {}


@needs_sources
def test_without_a_compiler_the_build_passes_and_says_why(tmp_path: Path) -> None:
    process, record = build(tmp_path, CXX="no-such-compiler", EVA_BUILD_CUDA="0")
    assert process.returncode == 0, process.stderr
    assert (process.stdout + process.stderr).count("no-such-compiler not found") == 1
    assert record["core"] == "not built: no-such-compiler not found"


@needs_sources
def test_cuda_that_was_asked_for_and_cannot_be_built_fails(tmp_path: Path) -> None:
    process, _ = build(tmp_path, CUDA_HOME="/no/such/toolkit", EVA_BUILD_CUDA="1")
    assert process.returncode != 0
    assert "EVA_BUILD_CUDA=1, but there is no nvcc in CUDA_HOME or on PATH" in process.stderr


@needs_sources
def test_an_unknown_cuda_setting_fails(tmp_path: Path) -> None:
    process, _ = build(tmp_path, EVA_BUILD_CUDA="yes")
    assert process.returncode != 0
    assert "EVA_BUILD_CUDA: expected auto, 0 or 1, got 'yes'" in process.stderr


@needs_sources
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_a_failing_nvcc_leaves_the_core_and_is_reported(tmp_path: Path) -> None:
    pytest.importorskip("pybind11")
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho this nvcc is broken\nexit 1\n")
    nvcc.chmod(0o755)
    process, record = build(tmp_path, CUDA_HOME=str(tmp_path))
    assert process.returncode == 0, process.stderr
    assert record["core"] == "built"
    assert record["cuda"] == "not built: this nvcc is broken"
    assert "building without CUDA, because this failed: this nvcc is broken" in process.stdout + process.stderr


@needs_sources
@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("c++") is None or platform.machine() != "x86_64", reason="no C++ compiler, or no x86-64"
)
def test_an_assembler_that_does_not_know_tiles_builds_the_other_forms(tmp_path: Path) -> None:
    pytest.importorskip("pybind11")
    old = tmp_path / "c++"
    old.write_text('#!/bin/sh\ncase "$*" in *tiles.cpp*|*-DEVA_AMX*) exit 1;; esac\nexec c++ "$@"\n')
    old.chmod(0o755)
    process, record = build(tmp_path, CXX=str(old), EVA_BUILD_CUDA="0")
    assert process.returncode == 0, process.stderr
    assert (record["core"], record["assembles_tiles"]) == ("built", False)
    (module,) = (tmp_path / "lib" / "eva_kernels").glob("_core*")
    names = "import importlib.util as u, sys; spec = u.spec_from_file_location('_core', sys.argv[1]); "
    names += "core = u.module_from_spec(spec); spec.loader.exec_module(core); print(*core.built_cpu_forms())"
    shown = subprocess.run([sys.executable, "-c", names, module], text=True, capture_output=True, check=True)
    assert shown.stdout.split() == [form for form in CPU_FORMS if form != "amx"]


@needs_sources
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_architectures_are_taken_from_torch_cuda_arch_list(tmp_path: Path) -> None:
    pytest.importorskip("pybind11")
    process, record = build(tmp_path, EVA_BUILD_CUDA="1", TORCH_CUDA_ARCH_LIST="Ada 9.0a+PTX", MAX_JOBS="2")
    assert process.returncode == 0, process.stderr
    assert record["architectures"] == ["sm_89", "sm_90a", "compute_90a"]
    process, _ = build(tmp_path, EVA_BUILD_CUDA="1", TORCH_CUDA_ARCH_LIST="sm_90")
    assert process.returncode != 0
    assert "TORCH_CUDA_ARCH_LIST: expected entries like 8.0, 9.0a or 10.0+PTX, got 'sm_90'" in process.stderr


@needs_sources
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_nvcc_compiles_for_all_architectures_without_warnings_or_spills(tmp_path: Path) -> None:
    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in (80, 90, 100)]
    strict = ["--Werror=all-warnings", "-Xptxas=-v,-warn-spills,-warn-lmem-usage", "-Xcompiler=-Wall,-Wextra,-Werror"]
    command = ["nvcc", "-std=c++17", "-O3", *code, *strict, "-t", "2"]
    process = subprocess.run(
        [*command, "-c", str(ROOT / "csrc/cuda/compare_bases.cu"), "-o", str(tmp_path / "object")],
        text=True,
        capture_output=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == 3
    assert "warning" not in process.stderr


def test_build_info_is_complete_and_consistent() -> None:
    info = build_info()
    assert set(info) == {
        *("core", "cpu_form", "cpu_forms", "built_forms", "compiler", "cplusplus", "cuda", "nvcc", "architectures"),
        *("cuda_runtime", "cuda_driver", "remedies"),
    }
    assert (info["core"] == "built") == (info["cplusplus"] is not None)
    assert info["cpu_form"] == (info["cpu_forms"][0] if info["cpu_forms"] else None) or "EVA_CPU_ISA" in os.environ
    assert info["cuda"].startswith("built") == bool(info["architectures"])
    lacks_a_form = info["core"] == "built" and len(info["built_forms"]) not in (0, len(CPU_FORMS))
    assert bool(info["remedies"]) == (info["core"] != "built" or "device(s)" not in info["cuda"] or lacks_a_form)
    shown = subprocess.run([sys.executable, "-m", "eva_kernels._build"], text=True, capture_output=True, check=True)
    assert f"cuda:          {info['cuda']}" in shown.stdout


def test_without_the_module_auto_says_so_once_and_core_is_an_error() -> None:
    program = """
import sys, warnings
sys.modules["eva_kernels._core"] = None  # as if it were not there
from eva_kernels.allocation import allocate_ranks
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    for _ in range(3):
        assert allocate_ranks([[0.5, 0.2], [0.4, 0.3]], [2, 2], 3).tolist() == [1, 2]
assert ["without its compiled module" in str(warning.message) for warning in told] == [True], told
assert told[0].filename == "<string>", told[0]
try:
    allocate_ranks([[0.5]], [1], 1, impl="core")
except RuntimeError as error:
    assert "impl='core': expected the compiled module, but it is" in str(error)
else:
    raise AssertionError("no error")
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def with_cpu_isa(value: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "EVA_CPU_ISA": value}
    return subprocess.run([sys.executable, *arguments], env=environment, text=True, capture_output=True, check=False)


def test_the_module_can_be_switched_off_and_nothing_calls_that_a_fault() -> None:
    shown = with_cpu_isa("none", "-m", "eva_kernels._build")
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    for part in ("core", "cuda"):
        assert f"{part + ':':14} switched off by EVA_CPU_ISA=none" in lines
    assert [line for line in lines if line.startswith("->")] == [
        "-> EVA_CPU_ISA=none switches the compiled module off; unset it to use what is built."
    ]
    program = """
from eva_kernels.allocation import allocate_ranks
assert allocate_ranks([[0.5, 0.2], [0.4, 0.3]], [2, 2], 3).tolist() == [1, 2]
allocate_ranks([[0.5]], [1], 1, impl="core")
"""
    process = with_cpu_isa("none", "-W", "error", "-c", program)
    assert "impl='core': expected the compiled module, but it is switched off by EVA_CPU_ISA=none" in process.stderr


def test_each_form_of_this_machine_can_be_chosen_and_no_other() -> None:
    here = build_info()["cpu_forms"]
    assert here == [form for form in CPU_FORMS if form in here]
    for asked in CPU_FORMS:
        process = with_cpu_isa(asked, "-m", "eva_kernels._build")
        if asked in here:
            assert f"{'cpu_form:':14} {asked}" in process.stdout.splitlines(), process.stderr
        else:
            assert f"expected one of {('auto', *here, 'none')}, got {asked!r}: " in process.stderr
    assert f"{'cpu_form:':14} {here[0] if here else '-'}" in with_cpu_isa("auto", "-m", "eva_kernels._build").stdout


def test_an_unknown_cpu_isa_is_an_error() -> None:
    process = with_cpu_isa("avx1024", "-m", "eva_kernels._build")
    assert process.returncode != 0
    assert f"ValueError: EVA_CPU_ISA: expected one of {CPU_ISA}, got 'avx1024'" in process.stderr


@pytest.mark.skipif(build_info()["core"] != "built", reason="_core is not built")
def test_a_form_is_taken_only_where_processor_and_system_have_all_of_it() -> None:
    """Without any one of the bits that a form asks for, none that asks for it is taken."""
    core = use_core("core")
    words = ("leaf_1_ecx", "leaf_7_ebx", "leaf_7_edx", "leaf_7_1_eax", "system", "has_full_tiles")
    needs = {  # by form, what it asks for beside what the one before does: (word, bit)
        "avx2": [(0, 12), (0, 27), (0, 28), (0, 29), (1, 5), (4, 1), (4, 2)],
        "avx512": [(1, 16), (1, 17), (1, 30), (1, 31), (4, 5), (4, 6), (4, 7)],
        "avx512bf16": [(3, 5)],
        "amx": [(2, 22), (2, 24), (4, 17), (4, 18), (5, 0)],
    }
    assert [*needs] == [*CPU_FORMS][::-1]
    built = core.built_cpu_forms()
    bits: list[tuple[int, int]] = []
    before = ""
    for form, added in needs.items():
        bits += added
        for missing in [None, *added]:
            given = dict.fromkeys(words, 0)
            for word, bit in bits:
                given[words[word]] |= ((word, bit) != missing) << bit
            given["has_full_tiles"] = bool(given["has_full_tiles"])
            found = core.greatest_cpu_form(**given)
            assert found == (form if missing is None and form in built else before), (form, missing)
        before = form if form in built else before


def test_neither_torch_nor_triton_is_imported() -> None:
    names = "eva_kernels.allocation, eva_kernels.convergence, eva_kernels._build"
    check = f"import sys, {names}; assert not {{'torch', 'triton', 'peft', 'eva_lora'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
