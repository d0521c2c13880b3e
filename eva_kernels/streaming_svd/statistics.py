"""What is kept of one stream of rows: totals, a basis, and either the Gram matrix or its product.

Both statistics hold the same totals about the same fixed shift, and both answer one question, "the centred
scatter of all rows so far, times my basis", so that one refresh (:mod:`.refresh`) serves them alike.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from .._rows import shifted_chunks
from ..gram import gram_accumulate_
from ..orthonormal import orthonormalize
from ..subspace import subspace_accumulate_

S = TypeVar("S", bound="Statistic")

_OPTIONS = {"num_features", "num_components", "impl"}  # attributes that come from the arguments, not from rows


class Statistic(ABC):
    """Streaming second-order statistic of rows in ℝᵈ, with a basis of its leading directions.

    Rows are folded in by :meth:`accumulate_` and the basis is brought up to date by
    :func:`~eva_kernels.streaming_svd.refresh_`, for many statistics at once.

    Args:
        num_features: d, the width of a row.
        num_components: q, the columns of the basis; at most d.
        dtype: of the accumulators, float32 or float64; totals are always float64.
        device: where rows come from and the state lives.
        seed: of the first basis, drawn from a generator of its own.
        impl: passed to the accumulating op.

    Raises:
        ValueError: a size is out of range.
    """

    kind: ClassVar[str]

    def __init__(
        self,
        num_features: int,
        num_components: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
        impl: str = "auto",
    ) -> None:
        if num_features < 1:
            raise ValueError(f"num_features: expected at least 1, got {num_features}")
        if not 1 <= num_components <= num_features:
            raise ValueError(f"num_components: expected 1 to {num_features} (num_features), got {num_components}")
        self.num_features, self.num_components, self.impl = num_features, num_components, impl
        self.num_rows = 0
        self.pending_rows = 0  # rows folded in since the last refresh
        self.num_refreshes = 0
        self.shift: Tensor | None = None  # (d,), the first batch's mean
        self.column_sum = torch.zeros(num_features, dtype=torch.float64, device=device)
        self.square_sum = torch.zeros((), dtype=torch.float64, device=device)
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(num_features, num_components, generator=generator) / num_features**0.5
        self.basis = start.to(device, dtype)  # (d, q), orthonormal from the first refresh on
        self.eigenvalues = torch.zeros(num_components, dtype=torch.float64, device=device)  # (q,) of the scatter

    def accumulate_(
        self,
        x: Tensor,  # (..., d)
        row_mask: Tensor | None = None,  # (...) bool
        *,
        num_rows: int | None = None,
        sign: int = 1,
    ) -> None:
        """Fold the unmasked rows of ``x`` in, or with ``sign=-1`` take out rows folded in since the last refresh.

        ``num_rows`` is the number of unmasked rows where the caller knows it, which saves a device
        synchronisation.
        """
        if num_rows is None:
            num_rows = math.prod(x.shape[:-1]) if row_mask is None else int(row_mask.sum())
        if num_rows == 0:
            return
        if self.shift is None:
            self.shift = self._mean_of(x, row_mask, num_rows)
            self._start_(x, row_mask)
        self._accumulate_(x, row_mask, float(sign))
        self.num_rows += sign * num_rows
        self.pending_rows += sign * num_rows

    def total_scatter(self) -> Tensor:  # () float64
        """Σ ‖x − mean‖² over all rows: the sum of all d eigenvalues, not only the kept ones."""
        if self.num_rows == 0:
            return torch.zeros_like(self.square_sum)
        return (self.square_sum - self.column_sum.square().sum() / self.num_rows).clamp_min(0)

    def explained_variance_ratio(self) -> Tensor:  # (q,) float64
        """Each kept eigenvalue over the total scatter; 0 where there is no variance.

        Where rounding makes the kept eigenvalues sum to more than the total (a stream of hardly any
        variance about its mean), they are taken over their sum.
        """
        total = torch.maximum(self.total_scatter(), self.eigenvalues.sum())
        return torch.where(total > 0, self.eigenvalues / total.where(total > 0, 1), 0)

    def clone(self: S) -> S:
        """An independent copy; no tensor is shared."""
        other = object.__new__(type(self))
        other.__dict__.update(
            {key: value.clone() if isinstance(value, Tensor) else value for key, value in self.__dict__.items()}
        )
        return other

    def state(self) -> dict[str, Tensor | int | float | bool | None]:
        """Everything that rows have left here, by attribute: tensors (not copied) and plain numbers."""
        return {name: value for name, value in vars(self).items() if name not in _OPTIONS}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Go on, in a fresh statistic, from what :meth:`state` gave of one made with the same arguments.

        Raises:
            ValueError: an entry is missing or unknown, or of another type, shape or dtype than a statistic of
                this size holds, a negative count, NaN or Inf. The statistic is then unchanged.
        """
        own = self.state()
        if set(state) != set(own):
            raise ValueError(f"state: expected the entries {sorted(own)}, got {sorted(state)}")
        loaded = {name: self._checked(name, own[name], state[name]) for name in own}
        self.__dict__.update(loaded)

    def _checked(self, name: str, own: Any, value: Any) -> Any:
        """``value`` on this statistic's device, if it can stand where ``own`` stands in a fresh statistic."""
        if own is None and value is None:
            return None
        if own is None:  # what the first rows bring: a vector or a matrix of the statistic's own widths
            sizes = {self.num_features, self.num_components}
            fits = isinstance(value, Tensor) and set(value.shape) <= sizes and value.dtype == self.basis.dtype
            expected = f"None or {self.basis.dtype} of sizes {sorted(sizes)}"
        elif isinstance(own, Tensor):
            fits = isinstance(value, Tensor) and value.shape == own.shape and value.dtype == own.dtype
            expected = f"{own.dtype} of shape {tuple(own.shape)}"
        else:
            fits = type(value) is type(own) and 0 <= value < 2**63
            expected = f"{type(own).__name__} from 0 on"
        if not fits:
            got = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"state: expected {name} {expected}, got {got}")
        if not isinstance(value, Tensor):
            return value
        if not bool(value.isfinite().all()):
            raise ValueError(f"state: expected {name} without NaN and Inf")
        return value.to(self.basis.device, copy=True)

    def nbytes(self) -> int:
        """Bytes held by the state's tensors."""
        return sum(v.numel() * v.element_size() for v in self.__dict__.values() if isinstance(v, Tensor))

    @classmethod
    @abstractmethod
    def predict_nbytes(cls, num_features: int, num_components: int) -> int:
        """Bytes a float32 state of this size holds, known before it is made."""

    @property
    def sample(self) -> Tensor:  # (d, q)
        """What :meth:`product` multiplies the scatter with; spans what the basis spans, or nearly."""
        return self.basis

    @abstractmethod
    def product(self) -> Tensor:  # (d, q)
        """The centred scatter of all rows so far, times :attr:`sample`."""

    def adopt_(
        self,
        basis: Tensor,  # (d, q)
        eigenvalues: Tensor,  # (q,) float64
    ) -> None:
        """Take a refreshed basis as one's own."""
        self.basis, self.eigenvalues = basis, eigenvalues
        self.pending_rows = 0
        self.num_refreshes += 1

    def finish_(self) -> None:
        """After the last refresh: the basis in its final form, its columns orthonormal to rounding."""
        self.basis = orthonormalize(self.basis)

    @abstractmethod
    def _accumulate_(self, x: Tensor, row_mask: Tensor | None, sign: float) -> None: ...

    def _start_(self, x: Tensor, row_mask: Tensor | None) -> None:  # noqa: B027 - most need no start
        """Called once with the first rows, before they are folded in."""

    def _mean_of(self, x: Tensor, row_mask: Tensor | None, num_rows: int) -> Tensor:
        zero = torch.zeros(self.num_features, dtype=self.basis.dtype, device=x.device)
        total = torch.zeros_like(self.column_sum)
        for chunk in shifted_chunks(x, zero, row_mask):
            total += chunk.sum(0)
        return (total / num_rows).to(self.basis.dtype)


class GramStatistic(Statistic):
    """The exact statistic: the d × d Gram matrix about the shift. Order-free up to rounding."""

    kind = "gram"

    def __init__(self, num_features: int, num_components: int, **options: Any) -> None:
        super().__init__(num_features, num_components, **options)
        self.gram = torch.zeros(num_features, num_features, dtype=self.basis.dtype, device=self.basis.device)

    @classmethod
    def predict_nbytes(cls, num_features: int, num_components: int) -> int:
        return 4 * num_features * (num_features + num_components)

    def _accumulate_(self, x: Tensor, row_mask: Tensor | None, sign: float) -> None:
        assert self.shift is not None
        gram_accumulate_(
            self.gram, self.column_sum, self.square_sum, x, self.shift, row_mask, sign=sign, impl=self.impl
        )

    def product(self) -> Tensor:
        mean = (self.column_sum / max(self.num_rows, 1)).to(self.gram.dtype)
        return self.gram @ self.basis - torch.outer(self.num_rows * mean, mean @ self.basis)

    def finish_(self) -> None:
        """Basis and eigenvalues become the exact leading ones: one eigensolve in float64."""
        if self.num_rows == 0:
            return
        scatter = self.gram.double() - torch.outer(self.column_sum, self.column_sum / self.num_rows)
        values, vectors = torch.linalg.eigh(scatter)
        keep = self.num_components
        self.eigenvalues = values[-keep:].flip(0).clamp_min(0)
        self.basis = vectors[:, -keep:].flip(1).to(self.basis.dtype).contiguous()


class SubspaceStatistic(Statistic):
    """History PCA: a rank-q summary of the past, and the product of the pending rows with a sample of it.

    One product with X per batch; the derivation and its sources are in this folder's README. The sample is
    the basis rounded to bfloat16, so that every kernel multiplies by exactly the matrix that the extraction
    assumes: rounding inside a kernel would turn up as variance in directions that have none.
    """

    kind = "subspace"

    def __init__(self, num_features: int, num_components: int, **options: Any) -> None:
        super().__init__(num_features, num_components, **options)
        self._sample = _rounded(self.basis)  # (d, q)
        self.pending = torch.zeros_like(self.basis)  # (d, q): Σ z (zᵀ sample) over the pending rows
        self.past_rows = 0  # rows summarised by basis and eigenvalues
        self.past_sum = torch.zeros_like(self.column_sum)  # (d,): Σ z over those rows

    @classmethod
    def predict_nbytes(cls, num_features: int, num_components: int) -> int:
        return 4 * num_features * (3 * num_components + 5)

    @property
    def sample(self) -> Tensor:
        return self._sample

    def _start_(self, x: Tensor, row_mask: Tensor | None) -> None:
        # A random basis wastes the first product, so the first rows are multiplied twice: one power step.
        assert self.shift is not None
        pending, sums = torch.zeros_like(self.basis), torch.zeros_like(self.column_sum)
        subspace_accumulate_(
            pending, sums, self.square_sum.clone(), x, self._sample, self.shift, row_mask, impl=self.impl
        )
        if bool(pending.isfinite().all()):
            self.basis = orthonormalize(pending)
            self._sample = _rounded(self.basis)

    def _accumulate_(self, x: Tensor, row_mask: Tensor | None, sign: float) -> None:
        assert self.shift is not None
        subspace_accumulate_(
            self.pending, self.column_sum, self.square_sum, x, self._sample, self.shift, row_mask,
            sign=sign, impl=self.impl,
        )  # fmt: skip

    def product(self) -> Tensor:
        n, m = self.past_rows, self.num_rows - self.past_rows
        past_mean = self.past_sum / max(n, 1)
        mean = (self.column_sum - self.past_sum) / max(m, 1)
        directions = torch.stack([mean, mean - past_mean]).to(self.basis.dtype)  # (2, d)
        weights = directions.new_tensor([[-m], [n * m / max(n + m, 1)]])
        overlap = self.basis.T @ self._sample
        history = torch.addmm(self.pending, self.basis, self.eigenvalues.to(overlap.dtype)[:, None] * overlap)
        return history.addmm_((weights * directions).T, directions @ self._sample)

    def adopt_(self, basis: Tensor, eigenvalues: Tensor) -> None:
        super().adopt_(basis, eigenvalues)
        self._sample = _rounded(basis)
        self.pending.zero_()
        self.past_rows = self.num_rows
        self.past_sum = self.column_sum.clone()


def _rounded(basis: Tensor) -> Tensor:
    return basis.to(torch.bfloat16).to(basis.dtype)
