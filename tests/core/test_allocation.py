"""Rank allocation against brute force, against exact dynamic programming, and against its twin."""

from fractions import Fraction
from itertools import product
from math import lcm
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from eva_kernels._build import build_info
from eva_kernels.allocation import allocate_ranks, candidate_components

CORE_BUILT = build_info()["core"] == "built"
IMPLS = ["reference", "core"] if CORE_BUILT else ["reference"]

Case = dict[str, Any]


def bounds(case: Case) -> list[tuple[int, int, int]] | None:
    """(lower, upper, multiple) of each site as the documentation has them, None where it promises an error."""
    candidates, groups = case["candidates"], case["groups"]
    result = []
    for i, own in enumerate(candidates):
        most = own if groups is None else max(c for c, g in zip(candidates, groups, strict=True) if g == groups[i])
        multiple = lcm(case["rank_multiple"], 1 if case["divisors"] is None else case["divisors"][i])
        upper = 0 if most == 0 else max(multiple, most - most % multiple)
        if case["max_rank"] is not None and upper > 0:
            upper = min(upper, case["max_rank"] - case["max_rank"] % multiple)
            if upper == 0:
                return None
        lower = case["min_rank"] + -case["min_rank"] % multiple
        if lower > upper:
            return None
        result.append((lower, upper, multiple))
    return result


def prefix_sums(row: list[float]) -> list[Fraction]:
    sums, least = [Fraction(0)], Fraction(row[0]) if row else Fraction(0)
    for value in row:
        least = min(least, Fraction(value))
        sums.append(sums[-1] + least)
    return sums


def best_by_total(ratios: list[list[float]], limits: list[tuple[int, int, int]]) -> dict[int, Fraction]:
    """For every reachable Σ ranks the largest explained variance: exact rationals, site by site."""
    best = {0: Fraction(0)}
    for row, (lower, upper, multiple) in zip(ratios, limits, strict=True):
        sums = prefix_sums(row)
        grown: dict[int, Fraction] = {}
        for total, value in best.items():
            for rank in range(lower, upper + 1, multiple):
                reached = value + sums[rank]
                if total + rank not in grown or reached > grown[total + rank]:
                    grown[total + rank] = reached
        best = grown
    return best


def assert_optimal(ratios: list[list[float]], case: Case, impl: str) -> None:
    def allocate() -> list[int]:
        return allocate_ranks(np.array(ratios), impl=impl, **case).tolist()

    limits = bounds(case)
    if limits is None:
        with pytest.raises(ValueError, match="expected"):
            allocate()
        return
    best = best_by_total(ratios, limits)
    reachable = [total for total in best if total <= case["budget"]]
    free = {multiple for lower, upper, multiple in limits if lower < upper}
    step = int(np.gcd.reduce(list(free))) if free else 1
    restricted = case["max_rank"] is not None or any(multiple > 1 for _, _, multiple in limits)
    least = sum(lower for lower, _, _ in limits)
    too_large = restricted and max(best) < case["budget"] - (case["budget"] - least) % step
    nothing_fits = bool(free) and reachable == [0] and case["budget"] > 0
    if not reachable or too_large or nothing_fits:
        with pytest.raises(ValueError, match="budget: expected"):
            allocate()
        return
    ranks = allocate()
    for rank, (lower, upper, multiple) in zip(ranks, limits, strict=True):
        assert lower <= rank <= upper
        assert rank % multiple == 0
    assert sum(ranks) == max(reachable)
    value = sum(prefix_sums(row)[rank] for row, rank in zip(ratios, ranks, strict=True))
    assert value == best[sum(ranks)]


@st.composite
def cases(draw: st.DrawFn, sites: int, columns: int, multiples: list[int]) -> tuple[list[list[float]], Case]:
    """Ratios in 64ths, so that every sum is exact, in rows that need not be sorted."""
    n = draw(st.integers(1, sites))
    candidates = draw(st.lists(st.integers(0, columns), min_size=n, max_size=n))
    width = 4 * columns  # room for one block of any multiple
    values = st.integers(0, 64).map(lambda v: v / 64)
    ratios = [draw(st.lists(values, min_size=width, max_size=width)) for _ in range(n)]
    if draw(st.booleans()):
        ratios = [sorted(row, reverse=True) for row in ratios]
    case = {
        "candidates": candidates,
        "budget": draw(st.integers(0, sum(candidates) + 2)),
        "groups": draw(st.none() | st.lists(st.integers(0, 2), min_size=n, max_size=n)),
        "min_rank": draw(st.sampled_from([0, 0, 0, 1, 2])),
        "max_rank": draw(st.none() | st.integers(1, columns)),
        "rank_multiple": draw(st.sampled_from([1, 1, 2, 3])),
        "divisors": draw(st.none() | st.lists(st.sampled_from(multiples), min_size=n, max_size=n)),
    }
    return ratios, case


@settings(max_examples=200, deadline=None)
@given(cases(sites=4, columns=6, multiples=[1, 2, 3, 4]))
def test_optimal_on_small_cases(case: tuple[list[list[float]], Case]) -> None:
    for impl in IMPLS:
        assert_optimal(*case, impl)


@settings(max_examples=20, deadline=None)
@given(cases(sites=14, columns=24, multiples=[2, 3, 5, 8]))
def test_optimal_where_divisors_differ(case: tuple[list[list[float]], Case]) -> None:
    for impl in IMPLS:
        assert_optimal(*case, impl)


def test_dynamic_programming_of_these_tests_equals_enumeration() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        ratios = (rng.integers(0, 64, (3, 6)) / 64).tolist()
        limits = [(int(m) * int(rng.integers(0, 2)), int(m) * 2, int(m)) for m in rng.integers(1, 4, 3)]
        best: dict[int, Fraction] = {}
        for ranks in product(*(range(lower, upper + 1, m) for lower, upper, m in limits)):
            value = sum((prefix_sums(row)[rank] for row, rank in zip(ratios, ranks, strict=True)), Fraction(0))
            best[sum(ranks)] = max(best.get(sum(ranks), value), value)
        assert best == best_by_total(ratios, limits)


@pytest.mark.parametrize("multiple", [1, 2, 3])
def test_ties_go_to_the_higher_ratio_then_the_lower_component_then_the_lower_site(impl: str, multiple: int) -> None:
    rng = np.random.default_rng(multiple)
    for _ in range(100):
        sites, blocks = int(rng.integers(1, 7)), int(rng.integers(1, 6))
        ratios = -np.sort(-rng.integers(0, 3, (sites, blocks * multiple)) / 4.0, axis=1)
        values = ratios.reshape(sites, blocks, multiple).sum(axis=2)
        order = sorted(product(range(sites), range(blocks)), key=lambda at: (-values[at], at[1], at[0]))
        count = int(rng.integers(1, len(order) + 1))
        expected = [multiple * sum(site == s for site, _ in order[:count]) for s in range(sites)]
        candidates = [blocks * multiple] * sites
        ranks = allocate_ranks(ratios, candidates, count * multiple, rank_multiple=multiple, impl=impl)
        assert ranks.tolist() == expected


def test_sites_with_equal_ratios_are_served_evenly(impl: str) -> None:
    row = 0.5 ** np.arange(8)
    ranks = allocate_ranks(np.tile(row, (3, 1)), [8, 8, 8], 11, groups=[5, 5, 5], impl=impl)
    assert ranks.tolist() == [4, 4, 3]


def test_greedy_by_density_would_miss_the_optimum(impl: str) -> None:
    ratios = [[0.5, 0.3, 0.02, 0.01], [0.25, 0.24, 0.23, 0.22]]
    assert allocate_ranks(ratios, [4, 4], 4, divisors=[2, 4], impl=impl).tolist() == [0, 4]


def test_equal_sums_go_to_the_smaller_multiple(impl: str) -> None:
    ratios = [[0.25, 0.25, 0.25, 0.25], [0.25, 0.25, 0.25, 0.25]]
    assert allocate_ranks(ratios, [4, 4], 4, divisors=[4, 2], impl=impl).tolist() == [0, 4]


@pytest.mark.parametrize("rho", [1.0, 1.2, 2.0, 3.0])
def test_budget_is_spent_exactly(impl: str, rho: float) -> None:
    rng = np.random.default_rng(0)
    configured = rng.integers(1, 17, 50)
    candidates = candidate_components(configured, rho)
    ratios = -np.sort(-rng.random((50, 48)), axis=1)
    ranks = allocate_ranks(ratios, candidates, int(configured.sum()), impl=impl)
    assert ranks.sum() == configured.sum()
    assert (ranks <= candidates).all()
    if rho == 1.0:
        assert (ranks == configured).all()


def test_budget_between_multiples_is_rounded_down(impl: str) -> None:
    ratios = [[0.4, 0.3, 0.2, 0.1]] * 3
    assert allocate_ranks(ratios, [4] * 3, 7, rank_multiple=2, impl=impl).tolist() == [2, 2, 2]


def test_every_candidate_is_given_where_there_are_too_few(impl: str) -> None:
    assert allocate_ranks([[0.5, 0.5], [1.0, 0.0]], [2, 1], 9, impl=impl).tolist() == [2, 1]


def test_a_multiple_beyond_the_candidates_leaves_one_block(impl: str) -> None:
    ratios = [[0.5, 0.2, 0.1, 0.1], [0.4, 0.1, 0.1, 0.1]]
    assert allocate_ranks(ratios, [3, 0], 4, rank_multiple=4, impl=impl).tolist() == [4, 0]


def test_groups_raise_candidates_to_their_maximum(impl: str) -> None:
    ratios = [[0.5, 0.4, 0.3, 0.2], [0.5, 0.4, 0.3, 0.2], [0.1, 0.1, 0.1, 0.1]]
    assert allocate_ranks(ratios, [1, 4, 4], 6, impl=impl).tolist() == [1, 4, 1]
    assert allocate_ranks(ratios, [1, 4, 4], 6, groups=[7, 7, 0], impl=impl).tolist() == [3, 3, 0]


def test_what_lies_beyond_the_candidates_is_not_read(impl: str) -> None:
    ratios = [[0.5, np.nan, np.inf], [0.5, 0.4, np.nan]]
    assert allocate_ranks(ratios, [1, 2], 2, impl=impl).tolist() == [1, 1]


def test_a_row_that_rises_counts_as_its_running_minimum(impl: str) -> None:
    assert allocate_ranks([[0.1, 0.9], [0.2, 0.15]], [2, 2], 2, impl=impl).tolist() == [0, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_rank": 3, "max_rank": 2}, "max_rank: expected at least min_rank 3, got 2"),
        ({"min_rank": 5}, "min_rank: expected at most the 4 components that site 0 may take, got 5"),
        ({"min_rank": 3, "rank_multiple": 2, "max_rank": 3}, r"got 3 \(4 in steps of 2\)"),
        ({"max_rank": 2, "divisors": [1, 3]}, "max_rank: expected at least one block of 3 components at site 1, got 2"),
        ({"min_rank": 4, "budget": 7}, "budget: expected at least the 8 components that min_rank 4 gives to 2 sites"),
        ({"max_rank": 2}, "budget: expected at most the 4 components that max_rank, .* leave to 2 sites, got 6"),
        ({"rank_multiple": 3, "budget": 8}, None),
        ({"rank_multiple": 4, "budget": 3}, "budget: expected at least one block of 4 components, got 3"),
        ({"candidates": [9, 4]}, "ratios: expected at least the 9 columns that site 0 may take, got 4"),
    ],
)
def test_demands_that_cannot_be_met_are_errors_with_the_numbers(
    impl: str, arguments: Case, message: str | None
) -> None:
    case = {"candidates": [4, 4], "budget": 6, **arguments}
    if message is None:
        assert allocate_ranks(np.ones((2, 4)), impl=impl, **case).tolist() == [3, 3]
        return
    with pytest.raises(ValueError, match=message):
        allocate_ranks(np.ones((2, 4)), impl=impl, **case)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_ratios_that_are_not_finite_are_errors_with_their_place(impl: str, value: float) -> None:
    ratios = np.ones((3, 4))
    ratios[1, 2] = value
    with pytest.raises(ValueError, match=f"ratios: expected finite numbers, got {value} at site 1, component 2"):
        allocate_ranks(ratios, [4, 4, 4], 4, impl=impl)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ratios": np.ones(3)}, ValueError, r"ratios: expected shape \(2, k\), got \(3,\)"),
        ({"ratios": [["a"], ["b"]]}, TypeError, "ratios: expected real numbers"),
        ({"candidates": [1.0, 2.0]}, TypeError, "candidates: expected integers, got float64"),
        ({"candidates": [1, -2]}, ValueError, "candidates: expected integers from 0 to .*, got -2"),
        ({"candidates": [[1, 2]]}, ValueError, "candidates: expected one integer per site"),
        ({"budget": 2.0}, TypeError, "budget: expected an integer, got float"),
        ({"budget": -1}, ValueError, "budget: expected an integer from 0"),
        ({"min_rank": True}, TypeError, "min_rank: expected an integer, got bool"),
        ({"rank_multiple": 0}, ValueError, "rank_multiple: expected an integer from 1"),
        ({"divisors": [1]}, ValueError, r"divisors: expected shape \(2,\), got shape \(1,\)"),
        ({"divisors": [1, 0]}, ValueError, "divisors: expected integers from 1"),
        ({"groups": [1, 2, 3]}, ValueError, r"groups: expected shape \(2,\)"),
        ({"impl": "triton"}, ValueError, "impl: expected 'auto', 'core' or 'reference', got 'triton'"),
    ],
)
def test_bad_arguments_are_named(arguments: Case, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        allocate_ranks(**{"ratios": np.ones((2, 4)), "candidates": [4, 4], "budget": 4, **arguments})


@pytest.mark.skipif(not CORE_BUILT, reason="eva_kernels._core is not built")
@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sites=st.integers(1, 200),
    columns=st.integers(1, 64),
    levels=st.sampled_from([2, 5, 10**9]),
    multiple=st.sampled_from([1, 1, 2, 4]),
    divisors=st.sampled_from([None, [1], [1, 2], [2, 3, 4], [1, 7, 8]]),
    grouped=st.booleans(),
    share=st.floats(0.0, 1.1),
)
def test_core_equals_reference(
    seed: int,
    sites: int,
    columns: int,
    levels: int,
    multiple: int,
    divisors: list[int] | None,
    grouped: bool,
    share: float,
) -> None:
    rng = np.random.default_rng(seed)
    ratios = rng.integers(0, levels, (sites, columns + 64)) / levels
    if seed % 2:
        ratios = -np.sort(-ratios, axis=1)
    candidates = rng.integers(0, columns + 1, sites)
    case: Case = {
        "candidates": candidates,
        "budget": int(candidates.sum() * share),
        "groups": rng.integers(0, sites, sites) if grouped else None,
        "min_rank": int(rng.integers(0, 2)),
        "max_rank": None if seed % 3 else int(rng.integers(1, columns + 1)),
        "rank_multiple": multiple,
        "divisors": None if divisors is None else rng.choice(divisors, sites),
    }
    outcomes: list[NDArray[np.int64] | str] = []
    for impl in ("core", "reference"):
        try:
            outcomes.append(allocate_ranks(ratios, impl=impl, **case))
        except ValueError as error:
            outcomes.append(str(error))
    np.testing.assert_array_equal(*outcomes)


def test_candidates_are_rounded_half_to_even_and_bounded() -> None:
    assert candidate_components([1, 3, 5, 16], 1.5).tolist() == [2, 4, 8, 24]
    assert candidate_components([1, 3, 5, 16], 1.5, widths=[9, 9, 6, 20]).tolist() == [2, 4, 6, 20]
    assert candidate_components([4, 8, 8], 2.0, groups=[3, 3, 9]).tolist() == [16, 16, 16]
    assert candidate_components([4, 8, 8], 1.0, [4, 6, 64], rank_multiple=3, divisors=[1, 2, 4]).tolist() == [3, 6, 12]
    assert candidate_components([4, 4], 1.0, [4, 16], rank_multiple=8).tolist() == [0, 8]
    ranks = np.arange(200)
    for rho in (1.0, 1.2, 1.25, 2.5, 3.0):
        assert candidate_components(ranks, rho).tolist() == [round(int(r) * rho) for r in ranks]


@pytest.mark.parametrize("rho", [0.5, np.nan, np.inf])
def test_rho_out_of_range_is_an_error(rho: float) -> None:
    with pytest.raises(ValueError, match="rho: expected a finite number of at least 1"):
        candidate_components([4], rho)
