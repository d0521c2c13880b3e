"""No launch's grid can outgrow what devices take: 2³¹ − 1 programs along the first axis, 65,535 along the others."""

import os

import pytest
import torch

from eva_kernels._triton import Launch
from eva_kernels._workspace import Workspace
from eva_kernels.gradient_sketch import triton as gradient_sketch
from eva_kernels.gram import triton as gram
from eva_kernels.subspace import triton as subspace
from eva_kernels.symmetric_eigen import MAX_SIZE

MOST = 2**31 - 1, 2**16 - 1, 2**16 - 1
CACHES = 4 << 20, 50 << 20, 256 << 20  # bytes of L2: of small cards, an H100, and what is called one on AMD's largest
PROCESSORS = 20, 132, 304
ROWS = 1, 2**17, 2**24, 2**31 - 1
MOST_ENTRIES = 2**38  # of rows: 512 GB, more than any device has
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter has tiles of its own")


@pytest.fixture(
    params=[(p, c) for p in PROCESSORS for c in CACHES], ids=lambda found: f"{found[0]}, {found[1] >> 20} MiB"
)
def workspace(request, monkeypatch):
    """Scratch memory that nobody has, on a device of so many multiprocessors."""
    for module in (gram, subspace, gradient_sketch):
        monkeypatch.setattr(module, "architecture", lambda device: "sm_80")
        monkeypatch.setattr(module, "multiprocessors", lambda device: request.param[0])
    monkeypatch.setattr(subspace, "l2_bytes", lambda device: request.param[1])
    monkeypatch.setattr(gram, "has_tf32", lambda device: True)
    return Workspace(torch.device("meta"))


def grids(update):
    """Of all launches that an update makes."""
    found = [value._grid for value in vars(update).values() if isinstance(value, Launch)]
    assert len(found) == 2
    return found


def fits(grid):
    return all(1 <= size <= most for size, most in zip(grid, MOST, strict=True))


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("n", ROWS)
def test_of_the_subspace_product(n, aligned, workspace):
    for d, q in ((1, 1), (8, 8), (64, 48), (4096, 80), (2**20, 256), (2**27, 16)):
        if n * d > MOST_ENTRIES:
            continue
        x = torch.empty(n, d, dtype=torch.bfloat16, device="meta")
        product = torch.empty(d, q if aligned else min(q, subspace.GENERIC_COLUMNS), device="meta")
        update = subspace.SubspaceUpdate(x, aligned=aligned, masked=False, target=product, workspace=workspace)
        assert all(map(fits, grids(update))), (d, grids(update))
        assert fits((-(-d // subspace.PREPARE_ROWS), 1, 1))  # of what prepares a basis


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n", ROWS)
def test_of_products_with_few_columns(n, dtype, workspace):
    for d, q in ((1, 1), (8, 8), (64, 40), (4096, 80), (2**20, 320), (2**27, 16)):
        if n * d > MOST_ENTRIES:
            continue
        sizes = {"x": (n, d), "basis": (d, q), "weights": (n, q)}
        x, basis, weights = (torch.empty(*size, dtype=dtype, device="meta") for size in sizes.values())
        for outer, factor, target in ((False, basis, weights), (True, weights, basis)):
            kind = {"outer": outer, "masked": False, "workspace": workspace}
            product = gradient_sketch.ThinProduct(x, factor, target.float(), **kind)
            assert all(map(fits, grids(product))), (d, grids(product))


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("n", ROWS)
def test_of_the_gram_matrix(n, aligned, workspace):
    for d in (1, 8, 64, 4096, 2**18):  # of the last the matrix has 275 GB
        if n * d > MOST_ENTRIES:
            continue
        x, matrix = torch.empty(n, d, dtype=torch.bfloat16, device="meta"), torch.empty(d, d, device="meta")
        update = gram.GramUpdate(x, aligned=aligned, masked=False, gram=matrix, workspace=workspace)
        assert all(map(fits, grids(update))), (d, grids(update))
        blocks = -(-d // gram.MIRROR_BLOCK)
        assert fits((blocks * (blocks + 1) // 2, 1, 1))  # of the mirror


def test_of_the_eigensolver_only_the_first_axis_is_used():
    assert fits((2**31 // MAX_SIZE**2, 1, 1))  # a program a matrix
