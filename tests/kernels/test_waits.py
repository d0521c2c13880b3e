"""Where the host waits for a GPU, on a simulated one: once for what refreshes find, for nothing that rows bring."""

import math

import pytest
import torch
from scipy.linalg import subspace_angles

import eva_kernels.orthonormal
from eva_kernels import GramStatistic, SubspaceStatistic, orthonormalize
from eva_kernels._transfer import STAGED_BYTES, sent
from eva_kernels.orthonormal import ADDED, orthonormalize_by_cholesky, orthonormalize_or
from eva_kernels.streaming_svd import refresh_
from support.bounds import UNIT_ROUNDOFF, deviation, orthonormality
from support.simulated_cuda import SimulatedCuda
from support.streams import stream

ROWS, Q = 60, 6
KINDS = [GramStatistic, SubspaceStatistic]


@pytest.fixture
def cuda():
    with SimulatedCuda() as device:
        yield device


def waits(device, call):
    before = device.waits
    call()
    return device.waits - before


@pytest.mark.parametrize(
    ("waits_for", "call"),
    [
        (0, lambda x, here: x + 1),
        (0, lambda x, here: x @ x.mT),
        (0, lambda x, here: x[1:, None, ..., 0]),
        (0, lambda x, here: x[x.new_zeros(2, dtype=torch.int64)]),
        (0, lambda x, here: x.index_select(0, x.new_zeros(2, dtype=torch.int64))),
        (0, lambda x, here: torch.where(x > 0, x, 0)),
        (0, lambda x, here: x.masked_fill_(x > 0, 0)),
        (0, lambda x, here: x.__setitem__(slice(1, 3), 0)),
        (0, lambda x, here: torch.linalg.cholesky_ex(x.new_ones(2, 2))),
        (0, lambda x, here: x.to(x.device, torch.float64)),
        (1, lambda x, here: x.cpu()),
        (1, lambda x, here: x.sum().item()),
        (1, lambda x, here: bool(x.isfinite().all())),
        (1, lambda x, here: float(x.sum())),
        (1, lambda x, here: x.tolist()),
        (1, lambda x, here: x[x > 0]),
        (1, lambda x, here: x[x[:, 0] > 0]),
        (1, lambda x, here: (x > 0).nonzero()),
        (1, lambda x, here: torch.equal(x, x)),
        (1, lambda x, here: x[[0, 1]]),
        (1, lambda x, here: x[torch.tensor([0, 1])]),
        (1, lambda x, here: x.new_tensor([1.0, 2.0])),
        (1, lambda x, here: torch.tensor([1.0], device=x.device)),
        (1, lambda x, here: here.to(x.device)),
        (1, lambda x, here: here.to(x.device, non_blocking=True)),
        (1, lambda x, here: x.copy_(here)),
        (0, lambda x, here: here.pin_memory().to(x.device, non_blocking=True)),
        (1, lambda x, here: here.pin_memory().to(x.device)),
        (1, lambda x, here: torch.linalg.eigh(x.mT @ x)),
    ],
)  # fmt: skip
def test_the_simulated_device_counts_waits(waits_for, call, cuda):
    here = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    x = here.to(cuda.device)
    assert x.is_cuda
    assert waits(cuda, lambda: call(x, here)) == waits_for


def test_the_simulated_device_refuses_to_mix(cuda):
    with pytest.raises(RuntimeError, match="expected all tensors on cuda:0"):
        torch.ones(2, device=cuda.device) + torch.ones(2)
    assert (torch.ones(2, device=cuda.device, dtype=torch.float64) * torch.tensor(2.0)).tolist() == [2, 2]


def test_what_is_sent_is_as_it_was_and_nobody_waits(cuda):
    x = torch.arange(12.0).view(3, 4)
    for given in (x, x.mT, x[:, ::2], x.int(), x > 3, x[:0]):
        expected, there = given.clone(), []
        assert waits(cuda, lambda given=given, there=there: there.append(sent(given, cuda.device))) == 0
        found = there[0].cpu()
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    there = sent(x, cuda.device)
    x.zero_()
    assert torch.equal(there.cpu(), torch.arange(12.0).view(3, 4))
    assert sent(x, torch.device("cpu")) is x
    assert sent(there, cuda.device) is there


def test_what_is_large_and_not_pinned_is_waited_for(cuda):
    assert waits(cuda, lambda: sent(torch.empty(STAGED_BYTES + 1, dtype=torch.uint8), cuda.device)) == 1
    pinned = torch.empty(STAGED_BYTES + 1, dtype=torch.uint8, pin_memory=True)
    assert waits(cuda, lambda: sent(pinned, cuda.device)) == 0


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("watch_gain", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_folded_in_without_a_wait_from_the_first_on(kind, watch_gain, masked, cuda):
    statistic = kind(20, Q, device=cuda.device, watch_gain=watch_gain)
    batches = [x.to(cuda.device) for x in stream(4, ROWS, 20)]
    mask = torch.ones(ROWS, dtype=torch.bool)
    mask[::3] = False
    there = mask.to(cuda.device)

    def fold(x):
        statistic.accumulate_(x, there if masked else None, num_rows=int(mask.sum()) if masked else ROWS)

    assert waits(cuda, lambda: fold(batches[0])) == 0
    for x in batches[1:]:
        assert waits(cuda, lambda: refresh_([statistic])) == 1
        assert waits(cuda, lambda x=x: fold(x)) == 0


def test_a_refresh_of_many_waits_once(cuda):
    """Of both kinds, and of several shapes."""
    made = [kind(d, q, device=cuda.device) for kind in KINDS for d, q in ((20, Q), (30, 5), (20, Q))]
    for s in made:
        s.accumulate_(stream(1, ROWS, s.num_features)[0].to(cuda.device), num_rows=ROWS)
    assert waits(cuda, lambda: refresh_(made)) == 1


@pytest.mark.parametrize("many", [1, 4])
def test_bases_that_are_straightened_wait_once_more_all_together(many, cuda):
    """Of a steep spectrum, and of fewer directions than columns."""
    rows = [x * torch.logspace(0, -12, 20) for x in stream(many, ROWS, 20)]
    rows += [x[:, :2] @ torch.eye(2, 20) for x in stream(many, ROWS, 20)]
    made = [SubspaceStatistic(20, Q, device=cuda.device) for _ in rows]
    for s, x in zip(made, rows, strict=True):
        s.accumulate_(x.to(cuda.device), num_rows=ROWS)
    assert waits(cuda, lambda: refresh_(made)) == 2
    for s in made:
        assert deviation(s.basis.cpu()).abs().max() <= orthonormality(20, Q)


SPOILT = {
    "as it is": lambda y: y,
    "scales": lambda y: y * torch.logspace(-15, 15, y.shape[1]),
    "repeated": lambda y: torch.cat([y[:, :-1], y[:, :1]], 1),
    "zero columns": lambda y: torch.cat([y[:, :-2], torch.zeros_like(y[:, :2])], 1),
    "all zero": lambda y: torch.zeros_like(y),
    "close": lambda y: y[:, :1] + 1e-3 * y,
    "one direction": lambda y: y[:, :1].expand_as(y),
    "huge": lambda y: 1e38 * y / y.abs().max(),
    "tiny": lambda y: 1e-38 * y,
    "unit vectors": lambda y: torch.eye(*y.shape),
    "one unit vector": lambda y: torch.eye(*y.shape)[:, :1].expand_as(y),
    "square": lambda y: y[:12],
}


@pytest.mark.parametrize("name", SPOILT)
def test_columns_are_made_orthonormal_without_asking_how_it_went(name, cuda):
    y = SPOILT[name](torch.randn(60, 12, generator=torch.Generator().manual_seed(1)))
    otherwise = torch.eye(*y.shape)
    there, found = [x.to(cuda.device) for x in (y, otherwise)], []
    assert waits(cuda, lambda: found.append(orthonormalize_or(*there))) == 0
    q = found[0].cpu()
    assert deviation(q).abs().max() <= orthonormality(*q.shape)
    unit = (y.double() / y.double().norm(dim=0)).nan_to_num()
    smallest = torch.linalg.svdvals(unit)[-1]
    if smallest > 0.01:  # else what was added decides
        # Columns of cosines of norm ADDED, at most √q of them together, turn the span by that over the least singular
        # value; rounding Q turns it by √q · u.
        bound = math.sqrt(q.shape[1]) * (ADDED / float(smallest) + UNIT_ROUNDOFF[q.dtype])
        assert subspace_angles(unit.numpy(), q.double().numpy()).max() <= bound


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_leaves_what_was_there(bad, cuda):
    y, otherwise = torch.randn(9, 3, generator=torch.Generator().manual_seed(1)), torch.eye(9, 3)
    y[4, 1] = bad
    for device in (cuda.device, torch.device("cpu")):
        found = orthonormalize_or(y.to(device), otherwise.to(device))
        assert torch.equal(found.cpu(), otherwise)


def test_cholesky_qr_says_for_which_matrices_it_worked(cuda, monkeypatch):
    monkeypatch.setattr(eva_kernels.orthonormal, "core_runs", lambda y: False)
    y = torch.randn(60, 12, generator=torch.Generator().manual_seed(1))
    batch = torch.stack([SPOILT[name](y) for name in ("as it is", "scales", "close", "repeated", "zero columns")])
    found = []
    there = batch.to(cuda.device)
    assert waits(cuda, lambda: found.extend(orthonormalize_by_cholesky(there))) == 0
    q, done = (x.cpu() for x in found)
    assert done.tolist() == [True, True, True, False, False]
    assert torch.equal(q[done], orthonormalize(batch)[done])
    for call in (orthonormalize_by_cholesky, lambda y: orthonormalize_or(y[0], y[0])):
        with pytest.raises(ValueError, match=r"^y: expected shape \(\.\.\., d, q\) with d ≥ q"):
            call(torch.ones(1, 3, 4, device=cuda.device))
