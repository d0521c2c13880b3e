"""The sum in plain PyTorch, a few rows at a time."""

import math

import torch
from torch import Tensor

from .._double import double

PIECE = 2**17  # entries that are changed at a time: 1 MiB in float64, which a core's cache holds


class Scratch:
    """Memory in float64 for two pieces of a matrix, used again for all matrices: what is made for each, between tensors
    that stay, is never used again."""

    def __init__(self) -> None:
        self._of: dict[torch.device, Tensor] = {}

    def pieces(self, rows: int, columns: int, device: torch.device) -> Tensor:  # (2, rows, columns)
        size, held = 2 * rows * columns, self._of.get(device)
        if held is None or len(held) < size:
            held = self._of[device] = torch.empty(max(size, 2 * PIECE), dtype=torch.float64, device=device)
        return held[:size].view(2, rows, columns)


def add_reference(
    matrix: Tensor,  # (m, …)
    left: Tensor,  # (m, r) float64
    right: Tensor,  # (r, n) float64
    scratch: Scratch,
) -> tuple[float, float]:
    """The norms of the matrix as it was and of what is rounded off."""
    rows, norm, rounding = max(1, PIECE // max(1, right.shape[1])), 0.0, 0.0
    pieces = scratch.pieces(min(rows, len(left)), right.shape[1], left.device)
    done = 0
    try:
        for part, of_left in zip(torch.split(matrix, rows), torch.split(left, rows), strict=True):
            exact, there = pieces[:, : len(part)]
            exact.copy_(part.flatten(1))
            norm = math.hypot(norm, _norm(exact))
            exact.addmm_(of_left, right)
            part.copy_(exact.view(part.shape))
            done += len(part)
            there.copy_(part.flatten(1))
            rounding = math.hypot(rounding, _norm(exact.sub_(there)))
    except BaseException:
        back = double(matrix[:done]).flatten(1) - left[:done] @ right
        matrix[:done] = back.view(matrix[:done].shape).to(matrix)
        raise
    return norm, rounding


def _norm(x: Tensor) -> float:  # of contiguous memory
    return math.sqrt(float(torch.dot(x.view(-1), x.view(-1))))
