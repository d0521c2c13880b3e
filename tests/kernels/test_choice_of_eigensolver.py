"""Which eigensolver "auto" takes on a GPU: by the version of PyTorch, whose own one was a loop; here with stand-ins."""

import sys
from types import SimpleNamespace

import pytest
import torch

from eva_kernels import symmetric_eigen as package
from eva_kernels.symmetric_eigen import symmetric_eigen


@pytest.fixture
def taken(monkeypatch):
    """Names of the solvers that were called, on what would be a GPU with Triton."""
    names = []

    def solver(name):
        return lambda matrix: (names.append(name), torch.linalg.eigh(matrix))[1]

    kernels = SimpleNamespace(symmetric_eigen_triton=solver("kernel"))
    monkeypatch.setitem(sys.modules, "eva_kernels.symmetric_eigen.triton", kernels)
    monkeypatch.setattr(package, "symmetric_eigen_reference", solver("eigh"))
    monkeypatch.setattr(package, "choose_impl", lambda impl, *_, **__: "triton" if impl == "auto" else impl)
    monkeypatch.setattr(package, "core_runs", lambda matrix: False)
    return names


@pytest.mark.parametrize(
    ("version", "hip", "largest"),
    [
        ("2.6.0+cu124", None, 256),
        ("2.11.1", None, 256),
        ("2.12.0", None, 128),
        ("2.13.0+cu130", None, 128),
        ("3.0.0a0+git12ab", None, 128),
        ("2.13.0+rocm7.1", "7.1", 256),
    ],
)
def test_auto_takes_the_kernel_where_pytorch_loops_and_where_it_fits_the_cache(
    version, hip, largest, taken, monkeypatch
):
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.version, "hip", hip)
    for k in (1, 33, 128, 129, 256, 257):
        symmetric_eigen(torch.eye(k, dtype=torch.float64)[None])
        assert taken.pop() == ("kernel" if k <= largest else "eigh"), k


def test_a_name_is_kept_to_in_every_version(taken, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    for impl, name in (("triton", "kernel"), ("reference", "eigh")):
        symmetric_eigen(torch.eye(256)[None], impl=impl)
        assert taken.pop() == name
