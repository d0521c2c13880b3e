"""The C++ sources under ThreadSanitizer, AddressSanitizer and UndefinedBehaviorSanitizer."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_compare_bases import SHAPES, bases, run_on_host

from eva_kernels._build import build_info
from eva_kernels.convergence import BasisComparison

pytestmark = pytest.mark.slow  # `make sanitize`

SANITIZERS = {
    "threads": ("-fsanitize=thread",),
    "memory": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
}
THREAD_SANITIZER_FOUND_A_RACE = 66  # its exit status
KERNEL = "tests/core/compare_bases_host.cpp"
FORMS = ("forms", "form_avx2", "form_avx512", "form_avx512bf16", "form_amx", "memory", "parallel")
TRACKERS = ("tests/core/trackers_host.cpp", "csrc/tracker.cpp", "csrc/allocation.cpp")


@pytest.mark.parametrize("flags", SANITIZERS.values(), ids=SANITIZERS.keys())
def test_kernel_source_is_clean(compile_program: Callable[..., Path], flags: tuple[str, ...]) -> None:
    previous, current = bases(SHAPES)
    result = run_on_host(compile_program(KERNEL, flags=flags), previous, current, 0.9, padding=3)
    reference = BasisComparison(SHAPES, 0.9, impl="reference")
    reference.start(previous, current)
    np.testing.assert_array_equal(result.components_converged, reference.result().components_converged)


def test_the_thread_sanitizer_sees_missing_barriers(compile_program: Callable[..., Path]) -> None:
    """The check above could find a race: without __syncthreads() it does."""
    program = compile_program(KERNEL, flags=(*SANITIZERS["threads"], "-DWITHOUT_BARRIERS"))
    with pytest.raises(subprocess.CalledProcessError) as failure:
        run_on_host(program, *bases([(1300, 33)]), 0.9)
    assert failure.value.returncode == THREAD_SANITIZER_FOUND_A_RACE


@pytest.mark.parametrize("flags", SANITIZERS.values(), ids=SANITIZERS.keys())
def test_trackers_are_clean_in_several_threads(compile_program: Callable[..., Path], flags: tuple[str, ...]) -> None:
    subprocess.run([compile_program(*TRACKERS, flags=flags)], check=True)


def forms_program(compile_program: Callable[..., Path], *flags: str) -> Path:
    sources = [
        "tests/core/forms_host.cpp",
        "tests/core/tiles_emulated.cpp",
        *(f"csrc/cpu/{form}.cpp" for form in FORMS),
    ]
    amx = ["-DEVA_AMX"] if "amx" in build_info()["built_forms"] else []
    return compile_program(*sources, flags=(*flags, *amx, "-ldl"))


def test_no_form_computes_with_memory_that_it_has_not_written(compile_program: Callable[..., Path]) -> None:
    program = forms_program(compile_program, "-DEVA_FILL_MEMORY")
    zeros, nans = (
        subprocess.run([program, byte], check=True, text=True, capture_output=True).stderr for byte in ("0", "255")
    )
    assert zeros == nans
    assert len(zeros.split()) >= len(build_info()["cpu_forms"])


@pytest.mark.parametrize("flags", SANITIZERS.values(), ids=SANITIZERS.keys())
def test_every_form_is_clean_at_odd_sizes(compile_program: Callable[..., Path], flags: tuple[str, ...]) -> None:
    own = forms_program(compile_program, *flags)
    shown = subprocess.run([own], check=True, text=True, capture_output=True)
    assert shown.stdout.split() == build_info()["built_forms"] or "avx512bf16" not in build_info()["cpu_forms"]
