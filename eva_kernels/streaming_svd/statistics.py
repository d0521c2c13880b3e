"""What is kept of one stream of rows: totals, a basis, and either the Gram matrix or its product.

Both statistics hold the same totals about the same fixed shift, and both answer one question, "the centred
scatter of all rows so far, times my basis", so that one refresh (:mod:`.refresh`) serves them alike.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from .._double import DistantSum, distilled, double, home_of, like, settle_, zeros
from .._rows import shifted_chunks
from .._transfer import sent
from ..orthonormal import orthonormalize, orthonormalize_or
from ..subspace.core import core_runs
from .count_sketch import count_sketch_core, count_sketch_reference

S = TypeVar("S", bound="Statistic")

# Attributes that are none of what rows leave.
_OPTIONS = {"num_features", "num_components", "impl", "shared_image", "is_symmetric", "_prepared"}
_HELD = (Tensor, DistantSum)


class Sketch(NamedTuple):
    """What a statistic starts from: a count sketch of its first rows, and their sum.

    Every row, with a random sign, is added to one of q sums (Clarkson & Woodruff 2013, arXiv 1207.6365). Sketches of
    shares of the rows add up to the sketch of all, entry by entry.
    """

    sums: Tensor  # (q, d)
    tally: Tensor  # (q, 1): the signs' sums
    total: Tensor  # (d,) float64
    num_rows: int

    def block_of(self, num_features: int, start: int, *, counts: bool) -> "Sketch":
        """This sketch of a block of features as a part of that of all; ``counts``: whether its rows count."""
        sums = self.sums.new_zeros(len(self.sums), num_features)
        total = self.total.new_zeros(num_features)
        stop = start + len(self.total)
        sums[:, start:stop], total[start:stop] = self.sums, self.total
        return Sketch(sums, self.tally if counts else torch.zeros_like(self.tally), total, self.num_rows * counts)


class _Total:
    """A total as an attribute of a statistic: it reads as the float64 tensor of all that was added, and is set as one.

    Kept in the statistic under the same name is that tensor, or the distant sum that stands for it.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, statistic: "Statistic", owner: type) -> Tensor:
        kept: Tensor | DistantSum = vars(statistic)[self._name]
        return kept.read() if isinstance(kept, DistantSum) else kept

    def __set__(self, statistic: "Statistic", value: Tensor | DistantSum) -> None:
        kept = vars(statistic).get(self._name)
        if isinstance(kept, DistantSum) and isinstance(value, Tensor):
            kept.hold_(value)
        else:
            vars(statistic)[self._name] = value


class Statistic(ABC):
    """Streaming second-order statistic of rows in ℝᵈ, with a basis of its leading directions.

    Rows are folded in by :meth:`accumulate_` and the basis is brought up to date by
    :func:`~eva_kernels.streaming_svd.refresh_`, for many statistics at once. On a device without float64 what is kept
    in float64 is on the CPU, and reading a total waits for the device.

    Args:
        num_features: d, the width of a row.
        num_components: q, the columns of the basis; at most d.
        dtype: of the accumulators, float32 or float64; totals are always float64.
        device: where rows come from and the state lives.
        seed: of the signs in the first basis, drawn from a generator of its own.
        impl: passed to the accumulating op.
        watch_gain: whether rows are also projected on the basis and on the one before it, so that a refresh can
            say what the step before it gained. Costs as much as another product with the rows.

    Raises:
        ValueError: a size is out of range.
    """

    kind: ClassVar[str]
    summarises: ClassVar[bool]  # whether basis and eigenvalues stand for rows that are kept nowhere else
    past_rows = 0  # rows that they stand for

    column_sum = _Total()  # (d,): Σ z with z = x − shift
    square_sum = _Total()  # (): Σ ‖z‖²
    projections = _Total()  # (4, q): see _watch_

    def __init__(
        self,
        num_features: int,
        num_components: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
        impl: str = "auto",
        watch_gain: bool = False,
    ) -> None:
        if num_features < 1:
            raise ValueError(f"num_features: expected at least 1, got {num_features}")
        if not 1 <= num_components <= num_features:
            raise ValueError(f"num_components: expected 1 to {num_features} (num_features), got {num_components}")
        self.num_features, self.num_components, self.impl, self.seed = num_features, num_components, impl, seed
        self.num_rows = 0
        self.pending_rows = 0  # rows folded in since the last refresh
        self.num_refreshes = 0
        self.shift: Tensor | None = None  # (d,), the first batch's mean
        device = torch.device(device)
        self.column_sum, self.square_sum = zeros((num_features,), device), zeros((), device)
        self.basis = torch.eye(num_features, num_components, dtype=dtype, device=device)  # (d, q)
        self.eigenvalues = torch.zeros(num_components, dtype=torch.float64, device=home_of(device))  # of the scatter
        self.watch_gain = watch_gain
        self.previous: Tensor | None = None  # (d, q), the basis before the last refresh, if gains are watched
        self.projections = zeros((4, num_components), device)

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
            self.start_(self.sketch(x, row_mask, num_rows=num_rows))
        if self.previous is not None:
            self._watch_(x, row_mask, sign)
        self._accumulate_(x, row_mask, float(sign))
        self.num_rows += sign * num_rows
        self.pending_rows += sign * num_rows

    def total_scatter(self) -> Tensor:  # () float64
        """Σ ‖x − mean‖² over all rows: the sum of all d eigenvalues, not only the kept ones."""
        if self.num_rows == 0:
            return torch.zeros_like(self.square_sum)
        return (self.square_sum - self.column_sum.square().sum() / self.num_rows).clamp_min(0)

    def mean(self) -> Tensor:  # (d,) float64
        """The mean of all rows; zero where there are none."""
        column_sum = self.column_sum
        if self.shift is None:
            return torch.zeros_like(column_sum)
        return double(self.shift) + column_sum / max(self.num_rows, 1)

    def explained_variance_ratio(self) -> Tensor:  # (q,) float64
        """Each eigenvalue over the total scatter; 0 where there is no variance.

        Where rounding makes the kept eigenvalues sum to more than the total (a stream of hardly any
        variance about its mean), they are taken over their sum.
        """
        return self.explained_variance_ratios([self], self.eigenvalues[None], self.counts([self]))[0]

    @staticmethod
    def counts(
        members: "Sequence[Statistic]",  # b of them
    ) -> Tensor:  # (b, 3) float64
        """Of each one's rows: all, those that its basis stands for, those since the last refresh.

        A refresh asks for them once, as they have to be sent where totals are.
        """
        numbers = [(s.num_rows, s.past_rows, s.pending_rows) for s in members]
        return sent(torch.tensor(numbers, dtype=torch.float64, device="cpu"), members[0].eigenvalues.device)

    @staticmethod
    def explained_variance_ratios(
        members: "Sequence[Statistic]",  # b of them
        eigenvalues: Tensor,  # (b, q) float64
        counts: Tensor,  # (b, 3) float64
    ) -> Tensor:  # (b, q) float64
        """:meth:`explained_variance_ratio` of statistics of one width, were these their eigenvalues."""
        squares = torch.stack([s.square_sum for s in members])
        sums = torch.stack([s.column_sum for s in members])
        scatter = squares - sums.square().sum(1) / counts[:, 0].clamp_min(1)  # each entry as in total_scatter
        total = torch.maximum(scatter, eigenvalues.sum(1))[:, None]
        return torch.where(total > 0, eigenvalues / total.where(total > 0, 1), 0)

    def clone(self: S) -> S:
        """An independent copy; no tensor is shared."""
        other = object.__new__(type(self))
        other.__dict__.update(
            {name: value.clone() if isinstance(value, _HELD) else value for name, value in vars(self).items()}
        )
        return other

    def state(self) -> dict[str, Tensor | int | float | bool | None]:
        """Everything that rows have left here, by attribute: tensors (not copied) and plain numbers."""
        return {name: getattr(self, name) for name in vars(self) if name not in _OPTIONS}

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
        for name, value in loaded.items():
            setattr(self, name, value)

    def _checked(self, name: str, own: Any, value: Any) -> Any:
        """``value`` where this statistic keeps such, if it can stand where ``own`` stands in a fresh statistic."""
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
        device = (self.basis if own is None else own).device
        return value.to(device, copy=True, memory_format=torch.contiguous_format)

    def nbytes(self) -> int:
        """Bytes held by the state's tensors."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, _HELD))

    @classmethod
    @abstractmethod
    def predict_nbytes(cls, num_features: int, num_components: int) -> int:
        """Bytes a float32 state of this size holds, known before it is made."""

    @property
    @abstractmethod
    def sample(self) -> Tensor:  # (d, q)
        """The matrix that rows were multiplied with; it spans what the basis spans."""

    @abstractmethod
    def image(self) -> Tensor:  # (d, q)
        """The second moment of the rows that the basis does not summarise, times the sample."""

    @classmethod
    @abstractmethod
    def means(
        cls,
        members: "Sequence[Any]",  # b of them
        counts: Tensor,  # (b, 3) float64
    ) -> Tensor:  # (b, 2, d)
        """Each member's u and v: the scatter of the rows in its image is their second moment less u uᵀ, and together
        with the rows that its basis summarises they scatter by v vᵀ more than apart."""

    @classmethod
    def past_eigenvalues(cls, members: "Sequence[Statistic]") -> Tensor:  # (b, q) float64
        """Those of what each member's basis summarises: zeros where its image holds all rows."""
        values = torch.stack([s.eigenvalues for s in members])
        return values if cls.summarises else torch.zeros_like(values)

    @staticmethod
    def gains(
        members: "Sequence[Statistic]",  # b of them
        counts: Tensor,  # (b, 3) float64
    ) -> Tensor:  # (b, q) float64
        """What each one's last refresh gained on the rows since, which neither basis had seen.

        Per leading block of i components, the variance that the basis captures of them less what the one before
        captures, over the former; 0 where there is none, or where it is not watched.
        """
        moments = torch.stack([s.projections for s in members])  # (b, 4, q)
        pending = counts[:, 2, None, None].clamp_min(1)
        before, after = (moments[:, 1::2] - moments[:, ::2].square() / pending).cumsum(-1).unbind(1)
        return torch.where(after > 0, (after - before) / after.where(after > 0, 1), 0)

    def adopt_(
        self,
        basis: Tensor,  # (d, q)
        eigenvalues: Tensor,  # (q,) float64
        *,
        sample: Tensor | None = None,  # (d, q)
    ) -> None:
        """Take a refreshed basis as one's own; ``sample``: from compiled code, which has cleared the image as well."""
        if self.watch_gain:
            self.previous = self.basis
            self.projections.zero_()
        self.basis, self.eigenvalues = basis, eigenvalues
        self.pending_rows = 0
        self.num_refreshes += 1

    def finish_(self) -> None:
        """After the last refresh: the basis in its final form, its columns orthonormal to rounding."""
        self.basis = orthonormalize(self.basis)

    @abstractmethod
    def _accumulate_(self, x: Tensor, row_mask: Tensor | None, sign: float) -> None: ...

    def _totals(self) -> tuple[Tensor, Tensor]:
        """column_sum and square_sum to add to, without reading them: of a distant sum ``add_`` is all that is asked."""
        return cast("tuple[Tensor, Tensor]", (vars(self)["column_sum"], vars(self)["square_sum"]))

    def merge_(self: S, other: S) -> None:
        """Take in the rows that ``other`` has seen; it is left as it is.

        Exact up to rounding for "gram". For "subspace" the union of both summaries is cut back to q columns; what is
        lost lies below their smallest eigenvalues, and both must have been refreshed since their last rows.

        Raises:
            ValueError: another kind or size, or pending rows in a subspace statistic.
        """
        shape = (self.kind, self.num_features, self.num_components)
        if shape != (theirs := (other.kind, other.num_features, other.num_components)):
            raise ValueError(f"other: expected (kind, num_features, num_components) {shape}, got {theirs}")
        if other.shift is None:
            return
        shift = other.shift.clone() if self.shift is None else self.shift
        self._merge_(other, double(other.shift) - double(shift))
        self.shift = shift

    @abstractmethod
    def _merge_(self: S, other: S, offset: Tensor) -> None: ...

    def _merge_totals_(self, other: "Statistic", offset: Tensor) -> None:
        """Add the other's totals, moved by ``offset`` from its shift to this one's."""
        self.square_sum += other.square_sum + 2 * offset @ other.column_sum + other.num_rows * offset @ offset
        self.column_sum += other.column_sum + other.num_rows * offset
        self.num_rows += other.num_rows

    def _watch_(self, x: Tensor, row_mask: Tensor | None, sign: int) -> None:
        """Sums and sums of squares of the rows' projections: on the basis before (rows 0, 1) and on this one (2, 3)."""
        assert self.shift is not None
        assert self.previous is not None
        both = torch.cat([self.previous, self.basis], 1)
        for chunk in shifted_chunks(x, self.shift, row_mask):
            self._add_projections_(chunk @ both, sign)

    def _add_projections_(self, projected: Tensor, sign: int) -> None:  # (n, 2 q)
        kept: Tensor | DistantSum = vars(self)["projections"]
        if isinstance(kept, DistantSum):  # a projection is rounded already: rounding its square once more does no harm
            sums: tuple[Tensor, ...] = distilled(torch.stack([projected, projected.square()], 1))
        else:
            projected = projected.double()
            sums = (torch.stack([projected.sum(0), projected.square().sum(0)]),)
        for moments in sums:  # (2, 2 q)
            kept.add_(torch.cat(moments.chunk(2, 1)), alpha=sign)

    def sketch(
        self,
        x: Tensor,  # (..., d)
        row_mask: Tensor | None = None,  # (...) bool
        *,
        num_rows: int,
        first: int = 0,
    ) -> Sketch:
        """The sketch of these rows, as part of that of a longer batch in which ``first`` rows come before them.

        Of rows of which only a block of features is given, the sketch of that block.
        """
        columns, d = self.num_components, x.shape[-1]
        generator = torch.Generator().manual_seed(self.seed)
        shape = (first + x.numel() // d, 1)
        drawn = torch.randint(0, 2, shape, generator=generator, dtype=torch.int64, device="cpu")
        signs = sent((drawn[first:] * 2 - 1).to(self.basis.dtype), self.basis.device)
        if row_mask is not None:
            signs *= row_mask.reshape(-1, 1)
        sums, tally = self.basis.new_zeros(columns, d), self.basis.new_zeros(columns, 1)
        total = zeros((d,), self.basis.device)
        compiled = self.impl == "auto" and core_runs(x, sums)
        add = count_sketch_core if compiled else count_sketch_reference
        add(sums, tally, cast(Tensor, total), x, signs, row_mask, first)
        return Sketch(sums, tally, total.read() if isinstance(total, DistantSum) else total, num_rows)

    def start_(self, sketch: Sketch) -> None:
        """Take the shift, and a basis to start from, from a sketch of the first rows.

        The span of its sums is half a power step ahead of a random one, for the price of reading the rows. Nothing
        waits for a device with float64.
        """
        self.shift = like(sketch.total / sketch.num_rows, self.basis)
        sums = torch.addcmul(sketch.sums, sketch.tally, self.shift, value=-1)
        self.basis = orthonormalize_or(sums.T, self.basis)

    def summands(self, *, whole: bool = True) -> dict[str, Tensor]:
        """By attribute, the tensors that add up where the rows come in shares, each folded into a statistic of its own.

        Shares start from one sketch and adopt one basis; then the sums over all shares are what a statistic of all
        rows holds, exact up to rounding. ``whole=False``: only what a refresh needs of them.
        """
        watched = {"projections": self.projections} if self.watch_gain else {}
        return {"column_sum": self.column_sum, "square_sum": self.square_sum, **watched}

    def hold_(self, summands: Mapping[str, Tensor]) -> None:
        """Hold the sums over all shares in the place of one's own; the other shares are then to hold zeros."""
        for name, value in summands.items():
            setattr(self, name, value)


def bring_home_(statistics: Sequence[Statistic]) -> None:
    """Before totals of many statistics are read: on devices without float64, wait once for all of them."""
    distant = [statistic for statistic in statistics if statistic.eigenvalues.device != statistic.basis.device]
    settle_(total for statistic in distant for total in vars(statistic).values() if isinstance(total, DistantSum))
