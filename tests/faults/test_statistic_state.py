"""A statistic's state goes out as tensors and numbers, and comes back checked."""

import pytest
import torch

from eva_kernels import GramStatistic, SubspaceStatistic, refresh_

KINDS = pytest.mark.parametrize("kind", [GramStatistic, SubspaceStatistic])
D, Q = 8, 3


def rows(n=40, seed=0):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def started(kind, **options):
    statistic = kind(D, Q, **options)
    statistic.accumulate_(rows())
    refresh_([statistic])
    statistic.accumulate_(rows(5, 1))
    return statistic


def same(one, other):
    a, b = one.state(), other.state()
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_goes_on_to_the_bit(kind, dtype):
    one, other = started(kind, dtype=dtype), kind(D, Q, dtype=dtype, seed=9)
    other.load_state_(one.state())
    assert same(one, other)
    for statistic in (one, other):
        statistic.accumulate_(rows(30, 2))
        refresh_([statistic])
        statistic.finish_()
    assert same(one, other)


@KINDS
def test_what_was_loaded_shares_no_memory(kind):
    one, other = started(kind), kind(D, Q)
    other.load_state_(one.state())
    other.accumulate_(rows(9, 3))
    assert same(one, started(kind))


@KINDS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"basis": torch.zeros(D, Q + 1)}, r"^state: expected basis torch\.float32 of shape \(8, 3\), got .* \(8, 4\)"),
        ({"basis": torch.zeros(D, Q, dtype=torch.float64)}, r"^state: expected basis torch\.float32 .*float64"),
        ({"basis": 3}, r"^state: expected basis torch\.float32 of shape \(8, 3\), got 3"),
        ({"square_sum": torch.tensor(float("nan"), dtype=torch.float64)}, r"^state: expected square_sum without NaN"),
        ({"num_rows": -1}, r"^state: expected num_rows int from 0 on, got -1"),
        ({"num_rows": 1.0}, r"^state: expected num_rows int .* got 1\.0"),
        ({"num_rows": True}, r"^state: expected num_rows int .* got True"),
        ({"num_rows": 2**70}, r"^state: expected num_rows int"),
        ({"shift": torch.zeros(D + 1)}, r"^state: expected shift None or torch\.float32 of sizes \[3, 8\]"),
        ({"shift": "mean"}, r"^state: expected shift None or"),
        ({"new": 1}, r"^state: expected the entries .*got .*'new'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_changes(kind, change, message):
    statistic = kind(D, Q)
    with pytest.raises(ValueError, match=message):
        statistic.load_state_({**started(kind).state(), **change})
    assert same(statistic, kind(D, Q))


@KINDS
def test_a_missing_entry_is_refused(kind):
    state = started(kind).state()
    del state["eigenvalues"]
    with pytest.raises(ValueError, match=r"^state: expected the entries"):
        kind(D, Q).load_state_(state)
