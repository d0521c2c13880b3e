"""Ours, its peers and the forward, timed in turn within one run, so that their ratios hold where times do not.

A shared machine is faster in one minute than in the next. Every round therefore times each candidate once, one
directly after another; a ratio is taken within its round, and its median and spread over the rounds are what is kept.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .machine import copy_rate, gemm_rate, synchronize
from .memory import allocated_peak, resident_peak

SLOW = 3.0  # seconds a call, from which on the first call is the only one
FEWEST_ROUNDS, MOST_ROUNDS, QUICK_ROUNDS = 5, 50, 3
VERY_SLOW = 10.0  # seconds of ours and its forward, from which on they are timed twice
BUDGET = 0.7  # seconds that each candidate may take in one case, about
COUNTED = 1.0  # seconds a call, up to which another call is made for an exact count of its memory
FLUSH_BYTES = 256 << 20  # written before every call on a GPU, so that its L2 cache holds nothing of ours


@dataclass(frozen=True)
class Candidate:
    """Something to time.

    Attributes:
        call: What is timed.
        errors: Its errors against float64, by what they are of; from a call of its own, outside the timing.
        long: Whether one call is a whole pass: its memory is then what the process grew by in the first call.
    """

    call: Callable[[], object]
    errors: Callable[[], Mapping[str, float]] | None = None
    long: bool = False


@dataclass(frozen=True)
class Case:
    """What is measured: the parts of a result that do not come from a clock.

    Attributes:
        group: The suite, as the report names it.
        name: Of the case within its suite.
        ours: The candidate all ratios are taken of.
        peers: By name.
        forward: What the same rows cost in the model's own forward, if there is such a thing; also the measure
            that later runs are compared by. None: there a square product of 512 in float32, the ruler, takes its
            place.
        forward_share: Which part of that forward ``forward`` is, where the whole would take too long; or what
            tells it once everything has been timed.
        flops: Of one call of ours.
        nbytes: That one call of ours has to move at least.
        dtype: Whose peak the FLOPs are compared with.
        facts: Anything else worth keeping.
    """

    group: str
    name: str
    ours: Candidate
    peers: Mapping[str, Candidate] = field(default_factory=dict)
    forward: Candidate | None = None
    forward_share: float | Callable[[], float] = 1.0
    flops: float | None = None
    nbytes: float | None = None
    dtype: torch.dtype = torch.float32
    facts: Mapping[str, Any] = field(default_factory=dict)


def percentile(sample: list[float], share: float) -> float:
    """Linearly interpolated."""
    ordered = sorted(sample)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def summary(sample: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile, and of how many."""
    return {
        "median": statistics.median(sample),
        "p10": percentile(sample, 0.1),
        "p90": percentile(sample, 0.9),
        "rounds": len(sample),
    }


class Pairing:
    """Times every candidate of a case but ours, once a round; ``seconds`` holds what came of it, round by round."""

    def __init__(self, case: Case, device: str, *, quick: bool) -> None:
        self.case, self.device = case, device
        self.others = dict(case.peers)
        self.measure = "forward" if case.forward else "ruler"
        self.others[self.measure] = case.forward or _square_product(device)
        self.memory: dict[str, int] = {}
        self.first = {name: self._first(name, other) for name, other in self.others.items()}
        self.first_of_ours = self._first("ours", case.ours)
        if quick:
            self.rounds = QUICK_ROUNDS
        else:
            pair = self.first_of_ours + self.first[self.measure]
            self.rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(2 * BUDGET / pair)))
            if pair > SLOW:
                self.rounds = QUICK_ROUNDS if pair < VERY_SLOW else 2
        self.seconds: dict[str, list[float | None]] = {name: [] for name in self.others}
        self._shuffled = random.Random(0)
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device != "cpu" else None

    def timed(self, call: Callable[[], object]) -> float:
        synchronize(self.device)
        start = time.perf_counter()
        call()
        synchronize(self.device)
        return time.perf_counter() - start

    def _first(self, name: str, candidate: Candidate) -> float:
        """Seconds of the first call, which warms up, and the memory by which the process grew."""
        if self.device != "cpu":
            candidate.call()  # compiles its kernels, which is no reason to call it slow
        seconds = 0.0

        def call() -> None:
            nonlocal seconds
            seconds = self.timed(candidate.call)

        if (peak := resident_peak(call, self.device)) is not None:
            self.memory[name] = peak
        return seconds

    def _wanted(self, name: str) -> int:
        """Rounds in which this candidate takes part: all of them, unless it is slow."""
        if name == self.measure:
            return self.rounds
        if self.first[name] > SLOW:
            return 0
        return max(QUICK_ROUNDS, min(self.rounds, int(BUDGET / self.first[name])))

    def others_once(self) -> None:
        """One round of all others, in an order drawn anew each time."""
        number = len(self.seconds[self.measure])
        names = list(self.others)
        self._shuffled.shuffle(names)
        for name in names:
            wanted = self._wanted(name)
            due = (number + 1) * wanted // self.rounds > number * wanted // self.rounds
            self.seconds[name].append(self.timed(self.others[name].call) if due else None)
            self._empty_cache()

    def _empty_cache(self) -> None:
        if self._flush is not None:
            self._flush.zero_()
            torch.cuda.synchronize()

    def results(self, ours: list[float]) -> dict[str, Any]:
        """Everything to keep, from the seconds of ours, round by round."""
        times, ratios = {"ours": summary(ours)}, {}
        for name, seconds in self.seconds.items():
            pairs = [(other, own) for other, own in zip(seconds, ours, strict=True) if other is not None]
            if pairs:
                taken = [other for other, _ in pairs]
                against = [other / own for other, own in pairs]
            else:  # too slow for rounds: its only call, against the median of ours
                taken = [self.first[name]]
                against = [self.first[name] / statistics.median(ours)]
            times[name], ratios[name] = summary(taken), summary(against)
        case, median = self.case, statistics.median(ours)
        share = case.forward_share() if callable(case.forward_share) else case.forward_share
        found: dict[str, Any] = {
            "group": case.group,
            "case": case.name,
            "device": self.device,
            "dtype": str(case.dtype).removeprefix("torch."),
            "seconds": times,
            "ratio": ratios,
            "forward_share": share,
            "errors": self._errors(),
            "memory": self._memory(),
            "facts": dict(case.facts),
        }
        if case.flops:
            found |= {"flops": case.flops, "of_peak": case.flops / median / gemm_rate(self.device, case.dtype)}
        if case.nbytes:
            found |= {"nbytes": case.nbytes, "of_bandwidth": case.nbytes / median / copy_rate(self.device)}
        return found

    def _errors(self) -> dict[str, dict[str, float]]:
        named = {"ours": self.case.ours, **self.case.peers}
        return {name: dict(one.errors()) for name, one in named.items() if one.errors is not None}

    def _memory(self) -> dict[str, int]:
        for name, one in {"ours": self.case.ours, **self.case.peers}.items():
            if not one.long and self.first.get(name, self.first_of_ours) <= COUNTED:
                self.memory[name] = allocated_peak(one.call, self.device)
        whole_forward = self.case.forward is not None and self.case.forward.long
        return {name: size for name, size in self.memory.items() if name != self.measure or whole_forward}


def _square_product(device: str) -> Candidate:
    a = torch.randn(512, 512, device=device)
    return Candidate(lambda: a @ a)
