"""Ranks for a budget of parameters, which cost more where layers are wide."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .demands import Demands, integer, integers, matrix
from .majorant import concave_slopes
from .reference import ReferenceAllocator, require_finite

__all__ = ["Spending", "spend_parameters"]


class Spending(NamedTuple):
    """The result of :func:`spend_parameters`.

    Attributes:
        ranks: (sites,).
        spent: Parameters that they take.
        gap: No ranks within the budget explain more than these by more than this; 0 where these are an optimum.
    """

    ranks: NDArray[np.int64]
    spent: int
    gap: float


def spend_parameters(
    ratios: ArrayLike,  # (sites, k) real
    candidates: ArrayLike,  # (sites,) int
    costs: ArrayLike,  # (sites,) int
    budget: int,
    *,
    min_rank: int = 0,
    max_rank: int | None = None,
    rank_multiple: int = 1,
    divisors: ArrayLike | None = None,  # (sites,) int
) -> Spending:
    """Ranks whose components explain much variance for the parameters that they cost.

    Whole blocks are taken by what they explain per parameter, the first that does not fit and all after it of its site
    being left; others that still fit are taken. A block that explains less than those after it counts with these, for
    their mean (:func:`~eva_kernels.allocation.concave_slopes`). That is an optimum where no such run is broken off, and
    all sites cost the same or the budget is spent to the last parameter when the first block is left. Else it lies
    between that and the optimum of the relaxed problem, which may take a part of that block (Dantzig 1957) and has the
    mean of a part of a run: ``gap`` is the distance between the two.

    Args:
        ratios: As in :func:`~eva_kernels.allocation.allocate_ranks`, but in any order.
        candidates, min_rank, max_rank, rank_multiple, divisors: As there.
        costs: Parameters for each unit of a site's rank.
        budget: Parameters there are to spend.

    Raises:
        ValueError, TypeError: as :func:`~eva_kernels.allocation.allocate_ranks`; or ``min_rank`` costs more than the
            budget.
    """
    budget = integer("budget", budget, at_least=0)
    demands = Demands.checked(candidates, 0, None, 0, max_rank, rank_multiple, divisors)
    sites = demands.candidates.size
    prices = integers("costs", costs, at_least=1, size=sites)
    bounds = ReferenceAllocator(demands)
    values = matrix("ratios", ratios, sites)
    lower = -(-integer("min_rank", min_rank, at_least=0) // bounds.multiple) * bounds.multiple
    if bool((lower > bounds.upper).any()):
        i = int(np.flatnonzero(lower > bounds.upper)[0])
        raise ValueError(
            f"min_rank: expected at most the {bounds.upper[i]} components that site {i} may take, got {min_rank}"
        )
    least = int((lower * prices).sum())
    if least > budget:
        raise ValueError(
            f"budget: expected at least the {least} parameters that min_rank {min_rank} costs, got {budget}"
        )
    if bounds.columns > values.shape[1]:
        raise ValueError(f"ratios: expected at least {bounds.columns} columns, got {values.shape[1]}")
    require_finite("ratios", values[:, : bounds.columns], np.arange(bounds.columns) < bounds.upper[:, None])
    worth, slope, site, index = _blocks(values, lower, bounds)
    price = (bounds.multiple * prices)[site]
    order = np.lexsort((site, index, -(slope / price)))
    ranks, left = lower.copy(), budget - least
    closed = np.zeros(sites, bool)
    relaxed = taken = explained = 0.0
    full = False
    for block in order.tolist():
        i, cost = site[block], int(price[block])
        if not full and cost > left:  # the first that does not fit: the relaxed problem takes a part of it
            full, relaxed = True, taken + slope[block] * left / cost
        if cost > left or closed[i]:
            closed[i] = True
            continue
        ranks[i] += bounds.multiple[i]
        left -= cost
        taken += slope[block]
        explained += worth[block]
    same = bool((price == price[0]).all()) if price.size else True
    gap = max(0.0, relaxed - taken) if full and not same else 0.0
    # What runs that are broken off have less than their means. One that is not has as much, to the rounding of sums.
    broken, rounding = taken - explained, 4 * len(order) * np.finfo(np.float64).eps * float(np.abs(worth).sum())
    return Spending(ranks, budget - left, gap + (broken if broken > rounding else 0.0))


def _blocks(
    values: NDArray[np.float64], lower: NDArray[np.int64], bounds: ReferenceAllocator
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """What each free block explains, and for what it counts; its site, and which block of the site it is."""
    worth, slopes, sites, indices = [], [], [], []
    for i in np.flatnonzero(lower < bounds.upper):
        multiple = bounds.multiple[i]
        row = values[i, lower[i] : bounds.upper[i]].reshape(-1, multiple).sum(1)
        worth.append(row)
        slopes.append(concave_slopes(row))
        sites.append(np.full(row.size, i))
        indices.append(np.arange(row.size) + lower[i] // multiple)
    if not worth:
        return np.zeros(0), np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64)
    return np.concatenate(worth), np.concatenate(slopes), np.concatenate(sites), np.concatenate(indices)
