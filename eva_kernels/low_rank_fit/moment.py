"""The second moment of a layer's inputs, in parts: never a square matrix."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._double import double

__all__ = ["SecondMoment"]


class SecondMoment(NamedTuple):
    """R = F Fᵀ + diag(t) of inputs in ℝⁿ, which is never made: E[x xᵀ], not centred, most often.

    Attributes:
        factor: F, (n, k); k may be 0.
        rest: t ≥ 0, (n,), or () for the same everywhere.
    """

    factor: Tensor
    rest: Tensor

    def times(self, z: Tensor) -> Tensor:  # (..., n, c) -> (..., n, c)
        """R z."""
        rest = self.rest[:, None] if self.rest.ndim else self.rest
        return self.factor @ (self.factor.mT @ z) + rest * z

    def energy(
        self,
        matrix: Tensor,  # (..., m, n)
        product: Tensor | None = None,  # (..., m, k)
    ) -> Tensor:  # (...) float64
        """tr(M R Mᵀ): the mean of ‖M x‖² over the inputs. ``product``: M F, where it is known."""
        squares = double(matrix @ self.factor if product is None else product).square().sum((-2, -1))
        # Norms of columns only where they differ in weight: those of rows are in one piece, and ten times as fast.
        norms = torch.linalg.vector_norm(matrix, dim=-2 if self.rest.ndim else -1)  # without a copy of the matrix
        return squares + (double(norms).square() * double(self.rest)).sum(-1)

    def trace(self) -> float:
        """tr R: the mean of ‖x‖²."""
        rest = double(self.rest).expand(len(self.factor)).sum()
        return float(double(self.factor).square().sum() + rest)
