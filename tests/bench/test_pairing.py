"""Candidates are timed in turn, ratios are taken round by round, and everything beside the time is kept."""

import math

import numpy as np
import pytest
import torch

from harness import paired
from harness.memory import allocated_peak, resident_peak
from harness.paired import Candidate, Case, Pairing, summary


class Clock:
    """A machine whose speed changes from round to round, and whose candidates cost what they are told to."""

    def __init__(self):
        self.now, self.speed, self.calls = 0.0, 1.0, []

    def candidate(self, name, cost, **options):
        def call():
            self.now += cost * self.speed
            self.calls.append(name)

        return Candidate(call, **options)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(paired.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(paired, "gemm_rate", lambda device, dtype: 1e9)
    monkeypatch.setattr(paired, "copy_rate", lambda device: 1e8)
    return clock


def measured(clock, case, *, quick=False, speeds=None):
    pairing = Pairing(case, "cpu", quick=quick)
    ours = []
    for number in range(pairing.rounds):
        clock.speed = speeds[number % len(speeds)] if speeds else 1.0
        pairing.others_once()
        ours.append(pairing.timed(case.ours.call))
    return pairing, pairing.results(ours)


def test_ratios_hold_where_times_do_not(clock):
    """The machine is three times as slow in every second round: the ratios do not notice."""
    case = Case("g", "c", clock.candidate("ours", 0.01), {"peer": clock.candidate("peer", 0.03)},
                clock.candidate("forward", 0.02), flops=5e6, nbytes=1e6)  # fmt: skip
    _, found = measured(clock, case, speeds=[1.0, 3.0])
    assert found["ratio"]["peer"]["median"] == pytest.approx(3)
    assert found["ratio"]["forward"]["median"] == pytest.approx(2)
    assert found["ratio"]["peer"]["p90"] == pytest.approx(3)
    assert found["seconds"]["ours"]["p90"] == pytest.approx(0.03)
    median = found["seconds"]["ours"]["median"]
    assert found["of_peak"] == pytest.approx(5e6 / median / 1e9)
    assert found["of_bandwidth"] == pytest.approx(1e6 / median / 1e8)


def test_every_round_calls_everybody_once_in_changing_order(clock):
    peers = {name: clock.candidate(name, 0.01) for name in "abc"}
    pairing, _ = measured(clock, Case("g", "c", clock.candidate("ours", 0.01), peers, clock.candidate("f", 0.01)))
    rounds = "".join(name for name in clock.calls if name in peers)[3:][: 3 * pairing.rounds]  # after the first calls
    orders = {rounds[i : i + 3] for i in range(0, len(rounds), 3)}
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(orders) > 1


def test_a_peer_that_takes_too_long_is_called_once(clock):
    peers = {"slow": clock.candidate("slow", 10.0)}
    case = Case("g", "c", clock.candidate("ours", 1.0), peers, clock.candidate("forward", 1.0))
    _, found = measured(clock, case)
    assert clock.calls.count("slow") == 1
    assert found["ratio"]["slow"] == {"median": 10.0, "p10": 10.0, "p90": 10.0, "rounds": 1}
    assert "slow" in found["memory"]  # read during that call


def test_errors_come_from_the_candidates(clock):
    case = Case("g", "c", clock.candidate("ours", 0.01, errors=lambda: {"gram": 1e-7}),
                {"peer": clock.candidate("peer", 0.01)}, clock.candidate("forward", 0.01))  # fmt: skip
    _, found = measured(clock, case, quick=True)
    assert found["errors"] == {"ours": {"gram": 1e-7}}


def test_percentiles_are_interpolated():
    sample = [float(i) for i in range(1, 12)]
    assert summary(sample[::-1]) == {"median": 6, "p10": 2, "p90": 10, "rounds": 11}
    values = np.random.default_rng(0).normal(size=37) ** 2
    assert summary(list(values))["p90"] == pytest.approx(np.percentile(values, 90))


def test_peaks_of_memory():
    x = torch.randn(512, 512)
    product = allocated_peak(lambda: x @ x, "cpu")
    assert 4 * 512 * 512 <= product < 5 * 512 * 512
    assert allocated_peak(lambda: (x @ x) @ (x @ x), "cpu") >= 3 * 4 * 512 * 512
    assert allocated_peak(lambda: np.ones((512, 512)), "cpu") >= 8 * 512 * 512
    resident = resident_peak(lambda: torch.ones(1 << 24), "cpu")
    assert resident is None or math.isclose(resident, 1 << 26, rel_tol=0.1)
