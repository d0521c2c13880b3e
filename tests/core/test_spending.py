"""Ranks for a budget of parameters, against all there are."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression

from eva_kernels.allocation import allocate_ranks, concave_slopes, spend_parameters


def best(ratios, costs, budget, multiple=1, least=0):
    """The most that any ranks within the budget explain, by trying all of them."""
    most = 0.0
    choices = [range(-(-least // multiple) * multiple, ratios.shape[1] // multiple * multiple + 1, multiple)] * len(
        costs
    )
    for ranks in itertools.product(*choices):
        if np.dot(ranks, costs) <= budget:
            most = max(most, sum(row[:rank].sum() for row, rank in zip(ratios, ranks, strict=True)))
    return most


def explained(ratios, ranks):
    return sum(row[:rank].sum() for row, rank in zip(ratios, ranks, strict=True))


@st.composite
def problems(draw, falls=True):
    sites, columns = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    entry = st.floats(0, 1) | st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.4])  # runs of equal means, too
    rows = draw(st.lists(st.lists(entry, min_size=columns, max_size=columns), min_size=sites, max_size=sites))
    costs = draw(st.lists(st.integers(1, 9), min_size=sites, max_size=sites))
    ratios = np.sort(np.array(rows))[:, ::-1] if falls else np.array(rows)
    return ratios, costs, draw(st.integers(0, 60)), draw(st.sampled_from([1, 2]))


@given(st.one_of(problems(), problems(falls=False)))
def test_it_is_an_optimum_or_says_how_far_it_may_be_from_one(problem):
    ratios, costs, budget, multiple = problem
    if multiple > ratios.shape[1]:
        return
    made = spend_parameters(ratios, np.full(len(costs), ratios.shape[1]), costs, budget, rank_multiple=multiple)
    most = best(ratios, costs, budget, multiple)
    assert made.spent == np.dot(made.ranks, costs) <= budget
    assert (made.ranks % multiple == 0).all()
    value = explained(ratios, made.ranks)
    assert value <= most + 1e-12
    assert most <= value + made.gap + 1e-12


@given(problems())
def test_where_all_cost_the_same_it_is_the_allocation_of_ranks(problem):
    ratios, _, budget, _ = problem
    candidates = np.full(len(ratios), ratios.shape[1])
    made = spend_parameters(ratios, candidates, np.full(len(ratios), 3), 3 * budget)
    assert made.gap == 0
    np.testing.assert_array_equal(made.ranks, allocate_ranks(ratios, candidates, budget))


def test_a_small_component_before_a_large_one_counts_with_it():
    """Only both can be had: 0.1 and 0.9 for two ranks are more than 0.4 and 0.3."""
    ratios = np.array([[0.1, 0.9, 0.05], [0.4, 0.3, 0.2]])
    made = spend_parameters(ratios, [3, 3], [7, 7], 2 * 7)
    assert (made.ranks.tolist(), made.gap) == ([2, 0], 0)
    broken = spend_parameters(ratios, [3, 3], [7, 7], 7)  # 0.1, where 0.4 would do
    assert broken.ranks.tolist() == [1, 0]
    assert broken.gap == pytest.approx(0.5 - 0.1)


@given(st.lists(st.floats(-1, 1) | st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.4]), max_size=9))
def test_slopes_are_those_of_isotonic_regression(values):
    """The nearest values that do not rise, in the mean square, have them, too (scikit-learn)."""
    slopes = concave_slopes(values)
    expected = IsotonicRegression(increasing=False).fit_transform(range(len(values)), values) if values else []
    np.testing.assert_allclose(slopes, expected, rtol=0, atol=1e-14)
    assert (np.diff(slopes) <= 0).all()
    falling = sorted(values, reverse=True)
    assert concave_slopes(falling).tolist() == falling


def test_wide_sites_get_fewer():
    ratios = np.tile([0.4, 0.3, 0.2, 0.1], (2, 1))
    assert spend_parameters(ratios, [4, 4], [1, 4], 9).ranks.tolist() == [4, 1]
    assert spend_parameters(ratios, [4, 4], [1, 1], 5).ranks.tolist() == [3, 2]


def test_bounds_hold_and_a_budget_below_them_is_an_error():
    ratios = np.array([[0.9, 0.8, 0.7], [0.1, 0.05, 0.01]])
    assert spend_parameters(ratios, [3, 3], [2, 5], 20, min_rank=1, max_rank=2).ranks.tolist() == [2, 2]
    with pytest.raises(ValueError, match="budget: expected at least the 7 parameters that min_rank 1 costs, got 6"):
        spend_parameters(ratios, [3, 3], [2, 5], 6, min_rank=1)
    with pytest.raises(ValueError, match="min_rank: expected at most the 3 components that site 0 may take, got 4"):
        spend_parameters(ratios, [3, 3], [2, 5], 60, min_rank=4)
    with pytest.raises(ValueError, match="ratios: expected at least 4 columns, got 3"):
        spend_parameters(ratios, [4, 3], [2, 5], 6)
    with pytest.raises(ValueError, match="costs: expected"):
        spend_parameters(ratios, [3, 3], [2, 0], 6)
