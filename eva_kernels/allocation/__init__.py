"""How one rank budget is divided between sites by the variance their components explain."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._build import use_core
from .demands import Demands, group_labels, integer, integers, matrix
from .majorant import concave_slopes
from .reference import ReferenceAllocator, most_of_group, site_multiples, whole_blocks
from .spending import Spending, spend_parameters

__all__ = ["Spending", "allocate_ranks", "candidate_components", "concave_slopes", "spend_parameters"]


def allocate_ranks(
    ratios: ArrayLike,  # (sites, k) real
    candidates: ArrayLike,  # (sites,) int
    budget: int,
    *,
    groups: ArrayLike | None = None,  # (sites,) int
    min_rank: int = 0,
    max_rank: int | None = None,
    rank_multiple: int = 1,
    divisors: ArrayLike | None = None,  # (sites,) int
    impl: str = "auto",
) -> NDArray[np.int64]:  # (sites,)
    """The ranks whose components explain the most variance among all that the budget and the bounds allow.

    Ties go to the higher ratio, then the lower component, then the lower site, on every platform: sites
    that share an input, and so have equal ratios, are served evenly. Derivation: the README beside this file.

    Args:
        ratios: explained-variance ratios, non-increasing along a row. Where noise lets a row rise, its
            running minimum is used: components are only ever taken in order. Entries beyond what a site
            may take are not read.
        candidates: how many components of each site are candidates; see :func:`candidate_components`.
        budget: Σ ranks. Reached exactly where it is a multiple of the step; otherwise Σ ranks is the
            largest sum below it that whole blocks can reach. Where neither ``max_rank`` nor a multiple is
            asked for and there are fewer candidates than budget, every candidate is taken.
        groups: equal labels mark sites that share one input; they raise their candidates to the group's
            maximum. Members may get different ranks.
        min_rank: least rank of every site, rounded up to the site's multiple.
        max_rank: largest rank of any site, rounded down to the site's multiple.
        rank_multiple: every rank is a multiple of it. Candidates are rounded down to it, but to no less than
            one block where there are any.
        divisors: of the rank of each site, for instance the number of tensor-parallel workers it is
            split over. A site's multiple is the least common multiple of this and ``rank_multiple``.
        impl: "core" (compiled), "reference" (NumPy), or "auto": core where it is built.

    Raises:
        ValueError: demands that cannot be met together, with the numbers; a ratio that is not finite; shapes
            that do not fit.
        TypeError: an argument of the wrong type.
        RuntimeError: ``impl="core"`` where the compiled module is not built.
    """
    demands = Demands.checked(candidates, budget, groups, min_rank, max_rank, rank_multiple, divisors)
    values = matrix("ratios", ratios, demands.candidates.size)
    core = use_core(impl)
    if core is not None:
        return core.allocate_ranks(values, **vars(demands))
    return ReferenceAllocator(demands).allocate(values)


def candidate_components(
    ranks: ArrayLike,  # (sites,) int
    rho: float,
    widths: ArrayLike | None = None,  # (sites,) int
    groups: ArrayLike | None = None,  # (sites,) int
    *,
    rank_multiple: int = 1,
    divisors: ArrayLike | None = None,  # (sites,) int
) -> NDArray[np.int64]:  # (sites,)
    """How many components of each site enter the allocation: round(rank · rho), halves to even.

    Never more than the input's width (``widths``), and, where ``groups`` marks sites that share one input,
    the maximum of the group (arXiv 2410.07170, section 3). Under ``rank_multiple`` and ``divisors`` (as in
    :func:`allocate_ranks`) whole blocks: rounded down, but to one block at least where the width has room.
    The result is what a collector must keep of each site.

    Raises:
        ValueError: ``rho`` below 1 or not finite, a negative rank, shapes that do not fit.
        TypeError: ranks, widths or groups that are not integers.
    """
    if not 1.0 <= rho < np.inf:
        raise ValueError(f"rho: expected a finite number of at least 1, got {rho}")
    configured = integers("ranks", ranks, at_least=0)
    sites = configured.size
    candidates = np.rint(configured * float(rho)).astype(np.int64)
    width = None if widths is None else integers("widths", widths, at_least=0, size=sites)
    if width is not None:
        candidates = np.minimum(candidates, width)
    if groups is not None:
        candidates = most_of_group(candidates, group_labels(groups, sites))
    multiple = site_multiples(
        integer("rank_multiple", rank_multiple, at_least=1),
        None if divisors is None else integers("divisors", divisors, at_least=1, size=sites),
        sites,
    )
    candidates = whole_blocks(candidates, multiple)
    return candidates if width is None else np.minimum(candidates, width // multiple * multiple)
