"""Adapters whose layers keep A and B as parameters: most implementations, and anybody's own."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..planning import EvaPlan, PlannedSite
from .base_weights import BaseWeight, KnownWeight
from .held import Halves, hold, is_held
from .preflight import require_no_optimizer
from .sharded import fill_
from .sites import LeftAlone, LoraSite, Patches, Rows

__all__ = ["Answers", "ParameterSite", "SiteAdapter", "check_plan"]

LARGER = 256.0  # than the base's output, what B A x is made to be while its scaling is looked for
ALIKE = 2.0**-5  # of what is seen: what the rounding of a layer in 16 bits may be off by


@dataclass(frozen=True)
class Answers:
    """What a layer makes of its matrices A and B, as it was seen.

    Attributes:
        scaling: What it multiplies B A x with.
        outputs: For each pair of A and B, which of the layer's outputs (n,) int64 the rows of that B add to, in order.
        base: (out,) float32: the output with B = 0 for some input.
    """

    scaling: float
    outputs: list[Tensor]
    base: Tensor


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

        Where there are several pairs of A and B, fed the same rows, ``lora_a`` is that of all, or (pairs · rank, d).

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
        own = [None] * len(self.first) if lora_a is None else [lora_a] * len(self.first)
        if lora_a is not None and len(lora_a) > rank:
            own = [*lora_a.chunk(len(self.first))]
        for new_a, new_b, mine in zip(self.first, self.second, own, strict=True):
            if mine is not None:
                matrix = mine if len(mine) > rank else mine.repeat(self.groups, 1)
                fill_(new_a, matrix.T if self.transposed else matrix.view(new_a.shape))
            new_b.zero_()

    def write_second(self, lora_b: Tensor) -> None:
        """Set each B to what the layer scales to its rows of ``lora_b`` (out, rank); after :meth:`write`.

        Raises:
            ValueError: what the layer adds to its base's output is no multiple of B A x.
        """
        scaling = self.answers().scaling
        sizes = [b.shape[1 if self.transposed else 0] for b in self.second]
        for b, rows in zip(self.second, torch.split(lora_b, sizes), strict=True):
            fill_(b, rows.T if self.transposed else rows.reshape(b.shape))
            fill_(b, b / scaling)

    @torch.no_grad()
    def answers(self) -> Answers:
        """What the layer makes of its matrices: seen in its answers to one input, with matrices that are written for a
        moment.

        Raises:
            ValueError: what it adds to its base's output is no multiple of B A x.
        """
        values = [(factor, factor.detach().clone()) for factor in (*self.first, *self.second)]
        try:
            with _without_dropout(self.module, self.owner), torch.autocast(values[0][0].device.type, enabled=False):
                return self._seen()
        finally:
            for factor, value in values:
                factor.data.copy_(value)

    def _seen(self) -> Answers:
        first, second = ([_as_matrix(factor, self.transposed) for factor in part] for part in (self.first, self.second))
        x, row, place = self._example(first[0])
        groups = [a.chunk(self.groups) for a in first]  # each (rank, d)

        def answer() -> Tensor:  # (out,) float32
            y = self.module(x).float()
            return y[0, 0] if self.row_maker is None else y.flatten(2)[0, :, place]

        def clear() -> None:
            for matrix in (*first, *second):
                matrix.zero_()

        clear()
        base = answer()
        level = LARGER * max(1.0, float(base.abs().max()))  # so that little is rounded off beside the base's output
        outputs, scalings = [], []
        for mine, b in zip(groups, second, strict=True):
            for a in mine:
                clear()
                a[0], b[:, 0] = row, level
                added = (answer() - base) / (level * float(row.float().square().sum()))
                hit = added.abs() > added.abs().max() / 2
                scalings.append(float(added[hit].mean()) if bool(hit.any()) else 0.0)
                outputs.append(hit.nonzero().flatten())
                self._require(scalings[-1] != 0 and _near(added, scalings[-1] * hit))
            self._require(sum(map(len, outputs[-self.groups :])) == len(b))
        scaling = scalings[0]
        self._require(all(abs(other - scaling) <= ALIKE * abs(scaling) for other in scalings))
        clear()
        expected, taken = torch.zeros_like(base), iter(outputs)
        generator = torch.Generator("cpu").manual_seed(0)
        for mine, b in zip(groups, second, strict=True):
            b.copy_(torch.randn(b.shape, generator=generator, dtype=torch.float32, device="cpu") * level)
            start = 0
            for a in mine:
                a.copy_(torch.randn(a.shape, generator=generator, dtype=torch.float32, device="cpu"))
                where = next(taken)
                rows = b[start : start + len(where)].float()
                expected[where] += scaling * rows @ (a.float() @ row.float())
                start += len(where)
        self._require(_near(answer() - base, expected))
        return Answers(scaling, outputs, base)

    def _example(self, a: Tensor) -> tuple[Tensor, Tensor, int]:
        """An input, one of the rows that it makes, and where in the output that is."""
        if self.row_maker is None:
            row = a.new_full((self.in_features,), self.in_features**-0.5)
            return row[None, None], row, 0
        patches = self.row_maker
        assert isinstance(patches, Patches)
        reach = [d * (k - 1) + 1 for d, k in zip(patches.dilation, patches.kernel_size, strict=True)]
        x = a.new_full((1, patches.channels, *reach), patches.width**-0.5)
        rows = torch.cat([*patches.pieces(x)])
        place = int(rows.float().norm(dim=1).argmax())
        return x, rows[place].to(a), place

    def _require(self, holds: bool) -> None:
        if not holds:
            raise ValueError(f"layer {self.name}: what it adds to its base layer's output is no multiple of B A x")

    def matrices(self, answers: Answers) -> tuple[BaseWeight, ...]:
        """For each pair of A and B, the rows of the base weight that it adds to.

        Raises:
            LeftAlone: they cannot be told.
        """
        base = self._base_convolution()
        if self.row_maker is not None and base is None:
            raise LeftAlone("its B A is not multiplied with the patches that its base layer sees")
        if not bool(answers.base.any()):
            raise LeftAlone("its module puts out nothing while B is zero: its base weight is elsewhere, or zero")
        dtype, out = self.second[0].dtype, len(answers.base)
        whole = BaseWeight(self.name, self.module, self.in_features, out, dtype, matrix_is_weight=False)
        read = whole.read if base is None else partial(_flat_weight, base)
        return tuple(
            KnownWeight(
                self.name, self.module, self.in_features, len(where), dtype, matrix=partial(_rows_of, read, where)
            )
            for where in answers.outputs
        )

    def _base_convolution(self) -> Any:
        """The convolution whose patches the layer's rows are, if there is one."""
        taken = [id(factor) for factor in (*self.first, *self.second)]
        kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        found = [m for m in self.module.modules() if isinstance(m, kinds) and id(m.weight) not in taken]
        same = [m for m in found if m.groups == 1 and Patches.of(m) == self.row_maker]
        return same[0] if len(same) == 1 else None

    def hold(self) -> None:
        """Have the first half of the rank trained, and hold the second: see :mod:`eva_lora.adapters.held`."""
        halves: dict[nn.Module, dict[str, Halves]] = {}
        along = 1 if self.transposed else 0
        for paths, where in ((self.a, Halves(along, outer=self.groups)), (self.b, Halves(1 - along))):
            for path in _paths(paths):
                module, name = _holder(self.owner, path)
                halves.setdefault(module, {})[name] = where
        for module, mine in halves.items():
            hold(module, mine)

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


def _as_matrix(factor: Tensor, transposed: bool) -> Tensor:  # (rows, columns), of the same memory
    return factor.data.T if transposed else factor.data.view(len(factor), -1)


def _near(seen: Tensor, expected: Tensor) -> bool:
    return bool((seen - expected).norm() <= ALIKE * expected.norm())


def _flat_weight(layer: Any) -> Tensor:
    return layer.weight.detach().flatten(1)


def _rows_of(read: Callable[[], Tensor], where: Tensor) -> Tensor:
    return read()[where]


@contextmanager
def _without_dropout(*modules: nn.Module) -> Iterator[None]:
    training = [member for module in modules for member in module.modules() if member.training]
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
    if is_held(_holder(module, path)[0]):
        raise ValueError(
            f"model: half of A and B of {name} is held, since it started from part of its base weight; to begin anew, "
            "make the model anew"
        )
    if not isinstance(value, nn.Parameter) or (value.ndim < 2 if convolution else value.ndim != 2):
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"layer {name}: expected {path} to be a matrix parameter, got {got}")
    return value


def _holder(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that has what a path leads to as its own, and its name there."""
    owner_path, _, name = path.rpartition(".")
    return (_get(module, owner_path) if owner_path else module), name


def _replace(module: nn.Module, path: str, parameter: nn.Parameter) -> None:
    owner, name = _holder(module, path)
    setattr(owner, name, parameter)
    if isinstance(owner, nn.Linear):
        owner.out_features, owner.in_features = parameter.shape
    elif isinstance(owner, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        owner.out_channels, owner.in_channels = parameter.shape[:2]
