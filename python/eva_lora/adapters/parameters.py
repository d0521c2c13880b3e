"""Adapters whose layers keep A and B as parameters: most implementations, and anybody's own."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..planning import EvaPlan, PlannedSite
from .base_weights import BaseWeight
from .preflight import require_no_optimizer
from .sharded import fill_
from .sites import LoraSite, Rows

__all__ = ["ParameterSite", "SiteAdapter", "check_plan"]

LARGER = 256.0  # than the base's output, what B A x is made to be while its scaling is looked for


@dataclass(frozen=True)
class ParameterSite(LoraSite):
    """A layer that keeps A and B as parameters and computes B A x from them.

    Make it with :meth:`of`. A rank that changes means new parameters in the same places.

    Attributes:
        a, b: Where A and B are, as paths from :attr:`owner`: ``"A"``, or ``"lora_A.weight"``. Several of each, where
            matrices of one rank are fed the same rows.
        owner: The module that holds them and the attributes below.
        transposed: A is (d, rank) and B (rank, out), not (rank, d) and (out, rank).
        groups: Matrices stacked in one A, (groups · rank, d), all fed the same rows.
        rows_per_rank: Rows of A that the library counts as one rank.
        row_maker: How an input becomes rows, where it is not (..., d) already; ``rows`` returns it.
        rank_names, alpha_name, scaling_name: Attributes of :attr:`owner` that hold the rank, alpha, and what
            B A x is multiplied with, as far as it has them.
        linear_in_rank: The scaling is alpha / rank; False: alpha / √rank.
    """

    a: str | tuple[str, ...] = "A"
    b: str | tuple[str, ...] = "B"
    owner: nn.Module = None  # type: ignore[assignment]
    transposed: bool = False
    groups: int = 1
    rows_per_rank: int = 1
    row_maker: Rows | None = None
    rank_names: tuple[str, ...] = ()
    alpha_name: str | None = None
    scaling_name: str | None = None
    linear_in_rank: bool = True

    @classmethod
    def of(
        cls,
        name: str,
        module: nn.Module,
        a: str | tuple[str, ...] = "A",
        b: str | tuple[str, ...] = "B",
        *,
        owner: nn.Module | None = None,
        transposed: bool = False,
        groups: int = 1,
        rows_per_rank: int = 1,
        rows: Rows | None = None,
        rank: str | Sequence[str] = (),
        alpha: str | None = None,
        scaling: str | None = None,
        linear_in_rank: bool = True,
        rank_multiple: int = 1,
    ) -> "ParameterSite":
        """The site of a layer, its width and rank read from A. Arguments are the attributes of this class.

        ``module`` is the one whose calls are watched; it holds A and B too, unless ``owner`` does. A and B may be
        the weights of convolutions where ``rows`` says which patches their kernels see.

        Raises:
            TypeError: A or B is no matrix parameter.
            ValueError: their shapes do not fit each other.
        """
        owner = module if owner is None else owner
        shapes = set()
        for path_a, path_b in zip(_paths(a), _paths(b), strict=True):
            first, second = (_matrix(name, owner, path, rows is not None) for path in (path_a, path_b))
            if transposed:
                first, second = first.T, second.T
            stacked = f" and {groups} stacked matrices" if groups > 1 else ""
            if first.shape[0] != groups * second.shape[1]:
                hint = "" if transposed else "; are they stored transposed?"
                raise ValueError(
                    f"layer {name}: expected {path_a} and {path_b} of one rank{stacked}, got {first.shape[0]} and "
                    f"{second.shape[1]}{hint}"
                )
            shapes.add((second.shape[1], first[0].numel()))
        if len(shapes) > 1:
            raise ValueError(f"layer {name}: expected matrices of one rank and width, got {sorted(shapes)}")
        in_rank, width = shapes.pop()
        size = sum(_get(owner, path).numel() for path in (*_paths(a), *_paths(b)))
        return cls(
            name, module, width, in_rank, rank_multiple * rows_per_rank, False, 1, size // in_rank, a, b, owner,
            transposed, groups, rows_per_rank, rows, (rank,) if isinstance(rank, str) else tuple(rank), alpha, scaling,
            linear_in_rank,
        )  # fmt: skip

    @property
    def rows(self) -> Rows | None:
        return self.row_maker

    @property
    def first(self) -> list[nn.Parameter]:
        """The parameters A, most often one."""
        return [_get(self.owner, path) for path in _paths(self.a)]

    @property
    def second(self) -> list[nn.Parameter]:
        """The parameters B, one for each A."""
        return [_get(self.owner, path) for path in _paths(self.b)]

    def write(self, rank: int, lora_a: Tensor | None, *, adjust_scaling: bool) -> None:
        """Set the rank, A to ``lora_a`` (parts · rank, d; None: as it is) and B to zero.

        With ``adjust_scaling`` the layer's scaling stays what it was; without, alpha does.
        """
        if rank != self.rank:
            dim = 1 if self.transposed else 0
            for paths, along, size in ((self.a, dim, self.groups * rank), (self.b, 1 - dim, rank)):
                for path in _paths(paths):
                    old = _get(self.owner, path)
                    shape = list(old.shape)
                    shape[along] = size
                    _replace(self.owner, path, nn.Parameter(old.new_empty(shape), requires_grad=old.requires_grad))
            self.rescale(rank, adjust_scaling)
        for new_a, new_b in zip(self.first, self.second, strict=True):
            if lora_a is not None:
                matrix = lora_a.repeat(self.groups, 1)
                fill_(new_a, matrix.T if self.transposed else matrix.view(new_a.shape))
            new_b.zero_()

    def write_second(self, lora_b: Tensor) -> None:
        """Set B to what the layer scales to ``lora_b`` (out, rank); after :meth:`write`.

        Raises:
            ValueError: what the layer adds to its base's output is no multiple of B A x.
        """
        (b,) = self.second
        fill_(b, lora_b.T if self.transposed else lora_b)
        fill_(b, b / self._scaling(lora_b))

    def _scaling(self, lora_b: Tensor) -> float:
        """What the layer multiplies B A x with: seen in what it makes of the input that A answers most.

        Raises:
            ValueError: that is no multiple of B A x.
        """
        (a,), (b,) = self.first, self.second
        matrix = a.T if self.transposed else a
        x = torch.nn.functional.normalize(matrix.float().sum(0), dim=0).to(a.dtype)[None]
        values = b.detach().clone()
        with _without_dropout(self.module), torch.autocast(x.device.type, enabled=False):
            expected = (x.float() @ matrix.float().T) @ lora_b.to(x.device).T
            if not bool(expected.any()):
                return 1.0
            b.zero_()
            base = self.module(x).float()
            # So large that little of it is rounded off beside the base's output.
            larger = max(1.0, LARGER * float(base.norm() / expected.norm()))
            b.copy_(values * larger)
            seen = (self.module(x).float() - base) / larger
            b.copy_(values)
        scaling = float((seen * expected).sum() / expected.square().sum())
        if not scaling or bool((seen - scaling * expected).norm() > 2.0**-5 * seen.norm()):
            raise ValueError(f"layer {self.name}: what it adds to its base layer's output is no multiple of B A x")
        return scaling

    def rescale(self, rank: int, adjust: bool) -> None:
        """Set what of rank, alpha and scaling the layer keeps, for a new number of rows of A."""
        growth = rank / self.rank
        if not self.linear_in_rank:
            growth = math.sqrt(growth)
        for name in self.rank_names:
            setattr(self.owner, name, rank // self.rows_per_rank)
        if adjust and self.alpha_name is not None:
            alpha = getattr(self.owner, self.alpha_name)
            # Multiplied first: rounded once, so that an integer stays one.
            alpha = alpha * rank / self.rank if self.linear_in_rank else alpha * growth
            setattr(self.owner, self.alpha_name, int(alpha) if float(alpha).is_integer() else alpha)
        if not adjust and self.scaling_name is not None:
            setattr(self.owner, self.scaling_name, getattr(self.owner, self.scaling_name) / growth)

    def snapshot(self) -> dict[str, Any]:
        """What :meth:`restore` needs to undo :meth:`write`."""
        names = (*self.rank_names, self.alpha_name, self.scaling_name)
        factors = dict(zip((*_paths(self.a), *_paths(self.b)), (*self.first, *self.second), strict=True))
        return {
            "factors": {path: (factor, factor.detach().clone()) for path, factor in factors.items()},
            "attributes": {name: getattr(self.owner, name) for name in names if name is not None},
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        for path, (factor, value) in snapshot["factors"].items():
            factor.data.copy_(value)
            _replace(self.owner, path, factor)
        for name, value in snapshot["attributes"].items():
            setattr(self.owner, name, value)


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
    def apply(self, plan: EvaPlan) -> None:
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
                if site.name in plan.lora_b:
                    site.write_second(plan.lora_b[site.name])
        except BaseException:
            for site, snapshot in zip(writable, snapshots, strict=True):
                site.restore(snapshot)
            raise


def check_plan(plan: EvaPlan, sites: Sequence[LoraSite]) -> None:
    """Whether a plan was made for these sites, as they were or built with the ranks that it gives them.

    Raises:
        ValueError: for others, or for sites of another rank, width or number of parts, or ones that cannot
            have the rank it gives them.
    """
    names = {site.name for site in sites}
    removed = {name for name, planned in plan.sites.items() if planned.rank == 0}
    missing, unknown = sorted(names - set(plan.sites)), sorted(set(plan.sites) - names - removed)
    if missing or unknown:
        raise ValueError(
            f"plan: it is for other layers than the model's: not in the plan {missing}, not in the model {unknown}"
        )
    for site in sites:
        planned = plan.sites[site.name]
        if site.rank not in (planned.configured_rank, planned.rank) or planned.in_features != site.in_features:
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


@contextmanager
def _without_dropout(module: nn.Module) -> Iterator[None]:
    training = [member for member in module.modules() if member.training]
    for member in training:
        member.training = False  # not eval(), in which some libraries merge weights
    try:
        yield
    finally:
        for member in training:
            member.training = True


def _paths(path: str | tuple[str, ...]) -> tuple[str, ...]:
    return (path,) if isinstance(path, str) else path


def _get(module: nn.Module, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _matrix(name: str, module: nn.Module, path: str, convolution: bool) -> Tensor:
    try:
        value = _get(module, path)
    except AttributeError:
        raise ValueError(f"layer {name}: expected a parameter {path}, a {type(module).__name__} has none") from None
    if not isinstance(value, nn.Parameter) or (value.ndim < 2 if convolution else value.ndim != 2):
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"layer {name}: expected {path} to be a matrix parameter, got {got}")
    return value


def _replace(module: nn.Module, path: str, parameter: nn.Parameter) -> None:
    owner_path, _, name = path.rpartition(".")
    owner = _get(module, owner_path) if owner_path else module
    setattr(owner, name, parameter)
    if isinstance(owner, nn.Linear):
        owner.out_features, owner.in_features = parameter.shape
    elif isinstance(owner, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        owner.out_channels, owner.in_channels = parameter.shape[:2]
