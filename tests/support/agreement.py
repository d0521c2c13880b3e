"""What two runs over the same rows agree in: to rounding, for any order of summation."""

import pytest
import torch

from eva_kernels._rows import CHUNK_ROWS
from eva_lora import EvaConfig, plan
from support.bounds import captured_by, likely, product_rounding, require_as_near
from support.models import captured_share, layer_inputs


def rounding_of_scatters(make, batches):
    """What share of its total the scatter of a layer's inputs may be off by: from rows that are off by twice as much as
    those of a float32 forward are, against those of a float64 one, and from sums of so many products.
    """
    exact, plain = (layer_inputs(model, batches) for model in (make().double(), make()))
    errors = {name: 2 * (plain[name] - x).norm() / (x - x.mean(0)).norm() for name, x in exact.items()}
    return max(
        float(2 * errors[name] + errors[name] ** 2) + product_rounding("reference", *x.shape)
        for name, x in exact.items()
    )


def require_same_rows(found, one):
    assert [i.num_rows for i in found.inputs] == [i.num_rows for i in one.inputs]
    assert [s.inputs for s in found.sites] == [s.inputs for s in one.sites]
    for mine, its in zip(one.inputs, found.inputs, strict=True):
        summed = CHUNK_ROWS * mine.components.shape[1]  # squares, in float32
        assert its.total_scatter == pytest.approx(mine.total_scatter, rel=2 * likely(summed))


def require_equal(found, one, rounding, moved=None):
    """Eigenvalues are equal to rounding, and, where ``moved`` is given, to what they are changed by in it."""
    require_same_rows(found, one)
    for mine, its, other in zip(one.inputs, found.inputs, (moved or one).inputs, strict=True):
        allowed = (mine.eigenvalues - other.eigenvalues).abs().max() + 2 * rounding * mine.total_scatter
        assert (its.eigenvalues - mine.eigenvalues).abs().max() <= allowed


def require_ranks_equal_but_for_ties(one, other):
    """A component is taken by one plan alone only if it is as near the cut as the runs' ratios allow: each of two
    numbers whose order differs may be off by as much as any differs between the runs.
    """
    ours, theirs = plan(one), plan(other)
    pairs = {name: (site, theirs.sites[name]) for name, site in ours.sites.items()}
    off = max(
        abs(a - b)
        for pair in pairs.values()
        for a, b in zip(*(site.explained_variance_ratio for site in pair), strict=True)
    )
    cut = sorted((r for s in ours.sites.values() for r in s.explained_variance_ratio), reverse=True)[ours.budget - 1]
    for name, (mine, its) in pairs.items():
        low, high = sorted((mine.rank, its.rank))
        assert all(abs(ratio - cut) <= 2 * off for ratio in mine.explained_variance_ratio[low:high]), name


def require_captured_as_well(found, one, scatters, rounding):
    """A of ``found`` misses at most twice of what that of ``one`` misses of these scatters, and what rounding loses."""
    ours, theirs = (plan(statistics, EvaConfig(rho=1.0)).lora_a for statistics in (one, found))
    for name, exact in scatters.items():
        missed, allowed = (1 - captured_share(a[name], exact) for a in (theirs, ours))
        assert missed <= 2 * allowed + 1 - captured_by(exact, len(ours[name]), rounding), name


def require_outputs_of_the_base(logits, make, batch):
    """As B is zero: to twice the error of a float32 forward, where another process runs another order of sums."""
    with torch.no_grad():
        plain, exact = (model.eval()(**batch).logits for model in (make(), make().double()))
    require_as_near(logits, plain, exact)
