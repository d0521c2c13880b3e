"""Layers that keep A and B as parameters: most implementations, and anybody's own."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .answers import Answers, AskedLayer
from .base_weights import BaseWeight, KnownWeight
from .held import Halves, hold, is_held
from .sharded import fill_
from .sites import LeftAlone, LoraSite, Patches, Rows

__all__ = ["ParameterSite"]


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

    def answers(self) -> Answers:
        """What the layer makes of its matrices: seen in its answers to one input, with matrices that are written for a
        moment.

        Raises:
            ValueError: what it adds to its base's output is no multiple of B A x.
        """
        asked = AskedLayer(
            self.name, self.module, self.owner, self.first, self.second, self.transposed, self.groups,
            self.in_features, self.row_maker,
        )  # fmt: skip
        return asked.answers()

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


def _flat_weight(layer: Any) -> Tensor:
    return layer.weight.detach().flatten(1)


def _rows_of(read: Callable[[], Tensor], where: Tensor) -> Tensor:
    return read()[where]


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
