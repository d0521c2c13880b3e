"""What torch.compile and fake tensors see of the kernels."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from eva_kernels import gram_accumulate_, subspace_accumulate_
from eva_kernels.gradient_sketch import outer_add_, projected


def arguments(name, masked):
    x, shift = torch.randn(9, 8), torch.zeros(8)
    mask = torch.rand(9) < 0.5 if masked else None
    totals = torch.zeros(8, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    if name == "gram_accumulate_":
        return torch.zeros(8, 8), *totals, x, shift, mask
    return torch.zeros(8, 2), *totals, x, torch.randn(8, 2), shift, mask


@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("name", ["gram_accumulate_", "subspace_accumulate_"])
def test_registration(name, masked):
    op = getattr(torch.ops.eva_kernels, name).default
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, (*arguments(name, masked), 1.0), test_utils=tests)


@pytest.mark.parametrize("op", [gram_accumulate_, subspace_accumulate_])
def test_fake_tensors_run_no_kernel(op):
    real = arguments(op.__name__, True)
    with FakeTensorMode() as mode:
        op(*(mode.from_tensor(a) for a in real), impl="triton")
    assert not real[0].any()


@pytest.mark.parametrize("op", [gram_accumulate_, subspace_accumulate_])
def test_one_graph(op):
    """No graph break: the op is one node, and the compiled call computes what the plain one does."""

    def call(*tensors):
        op(*tensors, impl="triton")
        return tensors[0] * 2

    plain = arguments(op.__name__, True)
    compiled = [a.clone() for a in plain]
    expected = call(*plain)
    result = torch.compile(call, backend="aot_eager", fullgraph=True)(*compiled)
    assert torch.equal(result, expected)
    assert torch.equal(compiled[0], plain[0])


@pytest.mark.parametrize("masked", [False, True])
def test_products_with_few_columns(masked):
    x, weights, basis = torch.randn(9, 8), torch.randn(9, 2), torch.randn(8, 2)
    mask = torch.rand(9) < 0.5 if masked else None
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for name, arguments in (("outer_add_", (torch.zeros(8, 2), x, weights, mask)), ("projected", (x, basis, mask))):
        torch.library.opcheck(getattr(torch.ops.eva_kernels, name).default, arguments, test_utils=tests)

    def call(product, x, weights, basis):
        outer_add_(product, x, weights, mask, impl="triton")
        return product * 2, projected(x, basis, mask, impl="triton") * 2

    made = torch.compile(call, backend="aot_eager", fullgraph=True)(torch.zeros(8, 2), x, weights, basis)
    assert all(map(torch.equal, made, call(torch.zeros(8, 2), x, weights, basis)))
