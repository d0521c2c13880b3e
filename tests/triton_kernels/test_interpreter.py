"""Runs the interpreted tests in a session of their own: Triton reads TRITON_INTERPRET when it is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eva_kernels import gram_accumulate_

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(INTERPRETED, reason="already inside the interpreter")
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_kernels_under_the_interpreter(which):
    tests = Path(__file__).parent / "interpreted"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which, str(tests)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-5_000:]


def test_importing_the_ops_does_not_import_triton():
    code = (
        "import sys, eva_kernels.gram, eva_kernels.subspace, eva_kernels.orthonormal, eva_kernels.gradient_sketch;"
        "sys.exit(any(m.split('.')[0] == 'triton' for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def _arguments(dtype):
    return (
        torch.zeros(3, 3, dtype=dtype),
        torch.zeros(3, dtype=torch.float64),
        torch.zeros((), dtype=torch.float64),
        torch.ones(2, 3, dtype=dtype),
        torch.zeros(3, dtype=dtype),
    )


@pytest.mark.skipif(INTERPRETED, reason="inside the interpreter Triton takes CPU tensors")
def test_explicit_triton_never_falls_back():
    arguments = _arguments(torch.float32)
    with pytest.raises(ValueError, match=r"^impl: expected CUDA or HIP tensors for 'triton', got device 'cpu'"):
        gram_accumulate_(*arguments, impl="triton")
    assert not arguments[0].any()


def test_explicit_triton_names_dtypes_it_has_no_kernel_for(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(TypeError, match=r"^impl: expected dtypes \(torch.float32, .*got torch.float64"):
        gram_accumulate_(*_arguments(torch.float64), impl="triton")
