"""LoRA that starts from the gradients of a loss, in steps: passes → A and B → does a step lower the loss?"""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from .adapters import BaseWeight, LoraSite
from .collecting import GradientPasses, LossFn, Visits, gradient_batches
from .config import EvaConfig
from .distributed import ProcessGroup, joined, together
from .fitting import GradientFit, GradientMethod, fit_drawn, fit_leading, importances, ranks_by_importance
from .planning import EvaPlan, PlannedSite

__all__ = ["DEFAULT_BATCHES", "Descent", "descend"]

DEFAULT_BATCHES = 32  # of a loader, where max_batches does not say; a gradient is the more its own noise the fewer
LOWERED = 0.01  # of the loss, what the step that is tried would take off to first order


@dataclass(frozen=True)
class Descent:
    """What comes of the gradients.

    Attributes:
        plan: A and B of every layer.
        num_batches: Of this process.
        losses: The mean loss of the base, and after a step along what the layers start from.
    """

    plan: EvaPlan
    num_batches: int
    losses: tuple[float, float]


def descend(
    method: GradientMethod,
    adapter: Any,
    model: nn.Module,
    bases: Mapping[str, BaseWeight],
    loader: Iterable[Any],
    config: EvaConfig,
    loss_fn: LossFn | None = None,
    process_group: ProcessGroup = None,
) -> Descent:
    """Plan A and B from the gradients of a loader's first batches; the model stays as it is.

    Raises:
        TypeError, ValueError: as :func:`eva_lora.initialize`.
    """
    ranks = joined(process_group)
    batches = together(ranks, lambda: gradient_batches(loader, config.max_batches or DEFAULT_BATCHES))
    passes = GradientPasses(adapter, model, batches, loss_fn, ranks)
    visits = Visits(adapter, model, config)
    shapes = {site.name: (bases[site.name].out_features, bases[site.name].in_features) for site in adapter.sites}
    given = {site.name: site.rank for site in adapter.sites}
    scalings: dict[str, float] = adapter.scalings()
    losses: list[float] = []

    def run(asked: Mapping[str, Any]) -> dict[str, Tensor]:
        told = passes.run(asked)
        losses[:] = [told.loss]
        return told.products

    def read(name: str) -> Tensor:
        with visits.still():
            return bases[name].read()

    with passes.frozen():
        if method.moves_ranks:
            given = ranks_by_importance(importances(run, shapes, read), shapes, adapter.sites, config)
        fit = fit_drawn if method.moves_ranks else fit_leading
        fits = fit(method, run, shapes, given, scalings, config)
        before = losses[0]
        after = passes.loss(_steps(fits, before))
    if not after < before and (ranks is None or ranks.rank == 0):
        warnings.warn(
            f"method={method.name!r}: a step along what the layers start from does not lower the loss of these "
            f"batches: {before:.4g} before, {after:.4g} after it",
            stacklevel=3,
        )
    return Descent(_planned(method, adapter.sites, shapes, given, fits, config), len(batches), (before, after))


def _planned(
    method: GradientMethod,
    sites: Iterable[LoraSite],
    shapes: Mapping[str, tuple[int, int]],
    ranks: Mapping[str, int],
    fits: Mapping[str, GradientFit],
    config: EvaConfig,
) -> EvaPlan:
    planned = {
        site.name: PlannedSite(
            site.name, ranks[site.name], site.rank, site.in_features, tuple(fits[site.name].shares.tolist()), 0
        )
        for site in sites
    }
    notes: tuple[str, ...] = ()
    if method.moves_ranks:
        spent = sum(site.rank * sum(shapes[name]) for name, site in planned.items())
        there = sum(site.configured_rank * sum(shapes[name]) for name, site in planned.items())
        notes = (f"ranks go by importance: A and B have {spent:,} parameters, {there:,} were configured",)
    lora_a = {name: fit.lora_a.cpu() for name, fit in fits.items()}
    lora_b = {name: fit.lora_b.cpu() for name, fit in fits.items()}
    return EvaPlan(planned, lora_a, config, sum(ranks.values()), notes, lora_b)


def _steps(fits: Mapping[str, GradientFit], loss: float) -> dict[str, Any]:
    """Layer → what a step adds to its outputs: B A x where it starts moved, else so much of −G's leading part that the
    loss would fall by a hundredth if it went on as it begins."""
    slope = sum(fit.slope for fit in fits.values())
    changes = {}
    for name, fit in fits.items():
        a, b = (fit.lora_a, fit.lora_b) if fit.step is None else fit.step
        changes[name] = partial(_added, a, b if fit.step is None else b * (LOWERED * abs(loss) / slope))
    return changes


def _added(a: Tensor, b: Tensor, x: Tensor) -> Tensor:  # (r, in), (out, r), (..., in) -> (..., out)
    return (x.to(a.dtype) @ a.mT) @ b.mT
