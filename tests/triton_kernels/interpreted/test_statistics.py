"""Statistics on the kernels, batch after batch: scratch memory and plans that are kept must not show."""

import itertools
import threading

import pytest
import torch

from eva_kernels import GramStatistic, SubspaceStatistic
from eva_kernels._triton import current_stream
from eva_kernels._workspace import Workspace, workspace_of
from eva_kernels.gram import gram_accumulate_, gram_add_
from eva_kernels.streaming_svd import refresh_, release_workspaces

CPU = torch.device("cpu")
LAYOUTS = {
    "plain": lambda x: x,
    "wide rows": lambda x: torch.empty(*x.shape[:-1], x.shape[-1] + 8, dtype=x.dtype)[..., : x.shape[-1]].copy_(x),
    "batch second": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "columns first": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "odd base": lambda x: torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x),
}


def batches(d, dtype):
    """Rows of changing shapes and layouts, some masked, with a shape that comes back."""
    generator = torch.Generator().manual_seed(0)
    for shape, layout, masked in (
        ((2, 20), "plain", False), ((1, 50), "plain", True), ((2, 20), "plain", True), ((2, 20), "wide rows", True),
        ((3, 5), "batch second", True), ((3, 5), "columns first", False), ((2, 20), "odd base", False),
        ((2, 20), "plain", False), ((1, 1), "plain", False),
    ):  # fmt: skip
        x = (torch.randn(*shape, d, generator=generator) + 1).to(dtype)
        mask = torch.rand(*shape, generator=generator) < 0.6 if masked else None
        yield LAYOUTS[layout](x), mask


def totals(statistic):
    image = statistic.gram if isinstance(statistic, GramStatistic) else statistic.pending
    return image.double(), statistic.column_sum, statistic.square_sum


@pytest.mark.parametrize(
    ("kind", "columns", "dtype"),
    [
        *itertools.product((GramStatistic, SubspaceStatistic), (6,), (torch.bfloat16, torch.float32)),
        *(
            pytest.param(SubspaceStatistic, 70, dtype, marks=pytest.mark.slow)
            for dtype in (torch.bfloat16, torch.float32)
        ),
    ],
)
def test_a_stream_is_that_of_the_reference(kind, columns, dtype):
    """All sums are in float32 there and here, in other orders: 2 n d roundings of all magnitudes bound both."""
    d = max(24, columns)
    ours, reference = (kind(d, columns, impl=impl) for impl in ("triton", "reference"))
    size = torch.zeros((), dtype=torch.float64)
    for x, mask in batches(d, dtype):
        ours.accumulate_(x, mask)
        reference.accumulate_(x, mask)
        size += (x if mask is None else x[mask]).double().square().sum() + ours.shift.double().square().sum() * len(x)
    steps = 2 * (ours.num_rows + d) * torch.finfo(torch.float32).eps
    assert torch.equal(ours.shift, reference.shift)
    for mine, its in zip(totals(ours), totals(reference), strict=True):
        assert (mine - its).abs().max() <= steps * size


def test_a_gram_matrix_is_whole_where_it_is_read():
    statistic = GramStatistic(24, 4, impl="triton")
    for x, mask in batches(24, torch.bfloat16):
        statistic.accumulate_(x, mask)
        copy = statistic.clone()
        assert not statistic.is_symmetric
        assert torch.equal(copy.gram, copy.gram.T)
        for name in ("state", "summands"):
            read = getattr(statistic.clone(), name)()["gram"]
            assert torch.equal(read, copy.gram)
    statistic.impl = "reference"  # which adds to all of it
    statistic.accumulate_(torch.randn(5, 24))
    statistic.impl = "triton"
    assert torch.equal(statistic.gram, statistic.gram.T)
    restored = GramStatistic(24, 4, impl="triton")
    restored.load_state_(statistic.state())
    assert torch.equal(restored.gram, statistic.gram)


def test_a_new_basis_is_multiplied_from_then_on():
    """After a refresh the rows are multiplied with the new sample, not with what kernels made of the one before."""
    statistic = SubspaceStatistic(24, 6, impl="triton")
    x = torch.randn(60, 24, generator=torch.Generator().manual_seed(0))
    statistic.accumulate_(x)
    refresh_([statistic])
    statistic.accumulate_(x)
    other = SubspaceStatistic(24, 6, impl="triton")
    other.load_state_({**statistic.state(), "pending": torch.zeros(24, 6)})
    other.accumulate_(x)
    assert torch.equal(other.pending, statistic.pending)
    assert statistic.nbytes() > SubspaceStatistic.predict_nbytes(24, 6)


def test_scratch_memory_starts_as_anything_and_is_left_ready():
    """Buffers full of NaN change nothing, and what counts arrivals is zero again, also where blocks of it were used."""
    x, mask = torch.randn(100, 24).bfloat16(), torch.rand(100) < 0.5
    first, second = (SubspaceStatistic(24, 6, impl="triton") for _ in range(2))
    for statistic in (first, second):
        workspace = workspace_of(CPU, current_stream(CPU))
        for (name, _), buffer in workspace._buffers.items():
            if name != "counters":
                buffer.fill_(torch.nan)
        for rows, part in ((x, mask), (x[:20], None), (x, None)):
            statistic.accumulate_(rows, part)
        assert not workspace.counters(1).any()
    for one, other in zip(totals(first), totals(second), strict=True):
        assert torch.equal(one, other)


def test_a_buffer_that_grows_forgets_the_plans_that_hold_it():
    workspace = Workspace(CPU)
    small = workspace.buffer("y", 10)
    workspace.keep("plan", small)
    assert workspace.buffer("y", 5) is small
    assert workspace.plans
    assert workspace.buffer("y", 11).numel() == 11
    assert not workspace.plans


def test_scratch_memory_is_let_go():
    x = torch.randn(20, 24, generator=torch.Generator().manual_seed(0))
    kept, released = (SubspaceStatistic(24, 6, impl="triton") for _ in range(2))
    for statistic in (kept, released):
        for _ in range(2):
            statistic.accumulate_(x)
            if statistic is released:
                before = workspace_of(CPU, current_stream(CPU))
                release_workspaces()
                assert workspace_of(CPU, current_stream(CPU)) is not before
    assert torch.equal(kept.pending, released.pending)


def test_a_shift_that_is_strided_is_read_as_it_lies():
    """Also where the same kind of rows came with a contiguous one before."""
    x = torch.randn(20, 24, generator=torch.Generator().manual_seed(0))
    shift = torch.arange(48.0)[::2]
    targets = [[torch.zeros(24, 24), torch.zeros(24).double(), torch.zeros(()).double()] for _ in range(2)]
    gram_add_(*targets[0], x, shift.contiguous(), impl="triton")
    for target in targets[0]:
        target.zero_()
    gram_add_(*targets[0], x, shift, impl="triton")
    gram_accumulate_(*targets[1], x, shift.contiguous(), impl="triton")
    assert torch.equal(targets[0][0].tril(), targets[1][0].tril())
    assert torch.equal(targets[0][1], targets[1][1])
    assert torch.equal(targets[0][2], targets[1][2])


def test_threads_share_nothing():
    found = []
    thread = threading.Thread(target=lambda: found.append(workspace_of(CPU, 0)))
    thread.start()
    thread.join()
    assert found[0] is not workspace_of(CPU, 0)
    assert workspace_of(CPU, 1) is not workspace_of(CPU, 0) is workspace_of(CPU, 0)


@pytest.mark.parametrize("kind", [GramStatistic, SubspaceStatistic])
@pytest.mark.parametrize(
    ("x", "mask", "error", "message"),
    [
        (torch.zeros(5, 9), None, ValueError, "^shift: expected shape"),
        (torch.zeros(5, 8), torch.zeros(5), TypeError, "^row_mask: expected dtype torch.bool"),
        (torch.zeros(5, 8), torch.zeros(4, dtype=torch.bool), ValueError, "^row_mask: expected shape"),
    ],
)
def test_rows_of_a_new_kind_are_validated(kind, x, mask, error, message):
    statistic = kind(8, 2, impl="triton")
    statistic.accumulate_(torch.randn(5, 8))
    with pytest.raises(error, match=message):
        statistic.accumulate_(x, mask, num_rows=5)
