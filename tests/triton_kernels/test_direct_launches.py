"""What the pass launches, on a device that does nothing: two kernels, nothing else, as Triton's JIT would."""

import os

import pytest
import torch

from support.versions import needs

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from torch.utils._python_dispatch import TorchDispatchMode

from eva_kernels import GramStatistic, SubspaceStatistic
from eva_kernels.gradient_sketch import outer_add_, projected
from null_device import null_device

KINDS = [GramStatistic, SubspaceStatistic]


def made(kind, dtype, *, d=256, n=600):
    """A statistic that has started, and rows for it."""
    statistic = kind(d, 24, impl="triton")
    x = torch.randn(2, n // 2, d, generator=torch.Generator().manual_seed(0)).to(dtype)
    statistic.accumulate_(x)
    return statistic, x


def launched(launches, call):
    """The launches of a call: grid, stream, kernel and its arguments, tensors as their addresses."""
    before = len(launches.arguments)
    call()
    return [
        tuple(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments[:6] + arguments[9:])
        for arguments in launches.arguments[before:]  # without what is for profilers
    ]


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_two_launches_and_nothing_else_and_they_are_the_jits(kind, dtype, masked):
    with null_device() as launches:
        statistic, x = made(kind, dtype)
        mask = torch.ones(x.shape[:2], dtype=torch.bool) if masked else None
        # Another mask than the statistic started with is a new kind of rows: through the JIT first.
        first = launched(launches, lambda: statistic.accumulate_(x, mask, num_rows=600))
        with Operators() as operators:
            second = launched(launches, lambda: statistic.accumulate_(x, mask, num_rows=600))
    assert operators.names == []
    assert len(second) == 2
    assert len(second[0]) > 20
    assert second == first[-2:]


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_basis_or_length_is_noticed(kind):
    with null_device() as launches:
        statistic, x = made(kind, torch.bfloat16)
        again = launched(launches, lambda: statistic.accumulate_(x))
        shorter = launched(launches, lambda: statistic.accumulate_(x[:1]))
        assert shorter != again
        assert launched(launches, lambda: statistic.accumulate_(x)) == again
        statistic.adopt_(torch.eye(256, 24), statistic.eigenvalues)
        after = launched(launches, lambda: statistic.accumulate_(x))
    if kind is SubspaceStatistic:
        assert len(after) == 3  # the new sample is prepared
        assert after[-2:] != again
    else:
        assert after == again


@needs("triton>=3.3")
def test_rows_that_start_elsewhere_get_their_own_kernel():
    """The JIT compiles for pointers that are multiples of 16; a kernel so compiled must not get others."""
    with null_device() as launches:
        statistic, x = made(SubspaceStatistic, torch.bfloat16)
        aligned = launched(launches, lambda: statistic.accumulate_(x))
        odd = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
        for _ in range(2):
            other = launched(launches, lambda: statistic.accumulate_(odd))
    assert [call[4] for call in other] != [call[4] for call in aligned]  # the loaded function


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_two_launches_a_product_with_few_columns(dtype, masked):
    x, weights, basis = torch.randn(600, 256).to(dtype), torch.randn(600, 40), torch.randn(256, 40).bfloat16()
    product, mask = torch.zeros(256, 40), torch.ones(600, dtype=torch.bool) if masked else None
    with null_device() as launches:
        # What X F is written to is new each time.
        for call, here in (
            (lambda: outer_add_(product, x, weights, mask, impl="triton"), slice(None)),
            (lambda: projected(x, basis, mask, impl="triton"), slice(0, 5)),
        ):
            first, second = launched(launches, call), launched(launches, call)
            assert len(first) == len(second) == 2
            assert [one[here] for one in first] == [one[here] for one in second]
