"""LoRA that starts from the gradients of a loss, in steps: passes → A and B → does a step lower the loss?"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import BaseWeight, LoraSite
from .collecting import Change, GradientPasses, LossFn, LowRankChange, Visits, gradient_batches
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
        plan: A and B of every layer, part by part.
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
    bases: Mapping[str, Sequence[BaseWeight]],
    loader: Iterable[Any],
    config: EvaConfig,
    loss_fn: LossFn | None = None,
    process_group: ProcessGroup = None,
) -> Descent:
    """Plan A and B from the gradients of a loader's first batches; the model stays as it is.

    Args:
        bases: Layer → the base weight of each of its parts.

    Raises:
        TypeError, ValueError: as :func:`eva_lora.initialize`.
    """
    ranks = joined(process_group)
    batches = together(ranks, lambda: gradient_batches(loader, config.max_batches or DEFAULT_BATCHES))
    passes = GradientPasses(adapter, model, batches, loss_fn, ranks)
    visits = Visits(adapter, model, config)
    matrices = {
        name: base for site in adapter.sites for name, base in zip(site.matrix_names, bases[site.name], strict=True)
    }
    shapes = {name: (base.out_features, base.in_features) for name, base in matrices.items()}
    given = {site.name: site.rank for site in adapter.sites}
    scalings: dict[str, float] = adapter.scalings()
    sparse = [name for site in adapter.sites if len(bases[site.name]) > 1 for name in site.matrix_names]
    losses: list[float] = []

    def run(asked: Mapping[str, Any]) -> dict[str, Tensor]:
        told = passes.run(asked)
        losses[:] = [told.loss]
        return told.products

    def read(name: str) -> Tensor:
        with visits.still():
            return matrices[name].read()

    with passes.frozen():
        if method.moves_ranks:
            given = ranks_by_importance(importances(run, shapes, read), shapes, adapter.sites, config)
        ranks_of = {name: given[site.name] for site in adapter.sites for name in site.matrix_names}
        scalings_of = {name: scalings[site.name] for site in adapter.sites for name in site.matrix_names}
        if method.moves_ranks:
            fits = fit_drawn(method, run, shapes, ranks_of, scalings_of, config)
        else:
            fits = fit_leading(method, run, shapes, ranks_of, scalings_of, config, sparse)
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
    planned, lora_a, lora_b, notes = {}, {}, {}, []
    spent = there = 0
    for site in sites:
        name, rank, mine = site.name, ranks[site.name], [fits[matrix] for matrix in site.matrix_names]
        shares = torch.stack([fit.shares for fit in mine]).mean(0).tolist()
        planned[name] = PlannedSite(name, rank, site.rank, site.in_features, tuple(shares), 0, site.parts)
        lora_a[name] = torch.cat([fit.lora_a.cpu() for fit in mine])
        lora_b[name] = torch.cat([fit.lora_b.cpu() for fit in mine])
        cost = sum(sum(shapes[matrix]) for matrix in site.matrix_names)
        spent, there = spent + rank * cost, there + site.rank * cost
        if lacking := [part for part, fit in enumerate(mine) if fit.lacking]:
            notes.append(
                f"{name}: the gradients of parts {lacking} have fewer directions on these batches than are taken; what "
                "is left of A is drawn, what is left of B is zero"
            )
    if method.moves_ranks:
        notes = [f"ranks go by importance: A and B have {spent:,} parameters, {there:,} were configured", *notes]
    return EvaPlan(planned, lora_a, config, sum(ranks.values()), tuple(notes), lora_b)


def _steps(fits: Mapping[str, GradientFit], loss: float) -> dict[str, Change]:
    """Matrix → what a step adds to its outputs: B A x where it starts moved, else so much of −G's leading part that the
    loss would fall by a hundredth if it went on as it begins."""
    slope = sum(fit.slope for fit in fits.values())
    changes: dict[str, Change] = {}
    for name, fit in fits.items():
        a, b = (fit.lora_a, fit.lora_b) if fit.step is None else fit.step
        changes[name] = LowRankChange(a, b if fit.step is None else b * (LOWERED * abs(loss) / slope))
    return changes
