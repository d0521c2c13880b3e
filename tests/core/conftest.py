"""What the tests of the compiled module share. They need neither torch nor Triton."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from eva_kernels._build import build_info

ROOT = Path(__file__).parents[2]


@pytest.fixture(
    params=[
        "reference",
        pytest.param("core", marks=pytest.mark.skipif(build_info()["core"] != "built", reason="_core is not built")),
    ]
)
def impl(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def compile_program(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Compiles C++17 sources, with every warning an error, into a program."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))

    def compile_program(*sources: str, flags: tuple[str, ...] = ()) -> Path:
        if compiler is None:
            pytest.skip("no C++ compiler")
        if not (ROOT / "csrc").exists():
            pytest.skip("no C++ sources beside the tests")
        program = tmp_path_factory.mktemp("program") / "program"
        command = [compiler, "-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-pthread"]
        command += ["-I", str(ROOT / "csrc"), *flags, *(str(ROOT / s) for s in sources), "-o", str(program)]
        subprocess.run(command, check=True)
        return program

    return compile_program
