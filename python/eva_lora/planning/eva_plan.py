"""From statistics to ranks and A matrices, under one budget. No model, no data, no forward pass."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from decimal import ROUND_CEILING, Context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eva_kernels.allocation import allocate_ranks, candidate_components, spend_parameters

from ..config import EvaConfig
from . import storage
from .gain import with_matched_gain
from .statistics import EvaStatistics, InputStatistics, SiteStatistics

__all__ = ["Allocation", "EvaPlan", "PlannedSite", "plan", "require_affordable", "require_bounds"]

_B, _BIAS = "lora_b:", "lora_bias:"  # before the names of matrices B and biases in a file; those of A have none


@dataclass(frozen=True)
class PlannedSite:
    """What one LoRA layer will be.

    Attributes:
        name: The layer's name in the base model.
        rank: Its new rank; 0 removes the adapter from the layer.
        configured_rank: The rank it was configured with.
        in_features: Width of its input.
        explained_variance_ratio: Ratio of every candidate component, descending; in a plan that repairs a quantised
            base, which share of the layer's output energy each gives back.
        input: Index of its input among the distinct inputs; the first, where it has several; −1 for none.
        parts: How many matrices A of that rank it has (one for each expert, for instance).
    """

    name: str
    rank: int
    configured_rank: int
    in_features: int
    explained_variance_ratio: tuple[float, ...]
    input: int
    parts: int = 1


@dataclass(frozen=True)
class EvaPlan:
    """The result of :func:`plan`.

    Attributes:
        sites: Name → plan of each LoRA layer, in the model's order.
        lora_a: Name → (parts · rank, d) float32, part by part; each part's rows orthonormal, or divided by √σ
            where ``whiten`` is set, or by a gain where ``match_gain`` is. Absent for a layer that keeps its rank and
            its A as they are.
        config: The configuration it was planned with.
        budget: Ranks there were to give.
        notes: Layers and experts that data alone did not determine, each with the reason.
        lora_b: Name → (out, rank) float32, what B is times the layer's scaling, part after part. Absent where B is
            zero: everywhere in EVA.
        lora_bias: Name → (out,) float32, what the bias beside B is times the layer's scaling. Absent where it is zero,
            or where there is none.
    """

    sites: dict[str, PlannedSite]
    lora_a: dict[str, Tensor]
    config: EvaConfig
    budget: int
    notes: tuple[str, ...] = ()
    lora_b: dict[str, Tensor] = field(default_factory=dict)
    lora_bias: dict[str, Tensor] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, int]:
        """Name → new rank of each layer, in the model's order."""
        return {name: site.rank for name, site in self.sites.items()}

    def part(self, path: str) -> "EvaPlan":
        """The plan of one of several PEFT models in a model, whose layers' names begin with its path there.

        Raises:
            ValueError: no layer's name does.
        """
        start = f"{path}."
        sites = {
            name.removeprefix(start): replace(site, name=name.removeprefix(start))
            for name, site in self.sites.items()
            if name.startswith(start)
        }
        if not sites:
            raise ValueError(f"path: expected that of a part of the planned model, got {path!r}")
        lora_a, lora_b, lora_bias = (
            {name.removeprefix(start): matrix for name, matrix in matrices.items() if name.startswith(start)}
            for matrices in (self.lora_a, self.lora_b, self.lora_bias)
        )
        budget = sum(site.rank for site in sites.values())
        return EvaPlan(sites, lora_a, self.config, budget, self.notes, lora_b, lora_bias)

    def save(self, path: str | Path) -> Path:
        """Write to one safetensors file; returns its path."""
        facts = {
            "sites": [asdict(site) for site in self.sites.values()],
            "config": self.config.to_dict(),
            "budget": self.budget,
            "notes": self.notes,
        }
        tensors = {**self.lora_a, **{f"{_B}{name}": b for name, b in self.lora_b.items()}}
        tensors |= {f"{_BIAS}{name}": bias for name, bias in self.lora_bias.items()}
        return storage.save(path, "plan", tensors, facts)

    @classmethod
    def load(cls, path: str | Path) -> "EvaPlan":
        """Read what :meth:`save` wrote; raises as :func:`eva_lora.planning.storage.load` does."""
        lora_a, facts = storage.load(path, "plan")
        lora_b, lora_bias = (
            {name.removeprefix(start): lora_a.pop(name) for name in [*lora_a] if name.startswith(start)}
            for start in (_B, _BIAS)
        )
        try:
            entries = [storage.checked(PlannedSite, entry) for entry in facts.pop("sites")]
            config = EvaConfig.from_dict(facts.pop("config"))
            result = storage.checked(
                cls, facts, sites={site.name: site for site in entries}, lora_a=lora_a, lora_b=lora_b,
                lora_bias=lora_bias, config=config,
            )  # fmt: skip
            result._check(len(entries))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"path: {path} is no complete plan file: {error}") from error
        return result

    def _check(self, count: int) -> None:
        """Raise ValueError where the parts of a file do not fit together."""
        if not count or len(self.sites) < count:
            raise ValueError("expected sites of different names")
        called = {name for name, site in self.sites.items() if site.input >= 0}
        if set(self.lora_a) != called:
            raise ValueError(f"A of {sorted(called ^ set(self.lora_a))} is missing or has no site")
        if not set(self.lora_b) <= called:
            raise ValueError(f"B of {sorted(set(self.lora_b) - called)} has no site that saw an input")
        for name, b in self.lora_b.items():
            rank = self.sites[name].rank
            if b.ndim != 2 or b.shape[1] != rank or b.dtype != torch.float32 or not bool(b.isfinite().all()):
                raise ValueError(
                    f"B of {name} is {b.dtype} of shape {tuple(b.shape)}, expected float32 of shape (out, {rank}) "
                    "without NaN and Inf"
                )
        if not set(self.lora_bias) <= set(self.lora_b):
            raise ValueError(f"the bias of {sorted(set(self.lora_bias) - set(self.lora_b))} has no B beside it")
        for name, bias in self.lora_bias.items():
            out = len(self.lora_b[name])
            if bias.shape != (out,) or bias.dtype != torch.float32 or not bool(bias.isfinite().all()):
                raise ValueError(
                    f"the bias of {name} is {bias.dtype} of shape {tuple(bias.shape)}, expected float32 of shape "
                    f"({out},) without NaN and Inf"
                )
        for name, site in self.sites.items():
            ratios = site.explained_variance_ratio
            if name not in called:
                if site.input != -1 or site.rank != site.configured_rank or site.rank < 1 or ratios:
                    raise ValueError(f"site {name} saw no input, so it keeps its rank")
                continue
            a, expected = self.lora_a[name], (site.parts * site.rank, site.in_features)
            if tuple(a.shape) != expected or a.dtype != torch.float32:
                raise ValueError(
                    f"A of {name} is {a.dtype} of shape {tuple(a.shape)}, expected float32 of shape {expected}"
                )
            if min(site.configured_rank, site.parts) < 1 or len(ratios) < site.rank:
                raise ValueError(f"site {name} is out of range or has fewer ratios than ranks")
            if not all(0 <= ratio < float("inf") for ratio in ratios):
                raise ValueError(f"site {name} has a ratio that is negative or not finite")
            if not bool(a.isfinite().all()):
                raise ValueError(f"A of {name} holds NaN or Inf")


def plan(statistics: EvaStatistics, config: Any = None, budget: int | None = None) -> EvaPlan:
    """Give the budget to the components that explain most variance, and cut A from them.

    Ranks: every candidate component of every layer is pooled, and the ``budget`` with the largest
    explained-variance ratios are taken; a layer's rank is how many of them are its own (arXiv 2410.07170,
    §3.3). A row's sign makes its largest entry positive. A layer of experts has one rank; its ratios are the
    means over its experts, weighted by their rows, and an expert with fewer rows than that rank takes the
    leading directions of all its layer's experts together.

    Args:
        statistics: From :func:`collect` or :meth:`EvaStatistics.load`.
        config: Ours or PEFT's ``EvaConfig``; ``rho``, ``whiten``, ``match_gain`` and the rank bounds may differ from
            those of the pass. None: the pass's own.
        budget: Ranks to give over all layers. None: the sum of the configured ranks.

    Raises:
        ValueError: ``rho`` asks for more components than the pass kept, or the bounds cannot be met.
    """
    config = statistics.config if config is None else EvaConfig.of(config)
    if budget is not None and budget < 1:
        raise ValueError(f"budget: expected at least 1, got {budget}")
    members = [site for site in statistics.sites if site.input >= 0]
    kept = sum(site.rank for site in statistics.sites if site.input < 0)
    free = sum(site.rank for site in members) if budget is None else budget - kept
    if free < 1:
        raise ValueError(f"budget: expected more than the {kept} that layers without input keep, got {budget}")
    if budget is not None and config.budget_parameters is not None:
        raise ValueError("budget: expected None with budget_parameters, which is the budget then")
    without = [site for site in statistics.sites if site.input < 0]
    ranks, ratios, notes = _allocate(members, statistics, config, free, without)
    if config.budget_parameters is not None:
        free = sum(ranks.values())
    sites: dict[str, PlannedSite] = {}
    lora_a, notes = {}, [*statistics.notes, *notes]
    for site in statistics.sites:
        rank, ratio = ranks.get(site.name, site.rank), ratios.get(site.name, ())
        sites[site.name] = PlannedSite(
            site.name, rank, site.rank, site.in_features, ratio, site.input, parts=len(site.inputs)
        )
        if site.input >= 0:
            entries = [statistics.inputs[index] if index >= 0 else None for index in site.inputs]
            with torch.inference_mode(False):  # within the caller's, A would be nothing that can be written to
                matrix, note = _lora_a(site.name, entries, rank, config)
            lora_a[site.name] = matrix
            notes += [note] if note else []
    if config.match_gain and lora_a:
        with torch.inference_mode(False):
            lora_a = with_matched_gain(statistics, lora_a, config.match_gain)
    return EvaPlan(sites, lora_a, config, free + kept, tuple(notes))


def require_affordable(sites: Sequence[Any], config: EvaConfig) -> None:
    """Raise ValueError where no ranks of these layers are within ``budget_parameters``, whatever their scores."""
    budget = config.budget_parameters
    if budget is None:
        return
    unknown = [site.name for site in sites if not site.parameters]
    if unknown:
        raise ValueError(f"budget_parameters: how many parameters {unknown[0]} has is not known")
    least, rank = 0, config.least_rank(site.removable for site in sites)
    for site in sites:
        step = math.lcm(config.rank_multiple, site.rank_multiple)
        least += -(-rank // step) * step * site.parameters
    if least > budget:
        raise ValueError(
            f"budget_parameters: expected at least the {least} that a rank of {rank} in every layer costs, got {budget}"
        )
    cheapest = min((site.parameters for site in sites), default=0)
    if cheapest > budget:
        raise ValueError(
            f"budget_parameters: expected enough for one rank of one layer, which has at least {cheapest}, got {budget}"
        )


def require_bounds(sites: Sequence[Any], candidates: Sequence[int], config: EvaConfig) -> None:
    """Raise ValueError, naming the layer, where no rank of one of these is within ``min_rank`` and ``max_rank``.

    ``candidates``: what each of them may be given, with what it shares an input with counted in.
    """
    least = config.least_rank(site.removable for site in sites)
    for site, count in zip(sites, candidates, strict=True):
        step = math.lcm(config.rank_multiple, site.rank_multiple)
        most = max(step, count // step * step) if count else 0
        if config.max_rank is not None:
            if most and config.max_rank < step:
                raise ValueError(
                    f"max_rank: expected at least {step}, since {site.name} is given ranks in multiples of that, got "
                    f"{config.max_rank}"
                )
            most = min(most, config.max_rank // step * step)
        if -(-least // step) * step > most:
            raise ValueError(
                f"min_rank: expected at most {most}, the most that {site.name} may be given with rho "
                f"{config.settled_rho:g} and ranks in multiples of {step}, got {least}"
            )


class Allocation:
    """How many components of each layer are candidates, and who is given which rank.

    Args:
        sites: The layers, all of which saw an input.
        config: Says ``rho`` and the ranks' bounds.
        groups: Equal labels mark layers whose candidates are the same. None: no two are.
        kept: Other layers, which keep their ranks and cost what they cost.

    Attributes:
        candidates: (sites,) int64.
        notes: What :meth:`ranks` has to say of its budget.

    Raises:
        ValueError: no rank of some layer is within the config's bounds.
    """

    def __init__(
        self,
        sites: Sequence[SiteStatistics],
        config: EvaConfig,
        groups: Sequence[int] | None = None,
        kept: Sequence[SiteStatistics] = (),
    ) -> None:
        self.notes: list[str] = []
        self._kept = kept
        self._sites, self._config = sites, config
        self._groups = list(range(len(sites))) if groups is None else groups
        self._divisors = [site.rank_multiple for site in sites]
        self.candidates = candidate_components(
            [site.rank for site in sites], config.settled_rho, widths=[site.in_features for site in sites],
            groups=self._groups, rank_multiple=config.rank_multiple, divisors=self._divisors,
        )  # fmt: skip
        require_bounds(sites, self.candidates.tolist(), config)

    def ranks(self, ratios: Sequence[np.ndarray], budget: int, *, falling: bool = True) -> dict[str, int]:
        """Layer → rank: the ``budget`` largest ratios are taken, each layer's in order.

        Args:
            ratios: Of each layer's candidates, in the order in which they are taken.
            budget: Ranks to give.
            falling: Whether that is descending, but for noise. Else a ratio counts with those that come after it.

        Raises:
            ValueError: the bounds cannot be met.
        """
        table = np.zeros((len(self._sites), int(self.candidates.max())))
        for row, values in zip(table, ratios, strict=True):
            row[: len(values)] = values
        if self._config.budget_parameters is not None:
            return self._spend(table, self._config.budget_parameters)
        allocated = allocate_ranks(
            table, self.candidates, budget, groups=self._groups, divisors=self._divisors,
            min_rank=self._config.least_rank(site.removable for site in self._sites), max_rank=self._config.max_rank,
            rank_multiple=self._config.rank_multiple,
        )  # fmt: skip
        given = int(allocated.sum())
        if not falling and any(bool((np.diff(values) > 0).any()) for values in ratios):
            allocated = spend_parameters(
                table, self.candidates, np.ones(len(table), np.int64), given, divisors=self._divisors,
                min_rank=self._config.least_rank(site.removable for site in self._sites),
                max_rank=self._config.max_rank, rank_multiple=self._config.rank_multiple,
            ).ranks  # fmt: skip
        if given < budget:
            self.notes.append(f"{given:,} of {budget:,} ranks are given: candidates and bounds allow no more")
        return dict(zip([site.name for site in self._sites], allocated.tolist(), strict=True))

    def _spend(self, table: np.ndarray, budget: int) -> dict[str, int]:
        """Ranks for a budget of parameters."""
        require_affordable([*self._sites, *self._kept], self._config)
        fixed = sum(site.rank * site.parameters for site in self._kept)
        if fixed > budget:
            raise ValueError(
                f"budget_parameters: expected more than the {fixed} that layers without input keep, got {budget}"
            )
        config = self._config
        made = spend_parameters(
            table, self.candidates, [site.parameters for site in self._sites], budget - fixed, divisors=self._divisors,
            min_rank=config.least_rank(site.removable for site in self._sites), max_rank=config.max_rank,
            rank_multiple=config.rank_multiple,
        )  # fmt: skip
        if not made.spent + fixed:
            cheapest = min(site.parameters for site in self._sites)
            raise ValueError(
                f"budget_parameters: expected enough for one rank of one layer, which has at least {cheapest}, got "
                f"{budget}"
            )
        bound = Context(prec=2, rounding=ROUND_CEILING).create_decimal(made.gap)
        best = f"no ranks within it have scores that sum to {float(bound):g} more" if made.gap else "no ranks do better"
        self.notes.append(f"{made.spent + fixed:,} of {budget:,} parameters are spent; {best}")
        return dict(zip([site.name for site in self._sites], made.ranks.tolist(), strict=True))


def _allocate(
    sites: list[SiteStatistics],
    statistics: EvaStatistics,
    config: EvaConfig,
    budget: int,
    kept: Sequence[SiteStatistics],
) -> tuple[dict[str, int], dict[str, tuple[float, ...]], list[str]]:
    """Ranks, and the ratios of all candidates, by name; and notes."""
    groups = [site.input if len(site.inputs) == 1 else -2 - i for i, site in enumerate(sites)]
    allocation = Allocation(sites, config, groups, kept)
    ratios = [np.zeros(count) for count in allocation.candidates]
    for site, mine in zip(sites, ratios, strict=True):
        entries = [statistics.inputs[index] for index in site.inputs if index >= 0]
        rows = sum(entry.num_rows for entry in entries)
        for entry in entries:
            known = entry.explained_variance_ratio().numpy()
            if len(mine) > len(known):
                raise ValueError(
                    f"rho: {config.settled_rho} asks for {len(mine)} components of {site.name}, but the statistics "
                    f"hold {len(known)}; collect with this rho"
                )
            mine += known[: len(mine)] * (entry.num_rows / max(1, rows))
    by_name = {site.name: tuple(mine.tolist()) for site, mine in zip(sites, ratios, strict=True)}
    return allocation.ranks(ratios, budget), by_name, allocation.notes


def _lora_a(
    name: str, entries: list[InputStatistics | None], rank: int, config: EvaConfig
) -> tuple[Tensor, str]:  # (parts · rank, d)
    """A, part by part, and a note on parts with too few rows, or ""."""
    few = [i for i, entry in enumerate(entries) if entry is None or entry.num_rows <= rank]
    if rank == 0 or not few:
        return torch.cat([_rows(name, e.components, e.eigenvalues, rank, config) for e in entries if e is not None]), ""
    components, eigenvalues, known = _pooled([entry for entry in entries if entry is not None], rank, config.seed)
    if len(entries) == 1:
        assert entries[0] is not None
        note = (
            f"{name} saw only {entries[0].num_rows} rows for its rank of {rank}: {rank - known} of its rows are random"
        )
        return _rows(name, components, eigenvalues, rank, config), note
    parts = []
    for i, entry in enumerate(entries):
        source = (components, eigenvalues) if i in few or entry is None else (entry.components, entry.eigenvalues)
        parts.append(_rows(name, *source, rank, config))
    rows = [0 if (entry := entries[i]) is None else entry.num_rows for i in few]
    note = (
        f"{name}: {len(few)} of {len(entries)} experts saw too few rows for its rank of {rank} and take the leading "
        f"directions of all together: {', '.join(f'{i} ({n} rows)' for i, n in zip(few, rows, strict=True))}"
    )
    if known < rank:
        note += f"; together they have {known}, the other {rank - known} are random"
    return torch.cat(parts), note


def _pooled(entries: list[InputStatistics], rank: int, seed: int) -> tuple[Tensor, Tensor, int]:  # (rank, d), (rank,)
    """The leading directions of the scatter of all entries together, each about its own mean, completed by random
    orthonormal ones; and how many there are before those."""
    weighted = torch.cat([e.components.double() * e.eigenvalues.clamp_min(0).sqrt()[:, None] for e in entries])
    _, singular_values, rows = torch.linalg.svd(weighted, full_matrices=False)
    variances = singular_values.square()
    rounding = float(variances[0]) * torch.finfo(torch.float32).eps * max(weighted.shape)  # of a float32 product
    known = min(rank, int((variances > rounding).sum()))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rank - known, weighted.shape[1], generator=generator, dtype=torch.float64, device="cpu")
    basis = torch.linalg.qr(torch.cat([rows[:known], noise]).T).Q.T
    eigenvalues = variances.new_zeros(rank)
    eigenvalues[:known] = variances[:known]
    return basis.float(), eigenvalues, known


def _rows(
    name: str,
    components: Tensor,  # (q, d)
    eigenvalues: Tensor,  # (q,)
    rank: int,
    config: EvaConfig,
) -> Tensor:  # (rank, d)
    rows = components[:rank].clone()
    largest = rows.abs().argmax(1, keepdim=True) if rank else rows.new_empty(0, 1, dtype=torch.long)
    rows *= 1 - 2 * (rows.gather(1, largest) < 0).to(rows.dtype)
    if config.whiten:
        singular_values = eigenvalues[:rank].sqrt()
        if bool((singular_values <= 0).any()):
            raise ValueError(f"whiten: {name} is given a component without variance, which cannot be whitened")
        rows /= singular_values.sqrt()[:, None].to(rows.dtype)
    return rows
