"""An adapter that is nothing but its sites: of the libraries that keep A and B as parameters, and anybody's own."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..planning import EvaPlan, PlannedSite
from .answers import Answers
from .base_weights import BaseWeight
from .parameters import ParameterSite
from .plan_check import check_plan
from .preflight import require_no_optimizer
from .sites import LeftAlone, LoraSite, Patches

__all__ = ["SiteAdapter"]


class SiteAdapter:
    """An adapter that is nothing but its sites.

    The model computes what its base computes while every B is zero, so that is how it is switched off.

    Args:
        sites: Its layers.
        left_alone: Name → reason of layers that EVA does not apply to.

    Raises:
        TypeError: ``sites`` is no sequence of :class:`LoraSite`.
        ValueError: it is empty, or names a site twice.
    """

    def __init__(self, sites: Sequence[LoraSite], left_alone: Mapping[str, str] | None = None) -> None:
        if not isinstance(sites, Sequence) or not all(isinstance(site, LoraSite) for site in sites):
            kinds = [type(s).__name__ for s in sites] if isinstance(sites, Sequence) else type(sites).__name__
            raise TypeError(f"sites: expected a list of LoraSite, got {kinds}")
        if not sites:
            raise ValueError("sites: expected at least one LoraSite, got none")
        names = [site.name for site in sites]
        if len(set(names)) < len(names):
            raise ValueError(
                f"sites: expected unique names, got {sorted({n for n in names if names.count(n) > 1})} twice"
            )
        self.sites = list(sites)
        self.left_alone: dict[str, str] = dict(left_alone or {})
        self.eva_config = None

    def zero_before_training(self) -> dict[str, list[Tensor]]:
        """Layer → its B, as far as it is known where that is."""
        return {site.name: list(site.second) for site in self.sites if isinstance(site, ParameterSite)}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        second = [factor for site in self.sites if isinstance(site, ParameterSite) for factor in site.second]
        values = [factor.detach().clone() for factor in second]
        try:
            for factor in second:
                factor.data.zero_()
            yield
        finally:
            for factor, value in zip(second, values, strict=True):
                factor.data.copy_(value)

    def base_weights(self) -> tuple[dict[str, BaseWeight], dict[str, str]]:
        """Layer → its base weight, and layer → why it has none: as they are within :meth:`disabled`."""
        found, without = {}, {}
        for site in self.sites:
            one = isinstance(site, ParameterSite) and site.row_maker is None and site.groups == site.parts == 1
            if not isinstance(site, ParameterSite) or not one:
                without[site.name] = "its B A is not one matrix that is multiplied with its inputs"
            elif len(site.second) > 1:
                without[site.name] = "it has several matrices B"
            else:
                (b,) = site.second
                out = b.shape[1] if site.transposed else b.shape[0]
                found[site.name] = BaseWeight(
                    site.name, site.module, site.in_features, out, b.dtype, matrix_is_weight=False
                )
        return found, without

    def writable(self) -> list[ParameterSite]:
        """The sites, all of which can be written.

        Raises:
            TypeError: some can only be watched.
            ValueError: an optimizer holds their parameters.
        """
        writable = [site for site in self.sites if isinstance(site, ParameterSite)]
        if len(writable) < len(self.sites):
            kinds = sorted({type(site).__name__ for site in self.sites} - {type(site).__name__ for site in writable})
            raise TypeError(f"sites: expected ParameterSite, which can be written, got {kinds}")
        # Some libraries keep their parameters outside of the model, under names of their own.
        require_no_optimizer([(f"A or B of {s.name}", p) for s in writable for p in (*s.first, *s.second)])
        return writable

    @torch.no_grad()
    def apply(self, plan: EvaPlan) -> Callable[[], None]:
        """Write A, zero B and set the ranks: all of it, or nothing.

        Returns:
            What undoes it.

        Raises:
            TypeError: a site that cannot be written (no :class:`ParameterSite`).
            ValueError: the plan is for other layers, or for layers of another rank or width.
        """
        check_plan(plan, self.sites)
        writable = self.writable()
        snapshots = [site.snapshot() for site in writable]

        @torch.no_grad()
        def undo() -> None:
            for site, snapshot in zip(writable, snapshots, strict=True):
                site.restore(snapshot)

        try:
            for site in writable:
                planned: PlannedSite = plan.sites[site.name]
                site.write(planned.rank, plan.lora_a.get(site.name), adjust_scaling=plan.config.adjust_scaling_factors)
                if site.name in plan.lora_b:
                    site.write_second(plan.lora_b[site.name])
        except BaseException:
            undo()
            raise
        return undo

    def matrices(self) -> tuple[dict[str, tuple[BaseWeight, ...]], dict[str, str]]:
        """Layer → for each of its pairs of A and B, what of the base weight it is added to; and layer → why that is not
        known: as they are within :meth:`disabled`.

        Raises:
            ValueError: what a layer adds to its base's output is no multiple of B A x.
        """
        found, without = {}, {}
        for site in self.writable():
            try:
                found[site.name] = site.matrices(self._answers(site))
            except LeftAlone as reason:
                without[site.name] = str(reason)
        return found, without

    def scalings(self) -> dict[str, float]:
        """Layer → what it multiplies B A x with."""
        return {site.name: self._answers(site).scaling for site in self.writable()}

    @staticmethod
    def _answers(site: ParameterSite) -> Answers:
        if not isinstance(site.row_maker, Patches | None):
            raise LeftAlone("its B A is not multiplied with the patches that its base layer sees")
        if getattr(site.owner, "merged", False):
            raise LeftAlone("its adapter is merged, so that A and B do nothing; unmerge it first")
        return site.answers()

    def kept_whole(self) -> str:
        """Why no part of a base weight is moved into A and B here."""
        return "what such a library saves of an adapter is A and B alone"

    def hold(self, plan: EvaPlan) -> None:
        """Have the first half of each rank trained, and hold the second; none of a plan's is 0 here."""
        for site in self.writable():
            site.hold()

    def freeze_second(self) -> None:
        """Leave each B as it is in training."""
        for site in self.writable():
            for b in site.second:
                b.requires_grad_(False)
