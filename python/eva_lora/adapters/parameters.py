"""Adapters whose layers keep A and B as parameters: most implementations, and anybody's own."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .sites import LoraSite

if TYPE_CHECKING:
    from ..planning import EvaPlan, PlannedSite

__all__ = ["ParameterSite", "SiteAdapter", "check_plan"]


@dataclass(frozen=True)
class ParameterSite(LoraSite):
    """A layer that keeps A and B as parameters and computes B A x from them.

    Make it with :meth:`of`. A rank that changes means new parameters in the same places.

    Attributes:
        a, b: Where A and B are, as paths from :attr:`module`: ``"A"``, or ``"lora_A.weight"``.
        transposed: A is (d, rank) and B (rank, out), not (rank, d) and (out, rank).
        rank_names, alpha_name, scaling_name: Attributes of :attr:`module` that hold the rank, alpha, and what
            B A x is multiplied with, as far as it has them.
        linear_in_rank: The scaling is alpha / rank; False: alpha / √rank.
    """

    a: str = "A"
    b: str = "B"
    transposed: bool = False
    rank_names: tuple[str, ...] = ()
    alpha_name: str | None = None
    scaling_name: str | None = None
    linear_in_rank: bool = True

    @classmethod
    def of(
        cls,
        name: str,
        module: nn.Module,
        a: str = "A",
        b: str = "B",
        *,
        transposed: bool = False,
        rank: str | Sequence[str] = (),
        alpha: str | None = None,
        scaling: str | None = None,
        linear_in_rank: bool = True,
        rank_multiple: int = 1,
    ) -> "ParameterSite":
        """The site of a layer, its width and rank read from A. Arguments are the attributes of this class.

        Raises:
            TypeError: A or B is no matrix parameter.
            ValueError: their shapes do not fit each other.
        """
        first, second = (_matrix(name, module, path) for path in (a, b))
        if transposed:
            first, second = first.T, second.T
        if first.shape[0] != second.shape[1]:
            hint = "" if transposed else "; are they stored transposed?"
            raise ValueError(
                f"layer {name}: expected {a} and {b} of one rank, got {first.shape[0]} and {second.shape[1]}{hint}"
            )
        return cls(
            name, module, first.shape[1], first.shape[0], rank_multiple, False, 1, a, b, transposed,
            (rank,) if isinstance(rank, str) else tuple(rank), alpha, scaling, linear_in_rank,
        )  # fmt: skip

    @property
    def factors(self) -> list[nn.Parameter]:
        """A and B."""
        return [_get(self.module, path) for path in (self.a, self.b)]

    def write(self, rank: int, lora_a: Tensor | None, *, adjust_scaling: bool) -> None:
        """Set the rank, A to ``lora_a`` (parts · rank, d; None: as it is) and B to zero.

        With ``adjust_scaling`` the layer's scaling stays what it was; without, alpha does.
        """
        old_a, old_b = self.factors
        dim = 1 if self.transposed else 0
        if rank != self.rank:
            for path, old, along in ((self.a, old_a, dim), (self.b, old_b, 1 - dim)):
                shape = list(old.shape)
                shape[along] = rank
                _replace(self.module, path, nn.Parameter(old.new_empty(shape), requires_grad=old.requires_grad))
            self._rescale(rank, adjust_scaling)
        new_a, new_b = self.factors
        if lora_a is not None:
            new_a.copy_(lora_a.T if self.transposed else lora_a)
        new_b.zero_()

    def _rescale(self, rank: int, adjust: bool) -> None:
        growth = rank / self.rank
        if not self.linear_in_rank:
            growth = math.sqrt(growth)
        for name in self.rank_names:
            setattr(self.module, name, rank)
        if adjust and self.alpha_name is not None:
            alpha = getattr(self.module, self.alpha_name) * growth
            setattr(self.module, self.alpha_name, int(alpha) if float(alpha).is_integer() else alpha)
        if not adjust and self.scaling_name is not None:
            setattr(self.module, self.scaling_name, getattr(self.module, self.scaling_name) / growth)

    def snapshot(self) -> dict[str, Any]:
        """What :meth:`restore` needs to undo :meth:`write`."""
        names = (*self.rank_names, self.alpha_name, self.scaling_name)
        return {
            "factors": [(factor, factor.detach().clone()) for factor in self.factors],
            "attributes": {name: getattr(self.module, name) for name in names if name is not None},
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        for path, (factor, value) in zip((self.a, self.b), snapshot["factors"], strict=True):
            factor.data.copy_(value)
            _replace(self.module, path, factor)
        for name, value in snapshot["attributes"].items():
            setattr(self.module, name, value)


class SiteAdapter:
    """An adapter that is nothing but its sites.

    The model computes what its base computes while every B is zero, so that is how it is switched off.

    Raises:
        TypeError: ``sites`` is no sequence of :class:`LoraSite`.
        ValueError: it is empty, or names a site twice.
    """

    def __init__(self, sites: Sequence[LoraSite]) -> None:
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
        self.left_alone: dict[str, str] = {}
        self.eva_config = None

    @contextmanager
    def disabled(self) -> Iterator[None]:
        second = [site.factors[1] for site in self.sites if isinstance(site, ParameterSite)]
        values = [factor.detach().clone() for factor in second]
        try:
            for factor in second:
                factor.data.zero_()
            yield
        finally:
            for factor, value in zip(second, values, strict=True):
                factor.data.copy_(value)

    def writable(self) -> list[ParameterSite]:
        """The sites, all of which can be written.

        Raises:
            TypeError: some can only be watched.
        """
        writable = [site for site in self.sites if isinstance(site, ParameterSite)]
        if len(writable) < len(self.sites):
            kinds = sorted({type(site).__name__ for site in self.sites} - {type(site).__name__ for site in writable})
            raise TypeError(f"sites: expected ParameterSite, which can be written, got {kinds}")
        return writable

    @torch.no_grad()
    def apply(self, plan: "EvaPlan") -> None:
        """Write A, zero B and set the ranks: all of it, or nothing.

        Raises:
            TypeError: a site that cannot be written (no :class:`ParameterSite`).
            ValueError: the plan is for other layers, or for layers of another rank or width.
        """
        check_plan(plan, self.sites)
        writable = self.writable()
        snapshots = [site.snapshot() for site in writable]
        try:
            for site in writable:
                planned: PlannedSite = plan.sites[site.name]
                site.write(planned.rank, plan.lora_a.get(site.name), adjust_scaling=plan.config.adjust_scaling_factors)
        except BaseException:
            for site, snapshot in zip(writable, snapshots, strict=True):
                site.restore(snapshot)
            raise


def check_plan(plan: "EvaPlan", sites: Sequence[LoraSite]) -> None:
    """Whether a plan was made for these sites.

    Raises:
        ValueError: for others, or for sites of another rank, width or number of parts, or ones that cannot
            have the rank it gives them.
    """
    names = {site.name for site in sites}
    missing, unknown = sorted(names - set(plan.sites)), sorted(set(plan.sites) - names)
    if missing or unknown:
        raise ValueError(
            f"plan: it is for other layers than the model's: not in the plan {missing}, not in the model {unknown}"
        )
    for site in sites:
        planned = plan.sites[site.name]
        if (planned.configured_rank, planned.in_features) != (site.rank, site.in_features):
            raise ValueError(
                f"plan: {site.name} was planned from rank {planned.configured_rank} and width {planned.in_features}, "
                f"the model has rank {site.rank} and width {site.in_features}"
            )
        if planned.parts != site.parts:
            raise ValueError(f"plan: {site.name} was planned with {planned.parts} parts, the model has {site.parts}")
        if planned.rank % site.rank_multiple or (planned.rank == 0 and not site.removable):
            floor = "" if site.removable else " and not 0"
            raise ValueError(
                f"plan: {site.name} is given rank {planned.rank}, it must be a multiple of {site.rank_multiple}{floor}"
            )


def _get(module: nn.Module, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _matrix(name: str, module: nn.Module, path: str) -> Tensor:
    try:
        value = _get(module, path)
    except AttributeError:
        raise ValueError(f"layer {name}: expected a parameter {path}, a {type(module).__name__} has none") from None
    if not isinstance(value, nn.Parameter) or value.ndim != 2:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"layer {name}: expected {path} to be a matrix parameter, got {got}")
    return value


def _replace(module: nn.Module, path: str, parameter: nn.Parameter) -> None:
    owner_path, _, name = path.rpartition(".")
    owner = _get(module, owner_path) if owner_path else module
    setattr(owner, name, parameter)
    if isinstance(owner, nn.Linear):
        owner.out_features, owner.in_features = parameter.shape
