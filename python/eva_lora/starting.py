"""LoRA that starts by another method than EVA, in steps: check → collect → fit → ranks → write."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from eva_kernels._double import double
from eva_kernels.low_rank_fit import SecondMoment, principal_moment

from .adapters import (
    BaseWeight,
    LoraAdapter,
    LoraSite,
    SiteAdapter,
    TrainedLayers,
    find_adapter,
    ordinary_tensors,
    require_changeable,
    tell_left_alone,
)
from .collecting import ForwardFn, LossFn, RowMaskFn, Visits, collect_with
from .config import EvaConfig
from .descending import descend
from .distributed import joined
from .fitting import METHODS, GradientMethod, Method, MethodFit, Moment, fit_method, known_directions
from .initializing import eva_initialize
from .planning import Allocation, EvaPlan, EvaStatistics, InputStatistics, PlannedSite, SiteStatistics
from .repair import described, require_undivided, require_whole, wide_enough
from .reporting import EvaReport, LayerStart, StartReport

__all__ = ["config_for", "initialize"]

STEEP = 1e6  # a streamed R is off by 1e-5 of its first direction, and R² of all that are shorter than its root of it
NOTHING = 1e-300


def initialize(
    model: nn.Module,
    loader_or_statistics: "Iterable[Any] | EvaStatistics | None" = None,
    method: str = "eva",
    config: Any = None,
    *,
    keep: "Iterable[Any] | EvaStatistics | None" = None,
    beta: float = 0.5,
    budget: int | None = None,
    loss_fn: LossFn | None = None,
    forward_fn: ForwardFn | None = None,
    row_mask_fn: RowMaskFn | None = None,
    sites: Sequence[LoraSite] | None = None,
    progress: bool = True,
    overwrite: bool = False,
    dry_run: bool = False,
) -> "EvaReport | StartReport":
    """Start a model's LoRA layers by one of the methods of docs/methods.md, from one statistic of their inputs or from
    the gradients of a loss (docs/gradients.md).

    Methods that move part of the base weight into A and B leave W − s B₀ A₀ there, in W's dtype. ``disable_adapter``
    still computes with W, to a rounding; the saved adapter holds A₀ and B₀, and loads with
    :func:`eva_lora.load_adapter`; :func:`eva_lora.export_plain` makes an ordinary LoRA on the untouched W of it. Where
    the weight of any layer cannot give part of itself, all stay as they are: each layer has twice its rank, A beside A₀
    and B beside −B₀, of which the first half is trained, and is saved and loaded as an ordinary LoRA. The report's
    notes say so.

    Args:
        model: A model with LoRA layers, as in :func:`eva_initialize`. Call this before the optimizer is made.
        loader_or_statistics: Batches, or statistics that :func:`eva_lora.collect` has made of this model; None for
            methods that need no data. "corda-kpm", "astra" and "lora-null" need statistics with ``keep_moments``.
            Methods that start from gradients need batches with labels, and keep ``max_batches`` of them, 32 where that
            is None.
        method: "eva" (:func:`eva_initialize`), or a name in ``eva_lora.METHODS``.
        config: As in :func:`eva_initialize`. Of its ranks' options ``rho`` moves ranks between layers for methods that
            score directions ("pissa", "corda"), and ``budget_parameters`` spends parameters, as ``budget`` gives ranks,
            no layer getting more than rho times its own. Without these every layer keeps its own, but for "eva".
        keep: For "sc-lora": batches or statistics of what is to be kept.
        beta: For "sc-lora": how much those count, in [0, 1]. What is best is not known: it is chosen, not derived.
        budget: For methods that score directions: ranks to give over all layers, to the directions that hold most of
            their layer's weight ("pissa") or output energy ("corda"). None: the sum of the configured ranks.
        loss_fn: For methods that start from gradients: (model, batch) → the loss, a tensor of one number. None: what
            the model returns as ``loss``.
        forward_fn, row_mask_fn, sites, progress, overwrite: As in :func:`eva_initialize`. Methods that start from
            gradients take none of the first two, and show no progress.
        dry_run: Only say what would be done, not for "eva": the model stays as it is. Methods that need no data take
            statistics then, to say what they would take of outputs.

    Returns:
        What was done; for "eva" its report.

    Raises:
        TypeError: an argument of another type.
        ValueError: an unknown method, data that it does not take or lacks, a layer that it cannot start; and as
            :func:`eva_lora.collect` and :func:`eva_lora.apply`. The model is then as it was.
    """
    if loss_fn is not None and not isinstance(METHODS.get(str(method)), GradientMethod):
        raise ValueError(f"loss_fn: expected None with method={method!r}, which takes no gradients")
    if method == "eva":
        _refuse_second_set(method, keep)
        if dry_run:
            raise ValueError("dry_run: expected False with method='eva', whose plan tells: eva_lora.plan")
        if budget is not None:
            raise ValueError("budget: expected None with method='eva', whose plan takes it: eva_lora.plan")
        return _eva(
            model, loader_or_statistics, config, forward_fn=forward_fn, row_mask_fn=row_mask_fn, sites=sites,
            progress=progress, overwrite=overwrite,
        )  # fmt: skip
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method: expected one of {('eva', *METHODS)}, got {method!r}")
    row = METHODS[method]
    if row.data != "two sets":
        _refuse_second_set(method, keep)
    to_tell = dry_run and row.data == "none" and isinstance(loader_or_statistics, EvaStatistics)
    if not to_tell:
        _require_data("loader_or_statistics", row, loader_or_statistics, needed=row.data != "none")
    _require_data("keep", row, keep, needed=row.data == "two sets")
    if isinstance(row, GradientMethod):
        _require_gradients_only(row, loader_or_statistics, loss_fn, forward_fn, row_mask_fn)
    if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 <= beta <= 1:
        raise ValueError(f"beta: expected a number between 0 and 1, got {beta!r}")
    started = time.perf_counter()
    with ordinary_tensors():
        adapter = find_adapter(model, sites)
        bases, kept_whole = _bases(adapter, row)
        chosen = config_for(adapter, row, config)
        if not overwrite:
            TrainedLayers.of(adapter).require_none()
        require_whole(model)
        _require_directions(adapter, bases, row)
        _require_scalings(adapter, row)
        _require_budget(row, chosen, budget)
        moves_ranks = chosen.moves_ranks or budget is not None or (isinstance(row, GradientMethod) and row.moves_ranks)
        require_changeable(model, ranks_change=moves_ranks or bool(kept_whole))
        if loader_or_statistics is None or isinstance(row, GradientMethod):  # else the pass tells
            tell_left_alone(adapter, method, stacklevel=2)
        if isinstance(row, GradientMethod):
            assert loader_or_statistics is not None
            found = descend(row, adapter, model, bases, loader_or_statistics, chosen, loss_fn)  # type: ignore[arg-type]
            rounding = {} if dry_run else _write(adapter, found.plan, row, kept_whole)
            layers = {
                site.name: LayerStart(site.rank, site.configured_rank, None, rounding=rounding.get(site.name))
                for site in found.plan.sites.values()
            }
            return StartReport(
                method=method, layers=layers, budget=found.plan.budget, base=row.base, num_batches=found.num_batches,
                num_rows=0, seconds=time.perf_counter() - started, notes=(*found.plan.notes, *_held(kept_whole)),
                config=chosen.to_dict(),
                losses=found.losses,
            )  # fmt: skip

        def statistics_of(data: "Iterable[Any] | EvaStatistics | None") -> EvaStatistics | None:
            if data is None or isinstance(data, EvaStatistics):
                return data
            # The pass holds bounds of ranks against the configured ranks' sum, which is not what is given out then.
            of_pass = chosen if budget is None else replace(chosen, max_rank=None)
            return collect_with(
                adapter, model, data, of_pass, forward_fn=forward_fn, row_mask_fn=row_mask_fn, progress=progress
            )

        statistics, kept = statistics_of(loader_or_statistics), statistics_of(keep)
        members = _members(adapter, bases, statistics, kept)
        moments = _Moments(row, members, statistics), _Moments(row, members, kept)
        directions = [_directions(bases[site.name]) for site in members]
        allocation = Allocation(
            [replace(site, in_features=most) for site, most in zip(members, directions, strict=True)], chosen
        )
        with Visits(adapter, model, chosen).still():
            fits = _fit(row, members, bases, moments, allocation, beta)
        made = _planned(row, adapter, members, fits, chosen, allocation, budget)
        rounding = {} if dry_run else _write(adapter, made, row, kept_whole)
    layers = {site.name: _layer(fits[site.name], made.sites[site.name], rounding.get(site.name)) for site in members}
    return StartReport(
        method=method, layers=layers, budget=made.budget, base=row.base,
        num_batches=statistics.num_batches if statistics else 0, num_rows=statistics.num_rows if statistics else 0,
        seconds=time.perf_counter() - started, config=chosen.to_dict(),
        notes=(*made.notes, *_unseen(members, statistics), *_hidden(fits), *_held(kept_whole)),
    )  # fmt: skip


def _eva(model: nn.Module, data: Any, config: Any, **options: Any) -> EvaReport:
    if data is None:
        raise ValueError("loader_or_statistics: expected batches or EvaStatistics with method='eva', got None")
    return eva_initialize(model, data, config, **options)


def _refuse_second_set(method: str, keep: Any) -> None:
    if keep is not None:
        raise ValueError(f"keep: expected None with method={method!r}, which knows one set of inputs")


def _require_data(name: str, method: Method, data: Any, *, needed: bool) -> None:
    """Raise unless what a method is given to look at is what it looks at."""
    if data is None and needed:
        raise ValueError(f"{name}: expected batches or EvaStatistics with method={method.name!r}, got None")
    if data is not None and not needed:
        raise ValueError(f"{name}: expected None with method={method.name!r}, which looks at weights alone")
    if data is None:
        return
    if isinstance(data, (str, bytes, Mapping)) or not (isinstance(data, EvaStatistics) or hasattr(data, "__iter__")):
        raise TypeError(f"{name}: expected an iterable of batches or EvaStatistics, got {type(data).__name__}")
    if not isinstance(data, EvaStatistics) and joined(None) is not None and not isinstance(method, GradientMethod):
        raise ValueError(
            f"{name}: expected EvaStatistics where several ranks run; make them with eva_lora.collect on all ranks and "
            "pass them on each"
        )


def _require_gradients_only(
    method: GradientMethod, data: Any, loss_fn: Any, forward_fn: ForwardFn | None, row_mask_fn: RowMaskFn | None
) -> None:
    """Raise unless gradients can be taken of what is given."""
    if isinstance(data, EvaStatistics):
        raise ValueError(
            f"loader_or_statistics: expected batches with method={method.name!r}, statistics hold no gradients"
        )
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(f"loss_fn: expected a callable or None, got {type(loss_fn).__name__}")
    for name, given in (("forward_fn", forward_fn), ("row_mask_fn", row_mask_fn)):
        if given is not None:
            raise ValueError(f"{name}: expected None with method={method.name!r}, whose loss says what counts: loss_fn")


def _bases(adapter: LoraAdapter, method: Method) -> tuple[dict[str, tuple[BaseWeight, ...]], str]:
    """For each of a layer's pairs of A and B the base weight that the method reads; and, of one that takes part of it,
    why it has to stay as it is, or "".
    """
    if isinstance(adapter, SiteAdapter):
        adapter.writable()
    asked: Any = adapter
    from_gradients = isinstance(method, GradientMethod)
    if not hasattr(adapter, "matrices") or (from_gradients and not hasattr(adapter, "move")):
        of = "PEFT" if from_gradients else "PEFT, or such as keep A and B as parameters"
        raise TypeError(
            f"model: method={method.name!r} starts LoRA layers of {of}; a {type(adapter).__name__} does not say how to"
        )
    bases: dict[str, tuple[BaseWeight, ...]]
    bases, without = asked.matrices()
    if without:
        name, why = next(iter(without.items()))
        raise ValueError(f"model: method={method.name!r} cannot start {len(without)} layers; {name}: {why}")
    if from_gradients and method.base == "kept":
        return bases, ""
    kept_whole: str = asked.kept_whole(read=False) if from_gradients else asked.kept_whole()
    return bases, kept_whole if method.base == "less" else ""


def _held(kept_whole: str) -> tuple[str, ...]:
    """What a report says where base weights stay as they are, though the method takes part of them."""
    if not kept_whole:
        return ()
    return (
        f"base weights stay as they are ({kept_whole}): each layer has twice its rank, of which half is trained and "
        "half held; it saves and loads as an ordinary LoRA",
    )


def _unseen(members: Sequence[SiteStatistics], statistics: EvaStatistics | None) -> list[str]:
    """What a report says of parts that saw no input."""
    inputs = {site.name: site.inputs for site in statistics.sites} if statistics is not None else {}
    empty = {name: [part for part, index in enumerate(mine) if index < 0] for name, mine in inputs.items()}
    return [
        f"{site.name}: experts {empty[site.name]} saw no input and start from those of all together"
        for site in members
        if empty.get(site.name)
    ]


def _directions(bases: Sequence[BaseWeight]) -> int:
    """The most that every one of a layer's weights has."""
    return min(min(base.in_features, base.out_features) for base in bases)


def config_for(adapter: LoraAdapter, method: Method, config: Any = None) -> EvaConfig:
    """The options of a pass that gathers what a method takes, and of its ranks.

    Raises:
        ValueError: options that it does not go with.
    """
    keeps_ranks = config is None or (isinstance(config, EvaConfig) and config.rho is None)
    chosen = replace(EvaConfig.of(config), rho=1.0) if keeps_ranks else EvaConfig.of(config)
    if chosen.rho != 1 and not method.scores:
        raise ValueError(
            f"rho: expected 1 with method={method.name!r}, whose directions have no scores; got {chosen.rho}"
        )
    if chosen.budget_parameters is not None and not method.scores:
        raise ValueError(
            f"budget_parameters: expected None with method={method.name!r}, whose directions have no scores"
        )
    by_importance = isinstance(method, GradientMethod) and method.moves_ranks
    ranks = sorted({site.rank for site in adapter.sites})
    least, most, multiple = chosen.min_rank, chosen.max_rank, chosen.rank_multiple
    if not (method.scores or by_importance) and (
        least > ranks[0] or (most is not None and most < ranks[-1]) or any(rank % multiple for rank in ranks)
    ):
        raise ValueError(
            f"min_rank, max_rank, rank_multiple: expected such as the layers' ranks {ranks} are within, since "
            f"method={method.name!r} leaves ranks as they are; got {least}, {most}, {multiple}"
        )
    if (chosen.moves_ranks or by_importance) and not chosen.adjust_scaling_factors:
        raise ValueError(f"adjust_scaling_factors: expected True with method={method.name!r} where ranks may change")
    if isinstance(method, GradientMethod):
        require_undivided(chosen)
        if chosen.max_rows is not None:
            raise ValueError(f"max_rows: expected None with method={method.name!r}, whose passes end after max_batches")
        return chosen
    chosen = wide_enough(chosen, max(site.rank for site in adapter.sites))
    return replace(chosen, keep_moments=True) if method.data == "all" else chosen


def _require_budget(method: Method, config: EvaConfig, budget: int | None) -> None:
    """Raise unless a budget of ranks can be given out."""
    if budget is None:
        return
    if not method.scores:
        raise ValueError(f"budget: expected None with method={method.name!r}, whose directions have no scores")
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise TypeError(f"budget: expected an integer or None, got {budget!r}")
    if budget < 1:
        raise ValueError(f"budget: expected at least 1, got {budget}")
    if config.budget_parameters is not None:
        raise ValueError("budget: expected None with budget_parameters, which is the budget then")
    if not config.adjust_scaling_factors:
        raise ValueError(f"adjust_scaling_factors: expected True with method={method.name!r} where ranks may change")


def _members(
    adapter: LoraAdapter, bases: Mapping[str, Sequence[BaseWeight]], *known: EvaStatistics | None
) -> list[SiteStatistics]:
    """The layers to start, with the inputs that the first statistics know of them."""
    for statistics in filter(None, known):
        sites = {site.name: site for site in statistics.sites}
        for site in adapter.sites:
            theirs = sites.get(site.name)
            if theirs is None or (theirs.in_features, len(theirs.inputs)) != (site.in_features, site.parts):
                raise ValueError(
                    f"loader_or_statistics: they are of another model: they do not know {site.name} as it is here"
                )
            if theirs.input < 0:
                raise ValueError(f"loader_or_statistics: {site.name} saw no input")
    return [described(site) for site in adapter.sites]


def _require_directions(adapter: LoraAdapter, bases: Mapping[str, Sequence[BaseWeight]], method: Method) -> None:
    """Raise unless every layer has as many directions as the method takes of it."""
    each = method.blocks if isinstance(method, GradientMethod) else 1
    for site in adapter.sites:
        there = _directions(bases[site.name])
        if each * site.rank > there:
            of = "" if each == 1 else f", of which method={method.name!r} takes {each} for each"
            raise ValueError(f"model: {site.name} has rank {site.rank}, its weight has {there} directions{of}")


def _require_scalings(adapter: Any, method: Method) -> None:
    """Raise unless B A reaches every layer's output as it is meant: B₀ A₀ is divided by the scaling."""
    for name, scaling in adapter.scalings().items():
        if not scaling > 0:
            raise ValueError(
                f"model: {name} has a scaling of {scaling:g}: expected a positive one, as of a positive lora_alpha, "
                f"with method={method.name!r}"
            )


class _Moments:
    """The second moments that a method asks for, made when they are read: layers that share an input share one.

    Raises:
        ValueError: every direction is asked for, and the statistics do not have them.
    """

    def __init__(self, method: Method, members: Sequence[SiteStatistics], statistics: EvaStatistics | None) -> None:
        self._statistics = statistics
        self._last: tuple[tuple[int, ...], Moment | None] = ((), None)
        sites = {} if statistics is None else {site.name: site.inputs for site in statistics.sites}
        self._inputs = {member.name: sites.get(member.name, ()) for member in members}
        if method.data == "all" and statistics is not None:
            first = {index: name for name, mine in reversed(self._inputs.items()) for index in mine if index >= 0}
            for index, name in first.items():
                _require_every_direction(name, statistics.inputs[index], method)

    def of(self, name: str, part: int) -> Moment | None:
        """That of the inputs of one of a layer's parts; of all together where it saw none."""
        indices = self._indices(name, part)
        if indices and indices != self._last[0]:
            self._last = indices, _pooled(self._entries(indices))
        return self._last[1] if indices else None

    def rows(self, name: str, part: int) -> int:
        """How many rows that is of; 1 where no inputs are known."""
        index = self._inputs[name][part] if self._inputs[name] else -1
        return self._entries((index,))[0].num_rows if index >= 0 else int(not self._inputs[name])

    def _indices(self, name: str, part: int) -> tuple[int, ...]:
        mine = self._inputs[name]
        return mine[part : part + 1] if mine and mine[part] >= 0 else tuple(index for index in mine if index >= 0)

    def _entries(self, indices: Sequence[int]) -> list[InputStatistics]:
        assert self._statistics is not None
        return [self._statistics.inputs[index] for index in indices]


def _pooled(entries: Sequence[InputStatistics]) -> Moment:
    """The second moment of the rows of all entries together."""
    shares = [entry.num_rows / max(1, sum(other.num_rows for other in entries)) for entry in entries]
    whole = [entry.moment for entry in entries if entry.moment is not None]
    if len(whole) == len(entries):
        return whole[0] if len(whole) == 1 else torch.stack([m * n for m, n in zip(whole, shares, strict=True)]).sum(0)
    known = [entry.second_moment() for entry in entries]
    factor = torch.cat([moment.factor * n**0.5 for moment, n in zip(known, shares, strict=True)], 1)
    rest = torch.stack([m.rest * n for m, n in zip(known, shares, strict=True)]).sum()
    return principal_moment(SecondMoment(double(factor), double(rest)))  # once for all layers on this input


def _require_every_direction(name: str, entry: InputStatistics, method: Method) -> None:
    if entry.moment is None:
        raise ValueError(
            f"loader_or_statistics: method={method.name!r} takes directions that inputs have least of, which need "
            "statistics with keep_moments=True"
        )
    known, width = known_directions(entry.moment, entry.num_rows), len(entry.moment)
    if known < width:
        raise ValueError(
            f"loader_or_statistics: method={method.name!r} takes directions that inputs have least of; of those of "
            f"{name} {entry.num_rows} rows tell {known} of {width} from rounding: more batches may tell them"
        )


@dataclass(frozen=True)
class _Fits:
    """Of one layer: each pair's fit, how many rows of input it has, and of input that is to be kept; and how many times
    the inputs' variance in their first direction is that in the last that counts, where it is told by a streamed R."""

    of_pairs: list[MethodFit]
    rows: list[int]
    kept_rows: list[int]
    steepness: float

    def shares(self, which: str) -> Tensor | None:  # (r,) float64
        """What each direction has of the weight, the outputs or those to keep, of all pairs together."""
        place = ("weight_shares", "output_shares", "kept_shares").index(which)
        known = [getattr(fit, which) for fit in self.of_pairs]
        if known[0] is None:
            return None
        counts = ([1] * len(known), self.rows, self.kept_rows)[place]
        of = [fit.totals[place] * n for fit, n in zip(self.of_pairs, counts, strict=True)]
        total = sum(of)
        if len(known) == 1 or not total > 0:
            return known[0]
        return torch.stack([share * n / total for share, n in zip(known, of, strict=True)]).sum(0)

    def factors(self, method: Method, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
        """(pairs · rank, d) and (Σ out, rank): A and s B, pair after pair."""
        pairs = [fit.factors(method, rank, scaling) for fit in self.of_pairs]
        return torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs])


def _fit(
    method: Method,
    members: Sequence[SiteStatistics],
    bases: Mapping[str, Sequence[BaseWeight]],
    moments: tuple[_Moments, _Moments],
    allocation: Allocation,
    beta: float,
) -> dict[str, _Fits]:
    fits = {}
    for site, rank in zip(members, allocation.candidates.tolist(), strict=True):
        of_pairs, steepness = [], 0.0
        for base in bases[site.name]:
            weight = base.read()
            moment, kept = (known.of(site.name, base.part) for known in moments)
            if method.power == 2 and isinstance(moment, SecondMoment):
                steepness = max(steepness, _steepness(moment, rank))
            of_pairs.append(fit_method(method, weight, rank, moment, kept, beta, site.name))
        rows, kept_rows = ([known.rows(site.name, base.part) for base in bases[site.name]] for known in moments)
        fits[site.name] = _Fits(of_pairs, rows, kept_rows, steepness)
    return fits


def _steepness(moment: SecondMoment, rank: int) -> float:
    """The first of a principal moment's variances over the one at this rank."""
    squares = double(moment.factor).square().sum(0)
    first, last = (float(squares[i]) if i < len(squares) else 0.0 for i in (0, rank - 1))
    rest = float(moment.rest)
    return (first + rest) / max(last + rest, NOTHING)


def _hidden(fits: Mapping[str, _Fits]) -> list[str]:
    """What a report says of layers whose inputs' first direction hides what is known of the others."""
    names = [name for name, fit in fits.items() if fit.steepness > STEEP]
    if not names:
        return []
    return [
        f"{len(names)} layers, {names[0]} the first, have one direction of inputs with more than {STEEP:.0e} times the "
        "variance of the last that counts; beside it streamed statistics tell too little of the others for this, "
        "EvaConfig(keep_moments=True) tells it"
    ]


def _planned(
    method: Method,
    adapter: Any,
    members: Sequence[SiteStatistics],
    fits: Mapping[str, _Fits],
    config: EvaConfig,
    allocation: Allocation,
    budget: int | None,
) -> EvaPlan:
    budget = budget or sum(site.rank for site in members)
    scores = [_scores(method, fits[site.name]).numpy() for site in members]
    ranks, notes = {site.name: site.rank for site in members}, []
    if method.scores:
        ranks, notes = allocation.ranks(scores, budget, falling=False), allocation.notes
    budget = budget if config.budget_parameters is None else sum(ranks.values())
    scalings: dict[str, float] = adapter.scalings()
    factors = {site.name: fits[site.name].factors(method, ranks[site.name], scalings[site.name]) for site in members}
    parts = {site.name: site.parts for site in adapter.sites}
    planned = {
        site.name: PlannedSite(
            site.name, ranks[site.name], site.rank, site.in_features, tuple(score.clip(0).tolist()), 0, parts[site.name]
        )
        for site, score in zip(members, scores, strict=True)
    }
    lora_a, lora_b = ({name: pair[which].cpu() for name, pair in factors.items()} for which in (0, 1))
    return EvaPlan(planned, lora_a, config, budget, tuple(notes), lora_b)


def _scores(method: Method, fits: _Fits) -> Tensor:  # (r,) float64
    """What ranks move by: of the weight or, where inputs count, of the output what each direction has."""
    shares = fits.shares("output_shares") if method.power else None
    shares = fits.shares("weight_shares") if shares is None else shares
    assert shares is not None
    return shares


def _write(adapter: Any, made: EvaPlan, method: Method, kept_whole: str) -> dict[str, float]:
    """The plan into the model, and what follows of it; returns what was rounded off of each base weight."""
    back = adapter.apply(_doubled(made) if kept_whole else made)
    try:
        if method.exponent is None:
            adapter.freeze_second()
        if kept_whole:
            adapter.hold(made)
            return {}
        return dict(adapter.move(method.name, made)) if method.base == "less" else {}
    except BaseException:
        back()
        raise


def _doubled(made: EvaPlan) -> EvaPlan:
    """The plan with A beside A₀ and B beside −B₀, which are the same at first: twice the ranks, and B A of zero."""
    sites = {name: replace(site, rank=2 * site.rank) for name, site in made.sites.items()}
    lora_a, lora_b = {}, {}
    for name, site in made.sites.items():
        a = made.lora_a[name]
        lora_a[name] = torch.cat([part.repeat(2, 1) for part in torch.split(a, site.rank)]) if site.rank else a
        lora_b[name] = torch.cat([made.lora_b[name], -made.lora_b[name]], 1)
    config = replace(made.config, adjust_scaling_factors=True)
    return replace(made, sites=sites, lora_a=lora_a, lora_b=lora_b, config=config, budget=2 * made.budget)


def _layer(fits: _Fits, site: PlannedSite, rounding: float | None) -> LayerStart:
    def share(which: str) -> float | None:
        shares = fits.shares(which)
        return None if shares is None else float(shares[: site.rank].sum())

    return LayerStart(
        rank=site.rank, configured_rank=site.configured_rank, weight_share=share("weight_shares") or 0.0,
        output_share=share("output_shares"), kept_share=share("kept_shares"), rounding=rounding,
    )  # fmt: skip
