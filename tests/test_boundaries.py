"""Dependencies point one way, and importing costs no more than it must."""

import ast
import subprocess
import sys
from pathlib import Path

import eva_kernels
import eva_lora

KERNELS, LORA = Path(eva_kernels.__file__).parent, Path(eva_lora.__file__).parent


def modules_after(code):
    script = f"{code}\nimport sys; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    return set(
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    )


def imported(folder):
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((path, alias.name.partition(".")[0]) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                yield path, node.module.partition(".")[0]


def test_importing_eva_kernels_imports_no_torch_triton_peft_or_eva_lora():
    assert modules_after("import eva_kernels").isdisjoint({"torch", "triton", "peft", "transformers", "eva_lora"})


def test_the_numerics_import_no_triton_peft_or_eva_lora():
    loaded = modules_after("from eva_kernels import GramStatistic, SubspaceStatistic, gram_accumulate_, orthonormalize")
    assert "torch" in loaded
    assert loaded.isdisjoint({"triton", "peft", "transformers", "eva_lora"})


def test_importing_eva_lora_imports_no_triton_peft_or_matplotlib():
    assert modules_after("import eva_lora").isdisjoint({"triton", "peft", "transformers", "matplotlib"})


def test_eva_kernels_names_no_model_library():
    allowed_lazily = KERNELS / "__init__.py"  # for type checkers: where eva_initialize lives
    bad = [
        (path.name, name)
        for path, name in imported(KERNELS)
        if name in {"peft", "transformers", "accelerate", "eva_lora"} and path != allowed_lazily
    ]
    assert bad == []


def test_eva_lora_names_no_triton_and_not_the_compiled_module():
    assert [path.name for path, name in imported(LORA) if name == "triton"] == []
    assert [path.name for path in LORA.rglob("*.py") if "eva_kernels._core" in path.read_text(encoding="utf-8")] == []


def test_nobody_asks_a_device_for_float64_that_it_may_not_have():
    """``eva_kernels._double.double`` knows where it is; these have it at home already, or on the CPU from a file."""
    at_home = {
        "_double.py",
        "kernel_check.py",  # of kernels that run on GPUs with float64 only
        "orthonormal/__init__.py",
        "orthonormal/core.py",
        "streaming_svd/refresh.py",
        "streaming_svd/statistics.py",
        "export.py",
        "planning.py",
    }
    found = {
        path.relative_to(package).as_posix()
        for package in (KERNELS, LORA)
        for path in package.rglob("*.py")
        if ".double()" in path.read_text(encoding="utf-8")
    }
    assert found <= at_home


def test_the_numerics_know_no_process_groups():
    assert [path.name for path in KERNELS.rglob("*.py") if "distributed" in path.read_text(encoding="utf-8")] == []


def test_eva_initialize_is_found_where_strangers_look():
    assert eva_kernels.eva_initialize is eva_lora.eva_initialize


def test_every_public_name_resolves():
    for package in (eva_kernels, eva_lora):
        for name in package.__all__:
            assert getattr(package, name) is not None
