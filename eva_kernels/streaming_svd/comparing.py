"""Bases before and after a refresh, compared on a CUDA device in one launch for all statistics: csrc/cuda."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._build import cuda_state
from .._workspace import workspace_of
from ..convergence import MAX_COLUMNS, BasisComparison


def comparison_runs(bases: Sequence[Tensor]) -> bool:  # (d, q) each
    """Whether there is compiled code for these bases on their device."""
    device = bases[0].device
    if device.type != "cuda" or cuda_state().devices <= (device.index or 0):
        return False
    return all(basis.dtype == torch.float32 and basis.shape[1] <= MAX_COLUMNS for basis in bases)


def start_comparison(
    previous: Sequence[Tensor],  # (d, q) float32 each, all on one CUDA device
    current: Sequence[Tensor],  # of the same shapes
) -> BasisComparison:
    """Compare every two bases, behind what the current stream does; whoever has waited for it since has the result.

    What it takes is made once for these shapes, and kept with the scratch memory of this thread's kernels.
    """
    device, shapes = current[0].device, [(basis.shape[0], basis.shape[1]) for basis in current]
    stream = torch.cuda.current_stream(device).cuda_stream
    workspace = workspace_of(device, stream)
    key = "comparison", *shapes
    comparison: BasisComparison | None = workspace.plans.get(key)
    if comparison is None:
        comparison = BasisComparison(shapes, impl="cuda", device=device.index or 0)
        workspace.keep(key, comparison)
    comparison.start(previous, current, stream=stream)
    return comparison
