"""The streaming statistic: a summary of the past, and one product of the rows since."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._double import double, like
from .._rows import add_totals_, shifted_chunks
from ..subspace import Sample, subspace_add_
from .statistics import Sketch, Statistic


class SubspaceStatistic(Statistic):
    """History PCA: a rank-q summary of the past, and the product of the pending rows with a sample of it.

    One product with X per batch; the derivation and its sources are in this folder's README. The sample is
    the basis rounded to bfloat16, so that every kernel multiplies by exactly the matrix that the extraction
    assumes: rounding inside a kernel would turn up as variance in directions that have none.
    """

    kind = "subspace"
    summarises = True

    def __init__(self, num_features: int, num_components: int, **options: Any) -> None:
        super().__init__(num_features, num_components, **options)
        self._sample = self.basis  # (d, q): unit vectors are the same when rounded; replaced, never written to
        self._prepared: Sample | None = None  # that and the shift, and what kernels have made of them
        self.pending = torch.zeros_like(self.basis)  # (d, q): Σ z (zᵀ sample) over the pending rows
        self.past_rows = 0  # rows summarised by basis and eigenvalues
        self.past_sum = torch.zeros_like(self.column_sum)  # (d,): Σ z over those rows

    @classmethod
    def predict_nbytes(cls, num_features: int, num_components: int) -> int:
        return 4 * num_features * (3 * num_components + 5)

    @property
    def sample(self) -> Tensor:
        return self._sample

    def image(self) -> Tensor:
        return self.pending

    @classmethod
    def means(cls, members: "Sequence[SubspaceStatistic]", counts: Tensor) -> Tensor:
        n = counts[:, 1, None]  # past rows
        m = counts[:, 0, None] - n  # pending rows
        past = torch.stack([s.past_sum for s in members])
        pending = torch.stack([s.column_sum for s in members]) - past
        mean = pending / m.clamp_min(1)
        both = torch.stack([mean, mean - past / n.clamp_min(1)], 1)
        weights = torch.stack([m, n * m / (n + m).clamp_min(1)], 1).sqrt()
        return like(weights * both, members[0].basis)

    def nbytes(self) -> int:
        return super().nbytes() + (0 if self._prepared is None else self._prepared.nbytes)

    def start_(self, sketch: Sketch) -> None:
        super().start_(sketch)
        self._sample = _rounded(self.basis)

    def summands(self, *, whole: bool = True) -> dict[str, Tensor]:
        own = {"pending": self.pending, "past_sum": self.past_sum} if whole else {"pending": self.pending}
        return {**super().summands(), **own}

    def _accumulate_(self, x: Tensor, row_mask: Tensor | None, sign: float) -> None:
        assert self.shift is not None
        prepared = self._prepared
        if prepared is None or prepared.basis is not self._sample or prepared.shift is not self.shift:
            prepared = self._prepared = Sample(self._sample, self.shift)
        subspace_add_(self.pending, *self._totals(), x, prepared, row_mask, sign=sign, impl=self.impl)

    def accumulate_block_(
        self,
        x: Tensor,  # (..., w), the features from ``start`` on
        row_mask: Tensor | None,  # (...) bool
        *,
        num_rows: int,
        start: int,
        add_up_: Callable[[Tensor], object],
        counts: bool,
        sign: int = 1,
    ) -> None:
        """As :meth:`accumulate_` where the features of a row are split into blocks, each in a share of its own.

        Args:
            x, row_mask, num_rows, sign: As there; there has to be a shift.
            start: The block's first feature.
            add_up_: Adds a tensor up over all blocks, in place: the rows' products with the sample, (n, q).
            counts: Whether the rows count in this share.
        """
        assert self.shift is not None
        stop = start + x.shape[-1]
        shift = self.shift[start:stop]
        matrices = [self._sample] if self.previous is None else [self._sample, self.previous, self.basis]
        columns = torch.cat([matrix[start:stop] for matrix in matrices], 1)
        products = torch.cat([chunk @ columns for chunk in shifted_chunks(x, shift, row_mask)])
        add_up_(products)
        row, q = 0, self.num_components
        column_sum, square_sum = self._totals()
        for chunk in shifted_chunks(x, shift, row_mask):
            self.pending[start:stop].addmm_(chunk.mT, products[row : row + len(chunk), :q], alpha=sign)
            add_totals_(column_sum[start:stop], square_sum, chunk, sign)
            row += len(chunk)
        if counts:
            self.num_rows += sign * num_rows
            self.pending_rows += sign * num_rows
            if self.previous is not None:
                self._add_projections_(products[:, q:], sign)

    def _merge_(self, other: "SubspaceStatistic", offset: Tensor) -> None:
        for name, statistic in (("self", self), ("other", other)):
            if statistic.pending_rows:
                raise ValueError(f"{name}: expected no rows since the last refresh, got {statistic.pending_rows}")
        ours, theirs = self.num_rows, other.num_rows
        between = self.column_sum / max(ours, 1) - (other.column_sum / max(theirs, 1) + offset)
        parts = [double(s.basis) * s.eigenvalues.sqrt() for s in (self, other)]
        weight = (ours * theirs / max(ours + theirs, 1)) ** 0.5
        vectors, values, _ = torch.linalg.svd(torch.cat([*parts, weight * between[:, None]], 1), full_matrices=False)
        self._merge_totals_(other, offset)
        keep = self.num_components
        self.adopt_(like(vectors[:, :keep], self.basis).contiguous(), values[:keep].square())

    def adopt_(self, basis: Tensor, eigenvalues: Tensor, *, sample: Tensor | None = None) -> None:
        super().adopt_(basis, eigenvalues)
        if sample is None:
            sample = _rounded(basis)
            self.pending.zero_()
        self._sample = sample
        self.past_rows = self.num_rows
        self.past_sum = self.column_sum.clone()


def _rounded(basis: Tensor) -> Tensor:
    return basis.to(torch.bfloat16).to(basis.dtype)
