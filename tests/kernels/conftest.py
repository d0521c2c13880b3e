"""What the tests of the compiled code for a CPU share: each runs with every form that this machine runs.

On a processor with AVX-512 BF16 and without AMX that is the form for AMX too: its tiles are emulated
(``tests/core/tiles_emulated.cpp``), its code is what was compiled.
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from eva_kernels._build import use_core

EMULATOR = Path(__file__).parents[1] / "core" / "tiles_emulated.cpp"
HERE = [] if use_core("auto") is None else use_core("core").cpu_forms()
EMULATED = ["amx"] if "avx512bf16" in HERE and "amx" in use_core("core").built_cpu_forms() and "amx" not in HERE else []
NONE = [pytest.param("none", marks=pytest.mark.skip("no form of the compiled code runs here"))]
ALGEBRA = ("avx512", "avx2")  # forms with code of their own for more than the products of rows


@cache
def emulator(folder: Path) -> ctypes.CDLL | None:
    """Tiles for a processor that has none; None where there is no compiler."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        return None
    library = folder / "tiles_emulated.so"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, str(EMULATOR), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    assert loaded.start_emulating() == 0
    return loaded


def chosen(form: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    core = use_core("core")
    before = core.cpu_form()
    instructions: Callable[[], int] | None = None
    if form in EMULATED:
        tiles = emulator(tmp_path_factory.getbasetemp())
        if tiles is None:
            pytest.skip("no C++ compiler, and the emulator is compiled")
        instructions = tiles.emulated_instructions
    start = instructions() if instructions is not None else 0
    core.choose_cpu_form(form, emulated=form in EMULATED)
    yield form
    core.choose_cpu_form(before)
    assert instructions is None or instructions() > start, "nothing was emulated"


@pytest.fixture(scope="module", params=HERE + EMULATED or NONE)
def cpu_form(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from chosen(request.param, tmp_path_factory)


@pytest.fixture(scope="module", params=[form for form in HERE if form in ALGEBRA] or NONE)
def algebra_form(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from chosen(request.param, tmp_path_factory)


@pytest.fixture(scope="module", params=[form for form in HERE + EMULATED if form == "amx"] or NONE)
def tile_form(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from chosen(request.param, tmp_path_factory)
