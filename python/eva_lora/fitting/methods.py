"""Ways to start A and B from a layer's weight W and the second moment R of its inputs: one table, one fit.

With U the singular vectors of M R^(p/2) at one end, on the side of the outputs, and D the singular values there,
B = U D^a and A = D^−a Uᵀ M, so that B A = U Uᵀ M whatever a is.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from eva_kernels._double import double, home_of, like
from eva_kernels.low_rank_fit import SecondMoment, fit_image
from eva_kernels.singular_ends import SingularEnd, leading_singular, trailing_singular

__all__ = ["METHODS", "GradientMethod", "Method", "MethodFit", "Moment", "fit_method", "known_directions"]

NO_ENERGY = 1e-300
ENERGIES = 1e-24, 1e24  # of an entry: beyond, squares of squares leave float32
ENDS: dict[str, Callable[[Tensor, int], SingularEnd]] = {"top": leading_singular, "bottom": trailing_singular}

Moment = SecondMoment | Tensor  # R in parts, as far as it is known; or whole: (in, in) float64


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: As the user writes it.
        data: What it asks of the inputs: nothing; their second moment, as far as a pass that follows leading directions
            knows it; all of it, each direction; the second moments of two sets; or the gradients of a loss on them.
        power: p of R.
        end: Of the spectrum, that is taken.
        exponent: a. None: B = U and A = 0, and B stays as it is in training.
        base: What the base weight becomes: "less" s B A, or "kept".
        matrix: M: the weight, the part of it that answers to the r directions which inputs have least of, or the
            gradient of the loss by it.
        paper: Where it is from.
    """

    name: str
    data: Literal["none", "leading", "all", "two sets", "gradients"]
    power: int
    end: Literal["top", "bottom"]
    exponent: float | None
    base: Literal["less", "kept"]
    matrix: Literal["weight", "silent part", "gradient"] = "weight"
    paper: str = ""

    @property
    def scores(self) -> bool:
        """Whether each direction has a score by which ranks can move between layers."""
        return self.end == "top" and self.data in ("none", "leading")


@dataclass(frozen=True)
class GradientMethod(Method):
    """A row whose M is G, the gradient of the loss by the weight.

    With G = U S Vᵀ and D = S over the largest of S: B = c U D^a and A = c D^a Vᵀ; −B where the start itself is a step.

    Attributes:
        taken: Which singular vectors A and B take, in ranks: (0, 1) is the first r for A and the next r for B. None: A
            is drawn and B A is what of −G A's rows hold, scaled.
        gamma: The paper's γ, of which c or that scale is made.
    """

    taken: tuple[int, int] | None = (0, 0)
    gamma: float = 1.0

    @property
    def blocks(self) -> int:
        """How many directions of G it takes for each of a layer's rank."""
        return 1 if self.taken is None else max(self.taken) + 1

    @property
    def moves_ranks(self) -> bool:
        """Whether it gives ranks itself."""
        return self.taken is None

    def scale(self, out_features: int) -> float:
        """c: of what is subtracted from W again m^¼ / √γ, else 1 / √γ."""
        return float((out_features**0.25 if self.base == "less" else 1.0) / self.gamma**0.5)


#: Name → row of the table of docs/methods.md.
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("pissa", "none", 0, "top", 0.5, "less", paper="arXiv 2404.02948"),
        Method("milora", "none", 0, "bottom", 0.5, "less", paper="arXiv 2406.09044"),
        Method("mica", "none", 0, "bottom", None, "kept", paper="arXiv 2604.01694"),
        Method("corda", "leading", 2, "top", 0.5, "less", paper="arXiv 2406.05223"),
        Method("corda-kpm", "all", 2, "bottom", 0.5, "less", paper="arXiv 2406.05223"),
        Method("astra", "all", 1, "bottom", 0.0, "less", paper="arXiv 2602.19111"),
        Method("sc-lora", "two sets", 1, "top", 0.0, "less", paper="arXiv 2505.23724"),
        Method("lora-null", "all", 0, "top", 0.5, "less", "silent part", paper="arXiv 2503.02659"),
        GradientMethod(
            "lora-ga", "gradients", 0, "top", 0.0, "less", "gradient", "arXiv 2407.05000", taken=(0, 1), gamma=16.0
        ),
        GradientMethod(
            "lora-ga-a2r", "gradients", 0, "top", 0.0, "less", "gradient", "arXiv 2407.05000", taken=(1, 0), gamma=16.0
        ),
        GradientMethod(
            "lora-one", "gradients", 0, "top", 0.5, "kept", "gradient", "arXiv 2502.01235", taken=(0, 0), gamma=128.0
        ),
        GradientMethod(
            "gora", "gradients", 0, "top", 0.0, "kept", "gradient", "arXiv 2502.12171", taken=None, gamma=0.05
        ),
    )
}


@dataclass(frozen=True)
class MethodFit:
    """What a method takes of a layer's weight.

    Attributes:
        left: U, (out, r) float32: orthonormal columns.
        right: Uᵀ M, (r, in) float32.
        values: D, (r,) float64.
        totals: ‖W‖², E‖W x‖² and the same of inputs that are to be kept: what the shares are of. Of inputs that are not
            known it says nothing.
        weight_shares: (r,) float64: of ‖W‖², what each direction of U Uᵀ M has.
        output_shares: (r,) float64: of E‖W x‖², what each has. None where no inputs are known.
        kept_shares: (r,) float64: the same of inputs that are to be kept. None where none are known.
    """

    left: Tensor
    right: Tensor
    values: Tensor
    totals: tuple[float, ...]
    weight_shares: Tensor
    output_shares: Tensor | None = None
    kept_shares: Tensor | None = None

    def factors(self, method: Method, rank: int, scaling: float) -> tuple[Tensor, Tensor]:  # (r, in), (out, r)
        """A, and B times the layer's scaling s: what a plan holds. 1/s goes half to A and half to B where a = ½, and
        nowhere where a = 0: B A is U Uᵀ M / s, or U Uᵀ M."""
        left, right, a = self.left[:, :rank], self.right[:rank], method.exponent
        if not a:
            return torch.zeros_like(right) if a is None else right.clone(), left * scaling
        floor = float(self.values.max()) * torch.finfo(torch.float32).eps or 1.0  # B A is the same whatever it is
        scale = (self.values[:rank].clamp_min(floor) * scaling).pow(a).to(left)
        return right / scale[:, None], left * scale


def fit_method(
    method: Method,
    weight: Tensor,  # (out, in) float32
    rank: int,
    moment: Moment | None = None,
    kept: Moment | None = None,
    beta: float = 0.0,
    name: str = "",
) -> MethodFit:
    """The method's U, Uᵀ M and D for one layer, on the weight's device; in float64 where more is known of inputs than
    leading directions.

    Args:
        moment: R; what the method does not ask for need not be known.
        kept: With "two sets": of inputs that are to be kept, R₋; R is then (1 − β) R₊ − β R₋, and directions are
            ordered by eigenvalues, which may be negative.
        beta: β.
        name: The layer's, for the error.

    Raises:
        ValueError: a weight that is not finite.
    """
    energy = _energy(weight)  # read for that, it says as well whether entries are finite
    if not math.isfinite(energy) and not bool(weight.isfinite().all()):
        raise ValueError(f"model: the weight of {name} holds NaN or Inf")
    if not ENERGIES[0] < energy / weight.numel() < ENERGIES[1] and bool(weight.any()):
        return _fit_scaled(method, weight, rank, moment, kept, beta)
    if isinstance(moment, SecondMoment) and (method.power, method.end, method.data) == (2, "top", "leading"):
        return _fit_leading(weight, energy, moment, rank)
    matrix = weight if method.data == "none" else double(weight)
    moment, kept = _beside(moment, matrix), _beside(kept, matrix)
    of_weight, of_kept = (None if known is None else _times(matrix, known) for known in (moment, kept))  # W R
    energy = energy if matrix is weight else _energy(matrix)
    totals = [energy if seen is None else float((matrix * seen).sum()) for seen in (None, of_weight, of_kept)]
    if method.matrix == "silent part":
        assert isinstance(moment, Tensor)
        silent = torch.linalg.eigh(moment)[1][:, :rank]
        matrix = (matrix @ silent) @ silent.mT
    if method.data == "two sets":
        assert of_weight is not None
        assert of_kept is not None
        outputs = ((1 - beta) * of_weight - beta * of_kept) @ matrix.mT
        values, vectors = torch.linalg.eigh((outputs + outputs.mT) / 2)
        left, values = vectors[:, -rank:].flip(-1), values[-rank:].flip(-1)
        right = left.mT @ matrix
    else:
        image = of_weight if method.power == 2 else _image(matrix, moment) if method.power == 1 else matrix
        assert image is not None
        left, right, values = ENDS[method.end](image, rank)
        right = right if image is matrix else left.mT @ matrix
    shares = [
        double((right * (right if known is None else _times(right, known))).sum(1)).cpu() / max(total, NO_ENERGY)
        for known, total in zip((None, moment, kept), totals, strict=True)
    ]
    return MethodFit(
        left.to(weight), right.to(weight), double(values).cpu(), tuple(totals), shares[0],
        None if moment is None else shares[1], None if kept is None else shares[2],
    )  # fmt: skip


def _fit_scaled(
    method: Method, weight: Tensor, rank: int, moment: Moment | None, kept: Moment | None, beta: float
) -> MethodFit:
    """The same of entries so large or small that squares of sums of them do not fit: times a power of two, and back."""
    shift = max(-126, min(126, -math.frexp(float(weight.abs().max()))[1]))
    scale, back = 2.0**shift, 2.0**-shift
    fit = fit_method(method, weight * scale, rank, moment, kept, beta)
    totals = tuple(total * back**2 for total in fit.totals)
    return replace(fit, right=fit.right * back, values=fit.values * back, totals=totals)


def _fit_leading(weight: Tensor, energy: float, moment: SecondMoment, rank: int) -> MethodFit:
    """Of M = W and p = 2, at the top."""
    moment = type(moment)(*(part.to(home_of(weight.device)) for part in moment))
    fit = fit_image(weight, moment, rank)
    squares = double(torch.linalg.vector_norm(fit.right, dim=1)).square().cpu()
    seen = double(torch.linalg.vector_norm(fit.right @ like(moment.factor, weight), dim=1)).square().cpu()
    totals = energy, float(fit.total)
    outputs = seen + squares * float(moment.rest)
    return MethodFit(
        fit.left, fit.right, fit.energies.sqrt().cpu(), totals, squares / max(totals[0], NO_ENERGY),
        outputs / max(totals[1], NO_ENERGY),
    )  # fmt: skip


def known_directions(moment: Tensor, rows: int) -> int:  # (n, n) float64
    """How many directions of inputs a second moment tells from rounding, from so many rows.

    It is asked with a diagonal of 1: what rounds off its entries, or off those of inputs in float32, goes with
    √(R_ii R_jj).
    """
    scale = moment.diagonal().clamp_min(0).sqrt()
    unit = moment / torch.outer(scale, scale).clamp_min(torch.finfo(torch.float64).tiny)
    rounding = len(moment) ** 0.5 * torch.finfo(torch.float64).eps + torch.finfo(torch.float32).eps ** 2
    return min(rows, int((torch.linalg.eigvalsh(unit) > rounding).sum()))


def _energy(matrix: Tensor) -> float:
    """‖M‖²."""
    return float(double(torch.linalg.vector_norm(matrix, dim=1)).square().sum())


def _beside(moment: Moment | None, matrix: Tensor) -> Moment | None:
    """The same in the matrix's dtype, on its device."""
    if isinstance(moment, SecondMoment):
        return SecondMoment(*(part.to(matrix) for part in moment))
    return None if moment is None else moment.to(matrix)


def _image(matrix: Tensor, moment: Moment | None) -> Tensor:  # (m, n) -> (m, k)
    """Y with Y Yᵀ = M R Mᵀ."""
    if isinstance(moment, SecondMoment):
        return torch.cat([matrix @ moment.factor, matrix * moment.rest.sqrt()], 1)
    return matrix if moment is None else matrix @ torch.linalg.cholesky(moment)


def _times(matrix: Tensor, moment: Moment) -> Tensor:  # (m, n)
    """M R."""
    if isinstance(moment, SecondMoment):
        return (matrix @ moment.factor) @ moment.factor.mT + matrix * moment.rest
    return matrix @ moment
