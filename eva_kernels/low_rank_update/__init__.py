"""A matrix of low rank added to another, in place, and what the other's dtype rounds off of the sum."""

import math

import torch
from torch import Tensor

from .._double import home_of
from .core import add_core, core_runs
from .reference import Scratch, add_reference

__all__ = ["Scratch", "add_low_rank_"]


def add_low_rank_(
    matrix: Tensor,  # (m, …) floating point; what follows is taken for n columns
    left: Tensor,  # (m, r) float64, on the device where the matrix's float64 is
    right: Tensor,  # (r, n) float64, likewise
    *,
    scratch: Scratch | None = None,
    impl: str = "auto",
) -> float:
    """``matrix`` becomes ``matrix + left @ right``, summed in float64 and rounded once. All of it, or nothing but a
    rounding.

    Args:
        scratch: One for many matrices. None: memory of its own.
        impl: "auto"; "core", the compiled code for a CPU; or "reference".

    Returns:
        The Frobenius norm of what the matrix's dtype rounds off, over that of the matrix as it was. 0 for zeros.

    Raises:
        TypeError: another dtype.
        ValueError: shapes that do not fit, another ``impl``, or another device.
        RuntimeError: "core" cannot be had, or does not take the matrix.
    """
    if not matrix.is_floating_point() or matrix.ndim < 2:
        raise TypeError(f"matrix: expected floating point, (m, …), got {matrix.dtype}, {tuple(matrix.shape)}")
    m, n, home = len(matrix), math.prod(matrix.shape[1:]), home_of(matrix.device)
    for name, factor, shape in (("left", left, (m, right.shape[0])), ("right", right, (left.shape[-1], n))):
        if factor.dtype != torch.float64:
            raise TypeError(f"{name}: expected float64, got {factor.dtype}")
        if factor.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(factor.shape)}")
        if factor.device != home:
            raise ValueError(f"{name}: expected it on {home}, got {factor.device}")
    if core_runs(matrix, left, impl):
        norm, rounding = add_core(matrix, left, right)
    else:
        norm, rounding = add_reference(matrix, left, right, scratch or Scratch())
    return rounding / norm if norm > 0 else 0.0
