"""A and B of one layer, fitted to the error of its quantised base."""

from dataclasses import dataclass

import torch
from torch import Tensor

from eva_kernels.low_rank_fit import SecondMoment, fit_low_rank
from eva_kernels.orthonormal import orthonormalize

from ..planning import InputStatistics

__all__ = ["LayerFit", "completed", "fit_layer", "no_preference"]

NO_ENERGY = 2.0**-40  # of the layer's output: directions with less are rounding


@dataclass(frozen=True)
class LayerFit:
    """What a layer could repair with each number of directions.

    Attributes:
        left: U, (out, k) float32: orthonormal columns.
        right: Uᵀ M, (k, in) float32, with M the float weight less the quantised one.
        energies: (k,) float64: of E‖M x‖², what each direction gives back.
        total: E‖M x‖².
        mean_error: M x̄, (out,) float32, which a bias gives back. None where there is none to do so.
        output: E‖W x‖², of the float weight.
        variance: Mean of E x² over the features.
        weight_error: ‖M‖ / ‖W‖.
    """

    left: Tensor
    right: Tensor
    energies: Tensor
    total: float
    output: float
    variance: float
    weight_error: float
    mean_error: Tensor | None = None

    @property
    def shares(self) -> Tensor:  # (k,) float64
        """Of the output's energy, what each direction gives back."""
        return self.energies / self.output if self.output > 0 else torch.zeros_like(self.energies)

    def error(self, rank: int) -> float:
        """Of the output's energy, what is wrong with that many directions repaired, on the rows of the fit. Where there
        is a bias, it is told of the mean error; but without any direction there is none."""
        repaired = float(self.energies[:rank].sum())
        if rank and self.mean_error is not None:
            repaired += _square(self.mean_error)
        return max(0.0, self.total - repaired) / self.output if self.output > 0 else 0.0

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:  # (r, in), (out, r)
        """A and B of the leading directions that give back anything at all, at most ``rank``.

        A = D^−½ Uᵀ M and B = U D^½, with D the singular values of M R^½ where R has a mean diagonal of 1: for inputs
        without preference the singular values of M, as in LoftQ (arXiv 2310.08659). B A = U Uᵀ M, whatever D is.
        """
        rank = min(rank, int((self.energies > NO_ENERGY * self.output).sum()))
        scale = (self.energies[:rank] / max(self.variance, 1e-300)).sqrt().sqrt().to(self.left)
        return self.right[:rank] / scale[:, None], self.left[:, :rank] * scale

    def bias(self, rank: int) -> Tensor | None:  # (out,)
        """What makes the mean output right beside that many directions: (M − U Uᵀ M) x̄. None where there is no bias."""
        if self.mean_error is None:
            return None
        left = self.left[:, :rank]
        return self.mean_error - left @ (left.T @ self.mean_error)


def fit_layer(
    weight: Tensor,  # (out, in) float32
    quantized: Tensor,  # (out, in) float32
    moment: SecondMoment,
    directions: int,
    mean: Tensor | None = None,  # (in,) float32
) -> LayerFit:
    """Fit a layer's weight error where its inputs see it. ``weight`` is overwritten.

    Args:
        weight: The float weight.
        quantized: What the layer computes with.
        moment: Of the layer's inputs: not centred, but where there is a bias.
        directions: Most that will be asked for.
        mean: Of the inputs, where a bias beside B can give back what the error makes of it: the directions are then
            those that are best beside that bias, for E‖M x + c‖² over c is least at c = −M x̄, and then tr(M C Mᵀ) with
            the covariance C.
    """
    moment = SecondMoment(moment.factor.to(weight.device), moment.rest.to(weight.device))
    output, norm = float(moment.energy(weight)), float(weight.norm())
    mean = None if mean is None else mean.to(weight)
    seen = 0.0 if mean is None else _square(weight @ mean)
    error = weight.sub_(quantized)
    wrong = None if mean is None else error @ mean
    fit = fit_low_rank(error, moment, min(directions, *error.shape))
    return LayerFit(
        fit.left.cpu(), fit.right.cpu(), fit.energies.cpu(),
        float(fit.total) + (0.0 if wrong is None else _square(wrong)), output + seen,
        moment.trace() / error.shape[1], float(error.norm()) / norm if norm else 0.0,
        None if wrong is None else wrong.cpu(),
    )  # fmt: skip


def _square(x: Tensor) -> float:
    return float(x.cpu().double().square().sum())


def no_preference(in_features: int) -> SecondMoment:
    """R = I: of inputs nothing is known."""
    factor = torch.empty(in_features, 0, dtype=torch.float32, device="cpu")
    return SecondMoment(factor, torch.ones((), dtype=torch.float32, device="cpu"))


def completed(
    a: Tensor,  # (k, in)
    b: Tensor,  # (out, k)
    rank: int,
    statistics: InputStatistics | None,
    seed: int,
) -> tuple[Tensor, Tensor]:  # (rank, in), (out, rank)
    """A and B with directions added that start as in EVA: B zero, A's rows the leading principal directions of what
    the rows of ``a`` leave of the inputs, orthonormal; random ones where those end, or nothing is known."""
    missing = rank - len(a)
    if missing <= 0:
        return a, b
    device, a, b = a.device, a.cpu(), b.cpu()
    width = a.shape[1]
    known = a.new_zeros(width, 0)
    if statistics is not None:
        known = (statistics.components.T * statistics.eigenvalues.clamp_min(0).sqrt().float()).to(a)
    taken = orthonormalize(a.T.contiguous()) if len(a) else a.new_zeros(width, 0)
    for _ in range(2):
        known = known - taken @ (taken.T @ known)
    left, values, _ = torch.linalg.svd(known.double(), full_matrices=False)
    few = values > values.max() * torch.finfo(torch.float32).eps * width if values.numel() else values > 0
    principal = left[:, few][:, :missing].to(a)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(width, missing - principal.shape[1], generator=generator, dtype=torch.float32, device="cpu")
    basis = orthonormalize(torch.cat([taken, principal, noise.to(a)], 1))
    rows = basis[:, len(a) :].T
    return torch.cat([a, rows]).to(device), torch.cat([b, b.new_zeros(len(b), missing)], 1).to(device)
