"""Rank allocation in NumPy: the specification that the compiled module must equal, integer for integer."""

from dataclasses import dataclass
from math import gcd

import numpy as np
from numpy.typing import NDArray

from .demands import Demands

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Blocks:
    """The free blocks of all sites with one multiple, best first; rank grows by whole blocks."""

    multiple: int
    sites: Integers  # (blocks,) the site of each block
    values: Floats  # (blocks,) sum of the block's ratios, non-increasing


class ReferenceAllocator:
    """Bounds of every site, found once, and the allocation under them.

    Raises:
        ValueError: the demands cannot be met together; the message gives the numbers.
    """

    def __init__(self, demands: Demands) -> None:
        candidates = demands.candidates
        sites = candidates.size
        if demands.groups is not None:
            candidates = most_of_group(candidates, demands.groups)
        minimum, maximum, budget = demands.min_rank, demands.max_rank, demands.budget
        if maximum is not None and minimum > maximum:
            raise ValueError(f"max_rank: expected at least min_rank {minimum}, got {maximum}")

        self.multiple = site_multiples(demands.rank_multiple, demands.divisors, sites)
        self.lower = -(-minimum // self.multiple) * self.multiple
        self.upper = whole_blocks(candidates, self.multiple)
        if maximum is not None:
            self.upper = np.minimum(self.upper, maximum // self.multiple * self.multiple)
        for i in range(sites):
            if maximum is not None and candidates[i] > 0 and self.upper[i] == 0:
                raise ValueError(
                    f"max_rank: expected at least one block of {self.multiple[i]} components at site {i}, got {maximum}"
                )
            if self.lower[i] > self.upper[i]:
                raise ValueError(
                    f"min_rank: expected at most the {self.upper[i]} components that site {i} may take, "
                    f"got {minimum} ({self.lower[i]} in steps of {self.multiple[i]})"
                )
        self.columns = int(self.upper.max(initial=0))

        least, most = int(self.lower.sum()), int(self.upper.sum())
        if least > budget:
            raise ValueError(
                f"budget: expected at least the {least} components that min_rank {minimum} gives to {sites} "
                f"sites, got {budget}"
            )
        self.multiples = np.unique(self.multiple[self.lower < self.upper]).tolist()
        self.unit = gcd(*self.multiples) or 1
        self.free_units = (budget - least) // self.unit
        if self.free_units * self.unit > most - least:
            if maximum is not None or bool((self.multiple > 1).any()):
                raise ValueError(
                    f"budget: expected at most the {most} components that max_rank, rank_multiple and "
                    f"divisors leave to {sites} sites, got {budget}"
                )
            self.free_units = (most - least) // self.unit
        if budget > 0 and least == 0 and most > 0 and self.multiples[0] > budget:
            raise ValueError(f"budget: expected at least one block of {self.multiples[0]} components, got {budget}")

    def allocate(self, ratios: Floats) -> Integers:
        """Ranks (sites,) for ``ratios`` (sites, ≥ columns).

        Raises:
            ValueError: too few columns, or a ratio that is read is not finite.
        """
        short = np.flatnonzero(self.upper > ratios.shape[1])
        if short.size:
            raise ValueError(
                f"ratios: expected at least the {self.upper[short[0]]} columns that site {short[0]} may "
                f"take, got {ratios.shape[1]}"
            )
        require_finite("ratios", ratios[:, : self.columns], np.arange(self.columns) < self.upper[:, None])
        classes = [self._blocks(ratios, multiple) for multiple in self.multiples]
        alone = len(classes) == 1
        counts = [self.free_units] if alone else split_between(classes, self.unit, self.free_units)
        ranks = self.lower.copy()
        for blocks, count in zip(classes, counts, strict=True):
            np.add.at(ranks, blocks.sites[:count], blocks.multiple)
        return ranks

    def _blocks(self, ratios: Floats, multiple: int) -> Blocks:
        sites, indices, values = [], [], []
        for i in np.flatnonzero((self.multiple == multiple) & (self.lower < self.upper)):
            # The running minimum: noise must not make a row rise, for components are only taken in order.
            row = np.minimum.accumulate(ratios[i, : self.upper[i]])[self.lower[i] :].reshape(-1, multiple)
            values.append(np.add.accumulate(row, axis=1)[:, -1])
            indices.append(np.arange(row.shape[0]) + self.lower[i] // multiple)
            sites.append(np.full(row.shape[0], i))
        site, value = np.concatenate(sites), np.concatenate(values)
        best_first = np.lexsort((site, np.concatenate(indices), -value))
        return Blocks(multiple, site[best_first], value[best_first])


def most_of_group(candidates: Integers, groups: Integers) -> Integers:
    """Each site's candidates raised to the maximum of its group."""
    most = np.zeros(candidates.size, np.int64)
    np.maximum.at(most, groups, candidates)
    return most[groups]


def site_multiples(rank_multiple: int, divisors: Integers | None, sites: int) -> Integers:
    """What each site's rank must be a multiple of."""
    if divisors is None:
        return np.full(sites, rank_multiple)
    return np.lcm(rank_multiple, divisors)


def whole_blocks(candidates: Integers, multiple: Integers) -> Integers:
    """Candidates rounded down to the multiple, but to one block at least where there are any."""
    return np.maximum(candidates // multiple, candidates > 0) * multiple


def split_between(classes: list[Blocks], unit: int, free_units: int) -> list[int]:
    """How many blocks each class gets where multiples differ: greedy by value per component, then a knapsack
    over the few blocks by which an optimum can differ from it (see the README)."""
    if not classes:
        return []
    weights = [blocks.multiple // unit for blocks in classes]
    greedy, used = [0] * len(classes), 0
    while True:
        open_classes = [c for c, blocks in enumerate(classes) if greedy[c] < blocks.values.size]
        best = max(open_classes, key=lambda c: classes[c].values[greedy[c]] / weights[c], default=None)
        if best is None or used + weights[best] > free_units:
            break
        greedy[best] += 1
        used += weights[best]

    window = 2 * weights[-1]
    first = [max(0, greedy[c] - window) for c in range(len(classes))]
    last = [min(blocks.values.size, greedy[c] + window) for c, blocks in enumerate(classes)]
    room = free_units - sum(w * f for w, f in zip(weights, first, strict=True))
    value = np.full(room + 1, -np.inf)  # best gain over the greedy choice, by units above all of `first`
    value[0] = 0.0
    choices = []
    for c, blocks in enumerate(classes):
        gains = {greedy[c]: 0.0}  # summed outwards from the greedy choice
        for t in range(greedy[c], last[c]):
            gains[t + 1] = gains[t] + blocks.values[t]
        for t in range(greedy[c], first[c], -1):
            gains[t - 1] = gains[t] - blocks.values[t - 1]
        best_value, choice = np.full(room + 1, -np.inf), np.zeros(room + 1, np.int64)
        for t in range(first[c], last[c] + 1):
            step = weights[c] * (t - first[c])
            if step > room:
                break
            candidate = value[: room + 1 - step] + gains[t]
            better = candidate > best_value[step:]
            best_value[step:][better] = candidate[better]
            choice[step:][better] = t
        value = best_value
        choices.append(choice)
    units = int(np.flatnonzero(value > -np.inf)[-1])
    counts = []
    for c in reversed(range(len(classes))):
        counts.append(int(choices[c][units]))
        units -= weights[c] * (counts[-1] - first[c])
    return counts[::-1]


def require_finite(name: str, values: Floats, read: NDArray[np.bool_]) -> None:
    """Raises ValueError naming the site and the component of the first NaN or infinity that is read."""
    wrong = np.argwhere(read & ~np.isfinite(values))
    if wrong.size:
        site, component = wrong[0]
        raise ValueError(
            f"{name}: expected finite numbers, got {values[site, component]} at site {site}, component {component}"
        )
