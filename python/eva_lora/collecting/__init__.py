"""The pass: forwards of the frozen model over batches, until every layer's statistic says enough.

Knows models, batches, hooks and statistics; does not know what becomes of them. One activation's way through it:
:mod:`.capture` (a hook takes it, once for all layers that share it) → :mod:`.batches` (which of its rows count) → its
statistic → :mod:`.run` (refresh, after the forward) → :mod:`.convergence` (converged?) → :mod:`.closing` (the result).
"""

from .batches import ForwardFn
from .estimating import Estimate, estimate, matmul_rate
from .gradients import Asked, GradientPasses, LossFn, gradient_batches
from .masks import RowMaskFn
from .own_forwards import collect_calls
from .passing import collect, collect_with
from .visiting import Change, LowRankChange, Visits, own
from .watcher import Watch, watching

__all__ = [
    "Asked",
    "Change",
    "Estimate",
    "ForwardFn",
    "GradientPasses",
    "LossFn",
    "LowRankChange",
    "RowMaskFn",
    "Visits",
    "Watch",
    "collect",
    "collect_calls",
    "collect_with",
    "estimate",
    "gradient_batches",
    "matmul_rate",
    "own",
    "watching",
]
