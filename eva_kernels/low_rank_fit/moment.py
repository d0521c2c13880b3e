"""The second moment of a layer's inputs, in parts: never a square matrix."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._double import double, like
from ..symmetric_eigen import symmetric_eigen

__all__ = ["PrincipalMoment", "SecondMoment", "principal_moment"]


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
        return ((z.mT @ self.factor) @ self.factor.mT).mT + rest * z

    def energy(
        self,
        matrix: Tensor,  # (..., m, n)
        product: Tensor | None = None,  # (..., m, k)
    ) -> Tensor:  # (...) float64
        """tr(M R Mᵀ): the mean of ‖M x‖² over the inputs. ``product``: M F, where it is known."""
        product = matrix @ self.factor if product is None else product
        # Norms copy no matrix. Those of columns only where these differ in weight: of rows they are ten times as fast.
        seen = torch.linalg.vector_norm(product, dim=-1)
        norms = torch.linalg.vector_norm(matrix, dim=-2 if self.rest.ndim else -1)
        return double(seen).square().sum(-1) + (double(norms).square() * double(self.rest)).sum(-1)

    def trace(self) -> float:
        """tr R: the mean of ‖x‖²."""
        rest = double(self.rest).expand(len(self.factor)).sum()
        return float(double(self.factor).square().sum() + rest)


class PrincipalMoment(SecondMoment):
    """A second moment whose F has orthogonal columns, the longest first."""

    __slots__ = ()


def principal_moment(moment: SecondMoment) -> PrincipalMoment:
    """The same R. Of one that is so already it is that: who fits several matrices on the same inputs makes it once."""
    if isinstance(moment, PrincipalMoment):
        return moment
    factor = double(moment.factor)
    axes = symmetric_eigen(factor.mT @ factor)[1]
    return PrincipalMoment(like(factor @ axes, moment.factor), moment.rest)
