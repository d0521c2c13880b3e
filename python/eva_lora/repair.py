"""LoRA that starts by repairing its quantised base, in steps: check → collect → fit → ranks → measure → write."""

import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor, nn

from .adapters import (
    BaseWeight,
    Dequantize,
    LoraAdapter,
    LoraSite,
    ModelOutline,
    SiteAdapter,
    TrainedLayers,
    find_adapter,
    ordinary_tensors,
    require_changeable,
    wrapped,
)
from .collecting import ForwardFn, RowMaskFn, Visits, collect_with, own
from .config import EvaConfig, default_columns
from .distributed import joined
from .fitting import (
    FloatWeights,
    LayerFit,
    LayerWeights,
    ModelErrors,
    completed,
    difference,
    fit_layer,
    layer_errors,
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
COLUMNS_PER_RANK = 5.0  # of a basis, as many as EVA's default has: with half of them fits miss 1 % on some layers


def fit_quantization_error(
    model: nn.Module,
    loader_or_statistics: "Iterable[Any] | EvaStatistics | None" = None,
    float_weights: "str | Path | Mapping[str, Tensor] | nn.Module | None" = None,
    config: Any = None,
    *,
    method: Method = "repair",
    repair_share: float = 0.5,
    hold_back: int = HOLD_BACK,
    dequantize: Dequantize | None = None,
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
            from.
        config: :class:`EvaConfig` (or PEFT's), for the pass over the batches and for ranks: with ``rho`` above 1 ranks
            move to the layers where they give back most of the output's energy, E‖W x‖², under the same total; with 1
            every layer keeps its own. None: as in :func:`eva_lora.eva_initialize`.
        method: "repair": all ranks repair. "eva+repair": ``repair_share`` of each layer's rank does, the rest starts as
            in EVA, with B = 0, in the complement. "loftq": one round of LoftQ, with no data.
        repair_share: See ``method``. How much is best is not known: it is chosen, not derived.
        hold_back: Every so many batches one is kept from the fit, and errors are measured on those. 0: none is.
        dequantize: ``dequantize(name, layer)`` returns the matrix (out, in) that a base layer computes with, or None
            for what is done anyhow: bitsandbytes, HQQ and torchao are asked, others are shown the identity.
        forward_fn, row_mask_fn, sites, progress, overwrite: As in :func:`eva_lora.eva_initialize`.

    Returns:
        Each layer's error before and after, and the model's, on what was held back.

    Raises:
        TypeError: an argument of another type.
        ValueError: as :func:`eva_lora.collect` and :func:`eva_lora.apply`; a float weight that is missing, has another
            shape or cannot be what the base was made of. The model is then as it was.
        FileNotFoundError: there are no float weights where they were looked for.
    """
    _require_options(method, repair_share, hold_back)
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
        source = LayerWeights(bases, floats, dequantize, tied_weights(model))

        held: list[Any] = []
        statistics: EvaStatistics | None = None
        if method == "loftq" or loader_or_statistics is None:
            if method != "loftq":
                raise ValueError(
                    f"loader_or_statistics: expected batches or EvaStatistics with method={method!r}, got None"
                )
        elif isinstance(loader_or_statistics, EvaStatistics):
            statistics = loader_or_statistics
        else:
            if joined(None) is not None:
                raise ValueError(
                    "loader_or_statistics: expected EvaStatistics where several ranks run; make them with "
                    "eva_lora.collect on all ranks and pass them on each"
                )
            batches = _HeldBack(loader_or_statistics, hold_back, held)
            statistics = collect_with(
                adapter, model, batches, chosen, forward_fn=forward_fn, row_mask_fn=row_mask_fn, progress=progress
            )
        members = _members(adapter, statistics, bases, without)
        visits = Visits(adapter, model, chosen, forward_fn, row_mask_fn)
        with visits.still():
            fits = _fit(members, statistics, source, chosen)
            samples = samples_of({site.name: bases[site.name] for site in members})
        plan = _planned(adapter, members, fits, statistics, chosen, method, repair_share, without)
        factors = {name: (plan.lora_a[name], plan.lora_b[name]) for name in plan.lora_b if plan.sites[name].rank}
        errors: dict[str, tuple[float, float]] = {}
        of_model = ModelErrors()
        if held:
            errors = layer_errors(visits, held, source.error_of, factors)
            of_model = model_errors(visits, held, source.error_of, factors)
        adapter.apply(plan)
    layers = {name: _layer(fit, plan.sites[name], method, repair_share, errors.get(name)) for name, fit in fits.items()}
    return RepairReport(
        method=method, layers=layers, hidden_error=of_model.hidden, kl=of_model.kl,
        num_batches=0 if statistics is None else statistics.num_batches,
        num_rows=0 if statistics is None else statistics.num_rows, held_batches=len(held),
        seconds=time.perf_counter() - started, budget=plan.budget, notes=plan.notes, config=chosen.to_dict(),
        base={name: samples[name] for name in layers}, quantization=quantization_of(model),
    )  # fmt: skip


def require_same_base(model: nn.Module, saved: "RepairReport | str | Path") -> None:
    """Raise unless a model's base is the one that its adapter was fitted to; call it after loading.

    Args:
        model: With the adapter loaded and active.
        saved: The fit's report, or the folder that it was saved in.

    Raises:
        FileNotFoundError: no report is there.
        ValueError: it is another base, or quantised otherwise; the message names the difference.
    """
    report = saved if isinstance(saved, RepairReport) else RepairReport.load(saved)
    adapter = find_adapter(model)
    bases, _ = base_weights_of(adapter)
    fitted = {name: values for name, values in report.base.items() if report.layers[name].repaired}
    with Visits(adapter, model, EvaConfig()).still():
        found = difference(fitted, report.quantization, bases, quantization_of(model))
    if found:
        raise ValueError(f"model: its base is not the one that the adapter was fitted to: {found}")


class _HeldBack:
    """A loader's batches, once, but for every ``every``-th, from the second on: these are put aside."""

    def __init__(self, loader: Iterable[Any], every: int, held: list[Any]) -> None:
        if isinstance(loader, (str, bytes)) or not hasattr(loader, "__iter__"):
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


def _require_options(method: str, repair_share: float, hold_back: int) -> None:
    if method not in get_args(Method):
        raise ValueError(f"method: expected one of {get_args(Method)}, got {method!r}")
    if isinstance(repair_share, bool) or not isinstance(repair_share, (int, float)) or not 0 < repair_share < 1:
        raise ValueError(f"repair_share: expected a number between 0 and 1, got {repair_share!r}")
    if isinstance(hold_back, bool) or not isinstance(hold_back, int) or hold_back < 0 or hold_back == 1:
        raise ValueError(f"hold_back: expected 0 or an integer of at least 2, got {hold_back!r}")


def wide_enough(config: EvaConfig, largest: int) -> EvaConfig:
    """The configuration with bases that are wide enough for a fit of that rank, unless it says how wide they are."""
    enough = default_columns(round(largest * config.rho), config.convergence) >= COLUMNS_PER_RANK * largest
    if config.oversampling is not None or enough:
        return config
    return replace(config, oversampling=COLUMNS_PER_RANK / config.rho)


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


def tied_weights(model: nn.Module) -> dict[str, str]:
    """The output head's name → that of the input embedding whose weight it has, if it has: a file holds one of them."""
    wrapper: Any = model
    inner = wrapper.get_base_model() if hasattr(model, "get_base_model") else wrapper
    if not getattr(getattr(inner, "config", None), "tie_word_embeddings", False):
        return {}
    names = {id(module): name for name, module in inner.named_modules()}
    head, embedding = inner.get_output_embeddings(), inner.get_input_embeddings()
    return {names[id(head)]: names[id(embedding)]} if id(head) in names and id(embedding) in names else {}


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


def _members(
    adapter: LoraAdapter,
    statistics: EvaStatistics | None,
    bases: Mapping[str, BaseWeight],
    without: dict[str, str],
) -> list[SiteStatistics]:
    """The layers to fit. Those that statistics do not know are added to ``without``."""
    if statistics is None:
        return [
            SiteStatistics(
                site.name, (-1,), site.rank, site.in_features, True, 0, site.rank_multiple, site.removable,
                parameters=site.parameters,
            )
            for site in adapter.sites if site.name in bases
        ]  # fmt: skip
    known = {site.name: site for site in statistics.sites}
    strange = [s.name for s in adapter.sites if s.name not in known or known[s.name].in_features != s.in_features]
    if strange:
        raise ValueError(
            f"loader_or_statistics: they are of another model: they do not know {strange[0]} as it is here"
        )
    for name in bases:
        if known[name].input < 0:
            without[name] = "it saw no input"
    return [
        SiteStatistics(
            s.name,
            known[s.name].inputs,
            s.rank,
            s.in_features,
            True,
            0,
            s.rank_multiple,
            s.removable,
            parameters=s.parameters,
        )
        for s in adapter.sites
        if s.name in bases and s.name not in without
    ]


def _fit(
    members: Sequence[SiteStatistics], statistics: EvaStatistics | None, source: LayerWeights, config: EvaConfig
) -> dict[str, LayerFit]:
    fits = {}
    for site, candidates in zip(members, Allocation(members, config).candidates.tolist(), strict=True):
        entry = _input(statistics, site)
        moment = no_preference(site.in_features) if entry is None else entry.second_moment()
        fits[site.name] = fit_layer(*source.read(site.name), moment, candidates)
    return fits


def _input(statistics: EvaStatistics | None, site: SiteStatistics) -> InputStatistics | None:
    return None if statistics is None or site.input < 0 else statistics.inputs[site.input]


def _planned(
    adapter: LoraAdapter,
    members: Sequence[SiteStatistics],
    fits: Mapping[str, LayerFit],
    statistics: EvaStatistics | None,
    config: EvaConfig,
    method: str,
    repair_share: float,
    without: Mapping[str, str],
) -> EvaPlan:
    budget = sum(site.rank for site in members)
    allocation = Allocation(members, config)
    ranks = allocation.ranks([fits[site.name].shares.numpy() for site in members], budget)
    budget = budget if config.budget_parameters is None else sum(ranks.values())
    lora_a, lora_b, planned = {}, {}, {}
    short = []
    for i, site in enumerate(members):
        rank, fit = ranks[site.name], fits[site.name]
        a, b = fit.factors(_repaired(rank, method, repair_share))
        if method != "eva+repair" and len(a) < rank:
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
    order = {site.name: planned[site.name] for site in adapter.sites}
    return EvaPlan(order, lora_a, config, budget + sum(site.rank for site in kept), tuple(notes), lora_b)


def _repaired(rank: int, method: str, share: float) -> int:
    """How many of a layer's directions repair."""
    return rank if method != "eva+repair" else min(rank, max(1, round(rank * share)))


def _layer(
    fit: LayerFit, site: PlannedSite, method: str, share: float, held: tuple[float, float] | None
) -> LayerRepair:
    repaired = _repaired(site.rank, method, share) if site.rank else 0
    return LayerRepair(
        rank=site.rank, configured_rank=site.configured_rank, repaired=repaired, weight_error=fit.weight_error,
        fitted=(fit.error(0), fit.error(repaired)), held=held,
    )  # fmt: skip
