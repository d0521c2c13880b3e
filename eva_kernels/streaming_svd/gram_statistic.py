"""The exact statistic: the Gram matrix of all rows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._double import double, like
from ..gram import gram_add_, mirror_
from .statistics import Statistic


class _Symmetric:
    """The Gram matrix as an attribute of a statistic: whole where it is read, its lower triangle alone until then."""

    def __get__(self, statistic: "GramStatistic", owner: type) -> Tensor:
        gram: Tensor = vars(statistic)["gram"]
        if not statistic.is_symmetric:
            mirror_(gram, impl=statistic.impl)
            statistic.is_symmetric = True
        return gram

    def __set__(self, statistic: "GramStatistic", value: Tensor) -> None:
        vars(statistic)["gram"] = value
        statistic.is_symmetric = True


class GramStatistic(Statistic):
    """The exact statistic: the d × d Gram matrix about the shift. Order-free up to rounding."""

    kind = "gram"
    summarises = False
    gram = _Symmetric()  # (d, d)
    is_symmetric: bool  # as it is kept

    def __init__(self, num_features: int, num_components: int, **options: Any) -> None:
        super().__init__(num_features, num_components, **options)
        self.gram = torch.zeros(num_features, num_features, dtype=self.basis.dtype, device=self.basis.device)
        self.shared_image: Tensor | None = None  # (d, q): the image summed over shares, until the next basis

    @classmethod
    def predict_nbytes(cls, num_features: int, num_components: int) -> int:
        return 4 * num_features * (num_features + num_components)

    def _accumulate_(self, x: Tensor, row_mask: Tensor | None, sign: float) -> None:
        assert self.shift is not None
        gram = vars(self)["gram"]
        is_whole = gram_add_(gram, *self._totals(), x, self.shift, row_mask, sign=sign, impl=self.impl)
        self.is_symmetric = self.is_symmetric and is_whole

    def _merge_(self, other: "GramStatistic", offset: Tensor) -> None:
        cross = torch.outer(offset, other.column_sum)
        moved = cross + cross.T + other.num_rows * torch.outer(offset, offset)
        self.gram += other.gram + like(moved, self.gram)
        self._merge_totals_(other, offset)
        self.pending_rows += other.num_rows

    @property
    def sample(self) -> Tensor:
        return self.basis

    def image(self) -> Tensor:
        return self.gram @ self.basis if self.shared_image is None else self.shared_image

    @classmethod
    def means(cls, members: "Sequence[GramStatistic]", counts: Tensor) -> Tensor:
        sums = torch.stack([s.column_sum for s in members])
        mean = sums / counts[:, 0, None].clamp_min(1).sqrt()
        return like(torch.stack([mean, torch.zeros_like(mean)], 1), members[0].basis)

    def summands(self, *, whole: bool = True) -> dict[str, Tensor]:
        own = {"gram": self.gram} if whole else {"shared_image": self.gram @ self.basis}
        return {**super().summands(), **own}

    def adopt_(self, basis: Tensor, eigenvalues: Tensor, *, sample: Tensor | None = None) -> None:
        super().adopt_(basis, eigenvalues)
        self.shared_image = None

    def second_moment(self) -> Tensor:  # (d, d) float64
        """Mean of x xᵀ over all rows, not centred; zero where there are none."""
        mean = self.mean()
        return self._scatter() / max(self.num_rows, 1) + torch.outer(mean, mean)

    def finish_(self) -> None:
        """Basis and eigenvalues become the exact leading ones: one eigensolve in float64."""
        if self.num_rows == 0:
            return
        values, vectors = torch.linalg.eigh(self._scatter())
        keep = self.num_components
        self.eigenvalues = values[-keep:].flip(0).clamp_min(0)
        self.basis = like(vectors[:, -keep:].flip(1), self.basis).contiguous()

    def _scatter(self) -> Tensor:  # (d, d) float64
        return double(self.gram) - torch.outer(self.column_sum, self.column_sum / max(self.num_rows, 1))
