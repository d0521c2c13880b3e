"""LoRA that starts by repairing its quantised base, in steps: check → collect → fit → ranks → measure → write."""

import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor, nn

from .adapters import (
    BaseWeight,
    Dequantize,
    LoraAdapter,
    LoraSite,
    ModelOutline,
    PeftAdapter,
    Requantize,
    SiteAdapter,
    TrainedLayers,
    find_adapter,
    ordinary_tensors,
    require_changeable,
    tell_left_alone,
    wrapped,
)
from .collecting import Change, ForwardFn, RowMaskFn, Visits, collect_with, own
from .config import DEFAULT_MAX_BATCHES, EvaConfig, default_columns
from .distributed import joined
from .fitting import (
    FloatWeights,
    LayerFit,
    LayerWeights,
    ModelErrors,
    added_by,
    completed,
    difference,
    fit_in_sequence,
    fit_layer,
    layer_errors,
    missing_of,
    model_errors,
    no_preference,
    quantization_of,
    samples_of,
)
from .planning import Allocation, EvaPlan, EvaStatistics, InputStatistics, PlannedSite, SiteStatistics
from .reporting import LayerRepair, RepairReport

__all__ = ["fit_quantization_error", "require_same_base"]

Method = Literal["repair", "eva+repair", "loftq"]

HOLD_BACK = 10
REPAIR_SHARE = 0.5
COLUMNS_PER_RANK = 5.0  # of a basis, as many as EVA's default has: with half of them fits miss 1 % on some layers


def fit_quantization_error(
    model: nn.Module,
    loader_or_statistics: "Iterable[Any] | EvaStatistics | None" = None,
    float_weights: "str | Path | Mapping[str, Tensor] | nn.Module | None" = None,
    config: Any = None,
    *,
    method: Method = "repair",
    repair_share: float | None = None,
    repair_explained: float | None = None,
    rounds: int = 1,
    passes: int = 1,
    float_inputs: bool = False,
    hold_back: int = HOLD_BACK,
    dequantize: Dequantize | None = None,
    requantize: Requantize | None = None,
    forward_fn: ForwardFn | None = None,
    row_mask_fn: RowMaskFn | None = None,
    sites: Sequence[LoraSite] | None = None,
    progress: bool = True,
    overwrite: bool = False,
) -> RepairReport:
    """Start a model's LoRA layers with what undoes most of its base's quantisation error, where inputs see it.

    With W a layer's float weight, Q what it computes with, M = W − Q and R = E[x xᵀ] of its inputs x, the layer's s B A
    becomes the L of its rank that minimises E‖(M − L) x‖² = tr((M − L) R (M − L)ᵀ): L = U Uᵀ M with U the leading
    eigenvectors of M R Mᵀ. (LoftQ, arXiv 2310.08659, is R = I; QERA, 2410.06040, and CLoQ, 2501.18475, have the full R,
    of which here a streaming subspace stands.) The base stays as it is; ``disable_adapter`` gives it back.

    Args:
        model: A model on a quantised base with LoRA layers, as in :func:`eva_lora.eva_initialize`. Call this before the
            optimizer is made.
        loader_or_statistics: Batches, gone through once; or statistics that :func:`eva_lora.collect` has made of this
            model. None: no inputs are known and R = I, which ``method="loftq"`` asks for by name.
        float_weights: The base's weights before it was quantised: a folder with safetensors, which are read layer by
            layer, a model's id on the hub, a state dict, or the float model. None: what the model says it was loaded
            from. Where the model's norms are others than there, as AWQ leaves them, a layer's rows and columns are
            scaled until they are like those of its base.
        config: :class:`EvaConfig` (or PEFT's), for the pass over the batches and for ranks: with ``rho`` above 1 ranks
            move to the layers where they give back most of the output's energy, E‖W x‖², under the same total; with 1
            every layer keeps its own. None: as in :func:`eva_lora.eva_initialize`.
        method: "repair": all ranks repair. "eva+repair": ``repair_share`` of each layer's rank does, the rest starts as
            in EVA, with B = 0, in the complement. "loftq": LoftQ, which takes no data.
        repair_share: See ``method``; None: 0.5. How much is best is not known: it is chosen, not derived.
        repair_explained: Instead of ``repair_share``: in each layer just as many directions repair as give back this
            share of the output error that all of its rank would.
        rounds: Of ``method="loftq"``. From the second on **the base is changed**: in each layer in turn, W − s·BA is
            quantised in the weight's place, and B A fitted to what that leaves. Ranks do not move then (``rho=1``).
        requantize: ``requantize(name, layer, matrix)`` makes a base layer compute with a matrix (out, in), as near as
            its quantiser comes. Not needed for bitsandbytes' 4 bits.
        passes: 1: every layer is fitted on the inputs that the quantised model gives it. More: the model is fitted in
            so many parts of as many layers each, from its first layers to its last, each on what it is given once the
            parts before are repaired, which is better where little is left of the model, at 2 bits. All batches are
            kept (1000 at most where ``max_batches`` says nothing), and run once for each part. Ranks do not move then
            (``rho=1``).
        float_inputs: Whether every second batch is run with the float weights in the layers' place, so that layers are
            fitted to what the quantised model and the float model give them, half and half: once repaired it gives them
            what is between the two. Better the fewer bits there are; it reads each layer's weights once for each such
            batch.
        hold_back: Every so many batches one is kept from the fit, and errors are measured on those. 0: none is.
        dequantize: ``dequantize(name, layer)`` returns the matrix (out, in) that a base layer computes with, or None
            for what is done anyhow: bitsandbytes, HQQ and torchao are asked, others are shown the identity.
        forward_fn, row_mask_fn, sites, progress, overwrite: As in :func:`eva_lora.eva_initialize`.

    Returns:
        Each layer's error before and after, and the model's, on what was held back.

    Raises:
        TypeError: an argument of another type.
        ValueError: as :func:`eva_lora.collect` and :func:`eva_lora.apply`; a float weight that is missing, has another
            shape or cannot be what the base was made of. The model is then as it was, but for layers whose base a
            second round has changed.
        FileNotFoundError: there are no float weights where they were looked for.
    """
    split = _Split(method, repair_share, repair_explained)
    _require_data(method, loader_or_statistics)
    _require_rounds(method, rounds, requantize)
    _require_passes(method, passes)
    _require_float_inputs(float_inputs, passes, loader_or_statistics)
    _require_hold_back(hold_back)
    _require_callable(dequantize=dequantize, requantize=requantize)
    started = time.perf_counter()
    with ordinary_tensors():
        adapter = find_adapter(model, sites)
        bases, without = base_weights_of(adapter)
        if not overwrite:
            TrainedLayers.of(adapter).require_none()
        chosen = wide_enough(
            EvaConfig.of(adapter.eva_config if config is None else config), max(site.rank for site in adapter.sites)
        )
        require_whole(model)
        require_changeable(model, ranks_change=False)
        floats = FloatWeights.of(loaded_from(model) if float_weights is None else float_weights)
        source = LayerWeights(model, bases, floats, dequantize)
        norm = source.other_norm
        if passes > 1 and chosen.settled_rho != 1:
            raise ValueError(f"passes: expected 1 where ranks move, got {passes}; give config=EvaConfig(rho=1)")
        if rounds > 1:
            if chosen.settled_rho != 1:
                raise ValueError(f"rounds: expected 1 where ranks move, got {rounds}; give config=EvaConfig(rho=1)")
            source.require_requantizable(requantize)
            if norm is not None:
                raise ValueError(
                    f"rounds: expected 1 on a base whose weights were rescaled, got {rounds}: {norm} differs"
                )

        held: list[Any] = []
        visits = Visits(adapter, model, chosen, forward_fn, row_mask_fn)
        with visits.still():  # weights of another model are seen in the first layer, before any batch is run
            source.read(next(iter(bases)))

        def collected(layers: LoraAdapter, batches: Iterable[Any]) -> EvaStatistics:
            return collect_with(
                layers, model, batches, chosen, forward_fn=forward_fn, row_mask_fn=row_mask_fn, progress=progress
            )

        def fitted(sites: Sequence[LoraSite], statistics: EvaStatistics | None) -> dict[str, LayerFit]:
            members = _members(sites, statistics, bases, without)
            with visits.still():
                return _fit(members, statistics, source, chosen, rounds, requantize)

        statistics: EvaStatistics | None = None
        fits: dict[str, LayerFit] | None = None
        if loader_or_statistics is None:
            tell_left_alone(adapter, method, stacklevel=2)
        elif isinstance(loader_or_statistics, EvaStatistics):
            if passes > 1:
                raise ValueError(f"passes: expected 1 with statistics, which are of one pass, got {passes}")
            statistics = loader_or_statistics
        else:
            if joined(None) is not None:
                raise ValueError(
                    "loader_or_statistics: expected EvaStatistics where several ranks run; make them with "
                    "eva_lora.collect on all ranks and pass them on each"
                )
            batches = _HeldBack(loader_or_statistics, hold_back, held)
            kept = (
                [own(batch) for batch in islice(batches, chosen.max_batches or DEFAULT_MAX_BATCHES)]
                if passes > 1
                else []
            )
            if kept:
                statistics, fits = fit_in_sequence(adapter, visits, kept, passes, collected, fitted, split.repaired)
            elif float_inputs:
                turns = _InTurn(batches, bases, missing_of(bases, source.error_of))
                with visits.changed(turns.changes):
                    statistics = collected(adapter, iter(turns))
            else:
                statistics = collected(adapter, batches)
        fits = fitted(adapter.sites, statistics) if fits is None else fits
        members = _members(adapter.sites, statistics, bases, without)
        with visits.still():
            samples = samples_of({site.name: bases[site.name] for site in members})
        plan = _planned(adapter, members, fits, statistics, chosen, split, without)
        factors = {  # of layers that are left with no rank, too: the float model's weights are in all that were fitted
            name: (plan.lora_a[name], plan.lora_b[name], plan.lora_bias.get(name)) for name in plan.lora_b
        }
        errors: dict[str, tuple[float, float]] = {}
        of_model = ModelErrors()
        if held:
            with visits.changed(added_by(factors) if passes > 1 else {}):
                errors = layer_errors(visits, held, source.error_of, factors)
            of_model = model_errors(visits, held, source.error_of, factors)
        adapter.apply(plan)
    notes = plan.notes
    if norm is not None:
        notes = (
            *notes,
            f"{norm} is another than with the float weights, as where a quantiser moves scales between layers (AWQ): "
            "the float weights' rows and columns were scaled to be like the base's. Where it has not, they are another "
            "model's",
        )
    if float_inputs and statistics is not None:
        turned = f"{statistics.num_batches // 2} of {statistics.num_batches} batches"
        notes = (*notes, f"{turned} were run with the float weights in the layers' place")
    if held and not errors:
        notes = (*notes, f"Nothing was measured on what was held back: no row of its {len(held)} batches counts")
    if of_model.reason:
        notes = (*notes, f"What becomes of it at the model's end was not measured: {of_model.reason}")
    layers = {name: _layer(fit, plan.sites[name], split, errors.get(name)) for name, fit in fits.items()}
    return RepairReport(
        method=method, layers=layers, hidden_error=of_model.hidden, kl=of_model.kl,
        num_batches=0 if statistics is None else statistics.num_batches,
        num_rows=0 if statistics is None else statistics.num_rows, held_batches=len(held),
        seconds=time.perf_counter() - started, budget=plan.budget, notes=notes, config=chosen.to_dict(),
        base={name: samples[name] for name in layers}, quantization=quantization_of(model),
    )  # fmt: skip


def require_same_base(model: nn.Module, saved: "RepairReport | str | Path", adapter_name: str | None = None) -> None:
    """Raise unless a model's base is the one that its adapter was fitted to; call it after loading.

    Args:
        model: With the adapter loaded.
        saved: The fit's report, or the folder that it was saved in.
        adapter_name: PEFT's name of the adapter. None: the one that is active.

    Raises:
        FileNotFoundError: no report is there.
        ValueError: it is another base, or quantised otherwise; the message names the difference.
    """
    report = saved if isinstance(saved, RepairReport) else RepairReport.load(saved)
    adapter = find_adapter(model) if adapter_name is None else PeftAdapter(model, adapter_name)
    bases, _ = base_weights_of(adapter)
    fitted = {name: values for name, values in report.base.items() if report.layers[name].repaired}
    with Visits(adapter, model, EvaConfig()).still():
        found = difference(fitted, report.quantization, bases, quantization_of(model))
    if found:
        raise ValueError(f"model: its base is not the one that the adapter was fitted to: {found}")


class _HeldBack:
    """A loader's batches, once, but for every ``every``-th, from the second on: these are put aside."""

    def __init__(self, loader: Iterable[Any], every: int, held: list[Any]) -> None:
        if isinstance(loader, (str, bytes, Mapping)) or not hasattr(loader, "__iter__"):
            raise TypeError(
                f"loader_or_statistics: expected an iterable of batches or EvaStatistics, got {type(loader).__name__}"
            )
        self._batches = self._kept(loader, every, held)

    def __iter__(self) -> Iterator[Any]:
        return self._batches  # no second time: the loader may come with other batches then, and those held back in them

    @staticmethod
    def _kept(loader: Iterable[Any], every: int, held: list[Any]) -> Iterator[Any]:
        for number, batch in enumerate(loader):
            if every and number % every == 1:
                held.append(own(batch))
            else:
                yield batch


class _InTurn:
    """Batches, and changes of layers' outputs that are made in every second batch and are zero in the others."""

    def __init__(self, batches: Iterable[Any], bases: Mapping[str, BaseWeight], changes: Mapping[str, Change]) -> None:
        self._batches, self._bases, self._on = batches, bases, False
        self.changes = {name: self._in_turn(name, change) for name, change in changes.items()}

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self._batches):
            self._on = number % 2 == 1
            yield batch

    def _in_turn(self, name: str, change: Change) -> Change:
        width = self._bases[name].out_features
        return lambda x: change(x) if self._on else x.new_zeros(*x.shape[:-1], width)


@dataclass(frozen=True)
class _Split:
    """How many of a layer's directions repair; see :func:`fit_quantization_error`."""

    method: str
    share: float | None
    explained: float | None

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"method: expected one of {get_args(Method)}, got {self.method!r}")
        if self.share is not None and not _is_share(self.share):
            raise ValueError(f"repair_share: expected a number between 0 and 1, got {self.share!r}")
        if self.explained is not None and not _is_share(self.explained):
            raise ValueError(f"repair_explained: expected a number between 0 and 1, got {self.explained!r}")
        if self.share is not None and self.method != "eva+repair":
            raise ValueError(f'repair_share: expected None without method="eva+repair", got {self.share!r}')
        if self.explained is not None and self.method != "eva+repair":
            raise ValueError(f'repair_explained: expected None without method="eva+repair", got {self.explained!r}')
        if self.share is not None and self.explained is not None:
            raise ValueError(f"repair_share: expected None beside repair_explained, got {self.share!r}")

    def repaired(self, fit: LayerFit, rank: int) -> int:
        """Of a layer's rank, how many directions repair."""
        if self.method != "eva+repair" or not rank:
            return rank
        if self.explained is None:
            return min(rank, max(1, round(rank * (REPAIR_SHARE if self.share is None else self.share))))
        given_back = fit.energies[:rank].cumsum(0)
        return 1 + int((given_back < self.explained * given_back[-1]).sum())


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1


def _require_data(method: str, data: Any) -> None:
    if method == "loftq" and data is not None:
        got = type(data).__name__
        raise ValueError(
            f'loader_or_statistics: expected None with method="loftq", which asks for no inputs, got {got}'
        )
    if method != "loftq" and data is None:
        raise ValueError(f"loader_or_statistics: expected batches or EvaStatistics with method={method!r}, got None")


def _require_rounds(method: str, rounds: int, requantize: Requantize | None) -> None:
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"rounds: expected an integer of at least 1, got {rounds!r}")
    if rounds > 1 and method != "loftq":
        raise ValueError(f'rounds: expected 1 without method="loftq", got {rounds}')
    if rounds == 1 and requantize is not None:
        raise ValueError("requantize: expected None, since one round leaves the base as it is")


def _require_passes(method: str, passes: int) -> None:
    if isinstance(passes, bool) or not isinstance(passes, int) or passes < 1:
        raise ValueError(f"passes: expected an integer of at least 1, got {passes!r}")
    if passes > 1 and method == "loftq":
        raise ValueError(f'passes: expected 1 with method="loftq", which asks for no inputs, got {passes}')


def _require_float_inputs(float_inputs: bool, passes: int, data: Any) -> None:
    if not isinstance(float_inputs, bool):
        raise TypeError(f"float_inputs: expected True or False, got {type(float_inputs).__name__}")
    if float_inputs and (passes > 1 or data is None or isinstance(data, EvaStatistics)):
        raise ValueError("float_inputs: expected False without batches, and with passes above 1, got True")


def _require_callable(**functions: Any) -> None:
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(f"{name}: expected a callable, got {type(function).__name__}")


def _require_hold_back(hold_back: int) -> None:
    if isinstance(hold_back, bool) or not isinstance(hold_back, int) or hold_back < 0 or hold_back == 1:
        raise ValueError(f"hold_back: expected 0 or an integer of at least 2, got {hold_back!r}")


def wide_enough(config: EvaConfig, largest: int) -> EvaConfig:
    """The configuration with bases that are wide enough for a fit of that rank, unless it says how wide they are.

    Raises:
        ValueError: it would divide A by something, which a fit has no room for.
    """
    require_undivided(config)
    enough = default_columns(round(largest * config.settled_rho), config.convergence) >= COLUMNS_PER_RANK * largest
    if config.oversampling is not None or enough:
        return config
    return replace(config, oversampling=COLUMNS_PER_RANK / config.settled_rho)


def require_undivided(config: EvaConfig) -> None:
    """Raise ValueError where A would be divided by something that B knows nothing of."""
    for name in ("whiten", "match_gain"):
        if getattr(config, name):
            raise ValueError(
                f"{name}: expected False where A and B are fitted to a weight, whose product it would change; "
                f"got {getattr(config, name)!r}"
            )


def base_weights_of(adapter: LoraAdapter) -> tuple[dict[str, BaseWeight], dict[str, str]]:
    """The base weight of each layer, and why others have none."""
    if not hasattr(adapter, "base_weights"):
        raise TypeError(
            f"model: a {type(adapter).__name__} does not say what its layers' base weights are (base_weights); pass "
            "sites"
        )
    if isinstance(adapter, SiteAdapter):
        adapter.writable()
    asked: Any = adapter
    bases, without = asked.base_weights()
    if not bases:
        raise ValueError(f"model: none of its LoRA layers has a base weight to repair: {without}")
    if without:
        named = "; ".join(f"{name}: {why}" for name, why in without.items())
        warnings.warn(f"These layers are not repaired: {named}", stacklevel=3)
    return bases, without


def require_whole(model: nn.Module) -> None:
    """Raise ValueError where layers cannot be asked one by one what they compute with."""
    outline = ModelOutline(model)
    state = wrapped(outline)
    if state is None and any(hasattr(parameter, "device_mesh") for parameter in outline.parameters):
        state = "split over processes"
    if state is not None:
        raise ValueError(f"model: it is {state}; fit it first, and compile, wrap or shard it afterwards")


def loaded_from(model: nn.Module) -> str:
    wrapper: Any = model
    inner = wrapper.get_base_model() if hasattr(model, "get_base_model") else wrapper
    name = getattr(getattr(inner, "config", None), "name_or_path", "")
    if not name:
        raise ValueError(
            "float_weights: expected a folder, a model's id, a state dict or a module: the model does not "
            "say what it was loaded from"
        )
    return str(name)


def described(site: LoraSite, inputs: tuple[int, ...] = (-1,)) -> SiteStatistics:
    """What ranks are given by of a layer, whose inputs are those of that number, or none."""
    return SiteStatistics(
        site.name, inputs, site.rank, site.in_features, True, 0, site.rank_multiple, site.removable,
        parameters=site.parameters,
    )  # fmt: skip


def _members(
    sites: Sequence[LoraSite],
    statistics: EvaStatistics | None,
    bases: Mapping[str, BaseWeight],
    without: dict[str, str],
) -> list[SiteStatistics]:
    """The layers to fit. Those that statistics do not know are added to ``without``."""
    if statistics is None:
        return [described(site) for site in sites if site.name in bases]
    known = {site.name: site for site in statistics.sites}
    strange = [s.name for s in sites if s.name not in known or known[s.name].in_features != s.in_features]
    if strange:
        raise ValueError(
            f"loader_or_statistics: they are of another model: they do not know {strange[0]} as it is here"
        )
    for site in sites:
        if site.name in bases and known[site.name].input < 0:
            without[site.name] = "it saw no input"
    return [described(s, known[s.name].inputs) for s in sites if s.name in bases and s.name not in without]


def _fit(
    members: Sequence[SiteStatistics],
    statistics: EvaStatistics | None,
    source: LayerWeights,
    config: EvaConfig,
    rounds: int,
    requantize: Requantize | None,
) -> dict[str, LayerFit]:
    fits = {}
    for site, candidates in zip(members, Allocation(members, config).candidates.tolist(), strict=True):
        entry = _input(statistics, site)
        told = entry is not None and source.bias_beside(site.name)  # of the mean error
        moment = no_preference(site.in_features) if entry is None else entry.second_moment(centred=told)
        fit = fit_layer(*source.read(site.name), moment, candidates, entry.mean if entry is not None and told else None)
        for _ in range(rounds - 1):
            weight, _ = source.read(site.name)
            change = fit.left[:, : site.rank] @ fit.right[: site.rank]
            source.requantize(site.name, weight.sub_(change.to(weight.device)), requantize)
            fit = fit_layer(*source.read(site.name), moment, candidates)
        fits[site.name] = fit
    return fits


def _input(statistics: EvaStatistics | None, site: SiteStatistics) -> InputStatistics | None:
    return None if statistics is None or site.input < 0 else statistics.inputs[site.input]


def _planned(
    adapter: LoraAdapter,
    members: Sequence[SiteStatistics],
    fits: Mapping[str, LayerFit],
    statistics: EvaStatistics | None,
    config: EvaConfig,
    split: "_Split",
    without: Mapping[str, str],
) -> EvaPlan:
    budget = sum(site.rank for site in members)
    allocation = Allocation(members, config)
    ranks = allocation.ranks([fits[site.name].shares.numpy() for site in members], budget)
    budget = budget if config.budget_parameters is None else sum(ranks.values())
    lora_a, lora_b, lora_bias, planned = {}, {}, {}, {}
    short = []
    for i, site in enumerate(members):
        rank, fit = ranks[site.name], fits[site.name]
        repaired = split.repaired(fit, rank)
        a, b = fit.factors(repaired)
        bias = fit.bias(len(a)) if rank else None
        if bias is not None:
            lora_bias[site.name] = bias
        if len(a) < repaired:
            short.append(site.name)
        lora_a[site.name], lora_b[site.name] = completed(a, b, rank, _input(statistics, site), config.seed + i)
        planned[site.name] = PlannedSite(
            site.name, rank, site.rank, site.in_features, tuple(fit.shares.clamp_min(0).tolist()), max(site.input, 0)
        )
    kept = [site for site in adapter.sites if site.name not in planned]
    for other in kept:
        planned[other.name] = PlannedSite(other.name, other.rank, other.rank, other.in_features, (), -1, other.parts)
    notes = [*(f"{name} is not repaired: {why}" for name, why in without.items()), *allocation.notes]
    if short:
        notes.append(
            f"{len(short)} layers have less error than their rank could repair, the first is {short[0]}; what is left "
            "of it starts as in EVA, with B zero"
        )
    made_for = {} if statistics is None else {site.name: site.rank for site in statistics.sites}
    narrow = [site.name for site in members if made_for.get(site.name, site.rank) < site.rank]
    if narrow:
        notes.append(
            f"The statistics were made for lower ranks in {len(narrow)} layers, the first is {narrow[0]} "
            f"({made_for[narrow[0]]}), and know fewer directions than a fit of these ranks could use"
        )
    order = {site.name: planned[site.name] for site in adapter.sites}
    return EvaPlan(order, lora_a, config, budget + sum(site.rank for site in kept), tuple(notes), lora_b, lora_bias)


def _layer(fit: LayerFit, site: PlannedSite, split: _Split, held: tuple[float, float] | None) -> LayerRepair:
    repaired = split.repaired(fit, site.rank)
    return LayerRepair(
        rank=site.rank, configured_rank=site.configured_rank, repaired=repaired, weight_error=fit.weight_error,
        fitted=(fit.error(0), fit.error(repaired)), held=held,
    )  # fmt: skip
