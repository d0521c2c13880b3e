"""Scales that a quantiser moved between layers before it rounded, as AWQ does: found again, those of norms exactly."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Scales", "norm_ratios", "scales_of"]

STEPS = 30  # of alternating least squares, each of them two small sums over the weight
AS_WELL = 0.25  # of the rounding error: what fewer scales may leave more than a scale for each row and each column
ROUNDING = 2.0**-20  # of ‖quantised‖²: that of sums in float32


@dataclass(frozen=True)
class Scales:
    """What a layer's float weight is multiplied with to be what its base was made of; None: all ones.

    Attributes:
        rows: (out,) float32.
        columns: (in,) float32.
    """

    rows: Tensor | None
    columns: Tensor | None

    def apply_(self, matrix: Tensor) -> None:  # (out, in)
        """Scale a matrix in place."""
        if self.rows is not None:
            matrix.mul_(self.rows.to(matrix)[:, None])
        if self.columns is not None:
            matrix.mul_(self.columns.to(matrix))


def norm_ratios(floats: Tensor, base: Tensor) -> list[Tensor]:  # (n,), (n,) -> (n,) float32 each
    """What columns fed by a norm are scaled by where its weight became another: by its own ratio, in full. Of weights
    that have one added to them, as in Gemma, it is that of the sums; both, where both can be."""
    found = []
    for added in (0.0, 1.0):
        over, under = floats.detach().double() + added, base.detach().double() + added
        ratio = torch.where((over == 0) & (under == 0), 1.0, over / under)
        if ratio.isfinite().all() and (ratio > 0).all():
            found.append(ratio.float())
    return found


def scales_of(
    layers: Iterable[tuple[str, Tensor, Tensor]],  # name, float weight and what its base computes with, (out, in) each
    ratios: Sequence[Tensor],
) -> dict[str, Scales]:
    """Layer → the scales that make its float weight what its base was made of, as few as do about as well as any.

    Those of columns are a norm's ratio or none, and those of rows none, where that leaves no more than ``AS_WELL`` of
    the rounding error beside what a scale for each row and column leaves: a scale that is fitted takes what of the
    error looks like one with it, one part in out of a column's and in in of a row's. Where only a fit will do, of rows
    of one layer and of columns of another, and one of these could be the other's reciprocal, it is one fit to both.

    Args:
        layers: Gone through once, one layer in memory at a time.
        ratios: :func:`norm_ratios` of all norms.
    """
    fits = {name: _fitted(weight, quantized, ratios) for name, weight, quantized in layers}
    scales = {name: fit.scales for name, fit in fits.items()}
    before = {name: fit for name, fit in fits.items() if fit.free == "rows"}
    for name, fit in fits.items():
        joint = {other: _joint(earlier, fit) for other, earlier in before.items()} if fit.free == "columns" else {}
        alike = {other: found for other, found in joint.items() if found[1] <= AS_WELL}
        if alike:
            other = min(alike, key=lambda one: alike[one][1])
            columns = alike[other][0]
            scales[name], scales[other] = Scales(None, columns), Scales(1 / columns, scales[other].columns)
    return scales


@dataclass(frozen=True)
class _Fit:
    """Scales of one layer.

    Attributes:
        scales: Of it.
        missed: ‖quantised − scaled‖².
        free: Which of the scales are fitted: "", "rows", "columns" or "both".
        stiffness: Of each scale that is fitted, if only rows' or columns' are: by how much of ``missed`` that grows
            with the square of a change.
    """

    scales: Scales
    missed: float
    free: str = "both"
    stiffness: Tensor | None = None


def _fitted(weight: Tensor, quantized: Tensor, ratios: Sequence[Tensor]) -> _Fit:
    squares, products = weight.square(), weight * quantized
    energy = float(quantized.norm()) ** 2
    ones, each = weight.new_ones(len(weight)), weight.new_ones(weight.shape[1])

    def fitted_rows(columns: Tensor) -> Tensor:
        return (products @ columns) / (squares @ columns.square()).clamp_min(1e-30)

    def fitted_columns(rows: Tensor) -> Tensor:
        return (rows @ products) / (rows.square() @ squares).clamp_min(1e-30)

    def fit(rows: Tensor | None, columns: Tensor | None, free: str = "both") -> _Fit:
        left, right = ones if rows is None else rows, each if columns is None else columns
        told, own = (x.cpu().double() for x in (left * (products @ right), left.square() * (squares @ right.square())))
        missed = max(energy + float((own - 2 * told).sum()), ROUNDING * energy, 1e-30)
        stiffness = {"rows": squares @ right.square(), "columns": left.square() @ squares}.get(free)
        return _Fit(Scales(rows, columns), missed, free, None if stiffness is None else stiffness / missed)

    rows, columns = ones, each
    for _ in range(STEPS):
        columns = fitted_columns(rows)
        rows = fitted_rows(columns)
    most = fit(rows, columns)

    weights = rows.square() @ squares
    fed = [ratio.to(weight) for ratio in ratios if len(ratio) == len(each)]
    likeness = [float((weights * columns * ratio).sum().square() / (weights @ ratio.square())) for ratio in fed]
    known = [None, *fed[likeness.index(max(likeness)) :][:1]] if fed else [None]  # the ratio that is most like them
    for fewer in (
        [fit(None, told, "") for told in known],
        [fit(fitted_rows(each if told is None else told), told, "rows") for told in known],
        [fit(None, fitted_columns(ones), "columns")],
    ):
        best = min(fewer, key=lambda one: one.missed)
        if best.missed <= (1 + AS_WELL) * most.missed:
            return best
    return most


def _joint(before: _Fit, after: _Fit) -> tuple[Tensor, float]:  # (n,) float32, ...
    """The scales of one layer's columns whose reciprocals are those of another's rows, fitted to both, and the largest
    share that one of them misses more for it, infinite where they cannot be. Logarithms are averaged by precision."""
    found = before.scales.rows, before.stiffness, after.scales.columns, after.stiffness
    rows, of_rows, columns, of_columns = (x.cpu() for x in found if x is not None)
    if rows.shape != columns.shape or rows.min() <= 0 or columns.min() <= 0:
        return columns, math.inf
    by_rows, by_columns = of_rows * rows.square(), of_columns * columns.square()
    total = (by_rows + by_columns).clamp_min(1e-30)
    common = ((by_columns * columns.log() - by_rows * rows.log()) / total).exp()
    more = (of_rows @ (1 / common - rows).square(), of_columns @ (common - columns).square())
    return common, max(map(float, more))
