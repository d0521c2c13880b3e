"""What A of every layer captures of the rows it was made of, and what a device may cost of that."""

import torch

from support.bounds import UNIT_ROUNDOFF
from support.models import layer_inputs, scatter


def exactly(model, batches, rank):
    """Of every layer the scatter of its inputs, in float64, and the most that ``rank`` directions hold of it."""
    exact = {name: scatter(rows) for name, rows in layer_inputs(model, batches).items()}
    return {name: (c, torch.linalg.eigvalsh(c)[-rank:].sum()) for name, c in exact.items()}


def missed(matrices, exact):
    """Of the variance that A of each layer could capture, the share that it does not."""
    shares = []
    for name, a in matrices.items():
        covariance, best = exact[name]
        basis = torch.linalg.qr(a.cpu().double().T).Q
        shares.append(1 - float(torch.trace(basis.T @ covariance @ basis) / best))
    return shares


def lost_to_float32(covariance, best, rank):
    """What share of the variance rounding A loses at most. Rows that were orthonormal leave their span by u √r in norm,
    and |tr (P − P')C| ≤ ‖P − P'‖ ‖C‖, with projectors that are √2 times as far apart.
    """
    return (2 * rank) ** 0.5 * UNIT_ROUNDOFF[torch.float32] * float(covariance.norm() / best)


def require_as_much(ours, theirs, exact, rank):
    """A misses no more than twice what the same pass on the CPU misses, and what rounding loses."""
    assert ours.keys() == theirs.keys()
    for mine, its, layer in zip(missed(ours, exact), missed(theirs, exact), exact.values(), strict=True):
        assert mine <= 2 * its + lost_to_float32(*layer, rank)
