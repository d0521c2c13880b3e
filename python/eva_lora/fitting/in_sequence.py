"""Layers fitted one part of the model after the other, each on what the parts before it give once they are repaired."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from ..adapters import LoraAdapter, LoraSite
from ..collecting import Change, Visits
from ..planning import EvaStatistics
from .layer_fit import LayerFit
from .measuring import added_by

__all__ = ["fit_in_sequence"]


class _Part:
    """An adapter of which some layers are looked at."""

    def __init__(self, adapter: LoraAdapter, sites: list[LoraSite]) -> None:
        self._adapter, self.sites = adapter, sites
        self.left_alone: dict[str, str] = {}  # which the whole has said
        self.invocation = getattr(adapter, "invocation", None)

    def disabled(self) -> AbstractContextManager[None]:
        return self._adapter.disabled()


def fit_in_sequence(
    adapter: LoraAdapter,
    visits: Visits,
    batches: Sequence[Any],
    passes: int,
    collected: Callable[[Any, Iterator[Any]], EvaStatistics],
    fitted: Callable[[Sequence[LoraSite], EvaStatistics], Mapping[str, LayerFit]],
    repaired: Callable[[LayerFit, int], int],
) -> tuple[EvaStatistics, dict[str, LayerFit]]:
    """Fit a model's layers in the order in which a forward calls them, in ``passes`` parts of about as many layers.

    The inputs of a part's layers are those of the quantised model with all parts before it repaired.

    Args:
        adapter, visits: Of the model.
        batches: Run once for each part.
        passes: At most as many as there are layers count.
        collected: (adapter, batches) → statistics of the adapter's layers' inputs.
        fitted: (layers, their statistics) → their fits.
        repaired: (a layer's fit, its rank) → how many directions repair.

    Returns:
        The statistics of all parts as one, and all fits.
    """
    called = {name: place for place, name in enumerate(visits.order(batches[0]))}
    sites = sorted(adapter.sites, key=lambda site: called.get(site.name, len(called)))
    passes = min(passes, len(sites))
    whole: EvaStatistics | None = None
    fits: dict[str, LayerFit] = {}
    changes: dict[str, Change] = {}
    for k in range(passes):
        part = sites[k * len(sites) // passes : (k + 1) * len(sites) // passes]
        with visits.changed(changes):
            statistics = collected(_Part(adapter, part), iter(batches))
        whole = statistics if whole is None else _together(whole, statistics)
        mine = fitted(part, statistics)
        fits |= mine
        ranks = {site.name: site.rank for site in part}
        for name, fit in mine.items():
            a, b = fit.factors(repaired(fit, ranks[name]))
            changes |= added_by({name: (a, b, fit.bias(len(a)))})
    assert whole is not None
    order = [site.name for site in adapter.sites]
    return replace(whole, sites=sorted(whole.sites, key=lambda site: order.index(site.name))), fits


def _together(first: EvaStatistics, second: EvaStatistics) -> EvaStatistics:
    """Statistics of layers of which no two share an input, from passes over the same batches."""
    start = len(first.inputs)
    moved = [replace(s, inputs=tuple(i + start if i >= 0 else i for i in s.inputs)) for s in second.sites]
    return replace(first, sites=[*first.sites, *moved], inputs=[*first.inputs, *second.inputs])
