"""PEFT's own EVA functions, with its names, arguments and state-dict layout: changing one import is enough.

``from peft import get_eva_state_dict, initialize_lora_eva_weights`` becomes ``from eva_lora.peft import …``. What
deliberately differs is listed in docs/peft.md.
"""

import copy
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .adapters import (
    LayerInput,
    LoraSite,
    PatternsAmong,
    PeftAdapter,
    TrainedLayers,
    is_targeted,
    ordinary_tensors,
    planned_targets,
    require_ordinary,
)
from .collecting import ForwardFn, RowMaskFn, collect_with
from .config import EvaConfig
from .distributed import joined
from .fitting import FloatWeights, LayerWeights, completed, fit_layer, no_preference
from .planning import EvaPlan, PlannedSite, plan
from .repair import base_weights_of, loaded_from

__all__ = [
    "forward_fn_dict",
    "get_eva_state_dict",
    "initialize_lora_eva_weights",
    "planned_config",
    "prepare_layer_inputs_fn_language_modeling",
    "prepare_model_inputs_fn_language_modeling",
    "replace_lora_weights_loftq",
]

PrepareModel = Callable[[Any, Any], Any]
PrepareLayer = Callable[[Any, Any, str], Tensor]

_PREFIX = "base_model.model."  # of a layer's name in a PeftModel


def forward_fn_dict(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """``model(**inputs)``."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: Any) -> Tensor:  # (rows, 2)
    """Indices (sequence, token) of the rows that count: attention_mask, and labels other than the mask value.

    Raises:
        TypeError: ``model_input`` is no mapping.
    """
    if not isinstance(model_input, Mapping):
        raise TypeError(f"model_input: expected a dictionary of the model's inputs, got {type(model_input).__name__}")
    mask = model_input.get("attention_mask")
    mask = torch.ones_like(model_input["input_ids"]) if mask is None else mask
    mask, config = mask.bool(), EvaConfig.of(peft_config.eva_config)
    if config.use_label_mask and "labels" in model_input:
        mask = mask & (model_input["labels"] != config.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """The rows of a layer's input (batch, tokens, d) that ``model_input``, indices as above, selects: (rows, d).

    Raises:
        TypeError: the layer's input is neither a tensor nor a tuple or list that starts with one.
    """
    return _tensor_of(layer_input, layer_name)[tuple(model_input.T)]


def _every_row(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    x = _tensor_of(layer_input, layer_name)
    return x.reshape(-1, x.shape[-1])


def _tensor_of(layer_input: Any, layer_name: str) -> Tensor:
    first = layer_input[0] if isinstance(layer_input, (tuple, list)) and layer_input else layer_input
    if not isinstance(first, Tensor):
        raise TypeError(
            f"layer {layer_name}: expected a tensor as its first input, got {type(first).__name__}; pass a "
            "prepare_layer_inputs_fn that makes one of it"
        )
    return first


def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: Any = None,
    forward_fn: ForwardFn | None = forward_fn_dict,
    prepare_model_inputs_fn: PrepareModel | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: PrepareLayer | Mapping[str, PrepareLayer] | None = (
        prepare_layer_inputs_fn_language_modeling
    ),
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
    *,
    match_gain: Literal["global"] | bool = False,
) -> dict[str, Tensor]:
    """The matrix A of every layer, by the layer's name in ``model``: (rank, d), the rank being what it is given.

    Args:
        model: A ``PeftModel``, or a bare model together with ``peft_config``.
        dataloader: Any iterable of batches.
        peft_config: A ``LoraConfig``. None: the model's own.
        forward_fn: Called as ``forward_fn(model, inputs)``.
        prepare_model_inputs_fn: Called as ``(inputs, peft_config)`` for every batch; its result goes to
            ``prepare_layer_inputs_fn``. None: the inputs themselves go there.
        prepare_layer_inputs_fn: Called as ``(layer's positional inputs, what the above returned, layer's name)``;
            returns the rows (n, d) that count. A mapping names one for some layers; the others, as all layers with
            None, count every row. Named as in ``model``.
        adapter_name: The adapter of a ``PeftModel``.
        gather_distributed_inputs: Whether the ranks of the default process group bring different data, of which they
            make one answer; False: each rank for itself.
        show_progress_bar: On standard error.
        match_gain: As in :class:`eva_lora.EvaConfig`; PEFT's has no such field.

    Returns:
        float32 tensors on the model's device, none of which share memory; (0, d) where a layer is given rank 0. A
        layer of several matrices (experts, ``nn.MultiheadAttention``) has them one below the other.

    Raises:
        TypeError: a batch, or what a function returned, of the wrong type.
        ValueError: no ``peft_config`` for a bare model, an empty ``dataloader``, a mapping with names that are no
            layers, and as :func:`eva_lora.collect`.
    """
    peft_model = hasattr(model, "peft_config")
    if peft_config is None and not peft_model:
        raise ValueError("peft_config: expected a LoraConfig, since the model is no PeftModel; got None")
    ranks = joined(None if gather_distributed_inputs else "off")
    if peft_model:
        adapter: Any = PeftAdapter(model, adapter_name)
        prefix = _prefix(model)
        peft_config = adapter.config if peft_config is None else peft_config
    else:
        adapter, prefix = _BareModel(model, peft_config), ""
    prepared = _Prepared(peft_config, prepare_model_inputs_fn, prepare_layer_inputs_fn)
    row_mask_fn: RowMaskFn | None = None
    if not prepared.is_a_row_mask:
        adapter = _Substituted(adapter, [_PreparedSite.of(site, prefix, prepared) for site in adapter.sites])
        prepared.check_names([site.full_name for site in adapter.sites if isinstance(site, _PreparedSite)])
        row_mask_fn = prepared.see
    elif prepare_layer_inputs_fn is None:
        row_mask_fn = _no_mask
    batches = _Batches(
        dataloader, are_mappings=prepared.is_a_row_mask and row_mask_fn is None, may_be_empty=ranks is not None
    )
    # Labels as PEFT's function has them.
    config = replace(EvaConfig.of(peft_config.eva_config), label_names=("labels",), match_gain=match_gain)
    with ordinary_tensors():
        statistics = collect_with(
            adapter, model, batches, config, row_mask_fn=row_mask_fn,
            forward_fn=None if forward_fn is forward_fn_dict else forward_fn, progress=show_progress_bar, ranks=ranks,
        )  # fmt: skip
        device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
        return {prefix + name: a.to(device, copy=True) for name, a in plan(statistics).lora_a.items()}


def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: ForwardFn | None = forward_fn_dict,
    prepare_model_inputs_fn: PrepareModel | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: PrepareLayer | Mapping[str, PrepareLayer] | None = (
        prepare_layer_inputs_fn_language_modeling
    ),
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
    *,
    match_gain: Literal["global"] | bool = False,
) -> None:
    """Initialise a ``PeftModel``'s adapter with EVA, from data or from a state dict.

    Args:
        model: A ``PeftModel`` made with ``init_lora_weights="eva"``.
        dataloader: Needed where there is no ``eva_state_dict``.
        eva_state_dict: From :func:`get_eva_state_dict`, of this model or of its bare base; it is only read. Layers
            that are not in it keep their rank and a random A, and are named in a warning.
        forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn: As in :func:`get_eva_state_dict`.
        adapter_name: The adapter to initialise.
        gather_distributed_inputs, show_progress_bar, match_gain: As in :func:`get_eva_state_dict`.

    Raises:
        ValueError: the model is no ``PeftModel``, more than one adapter is active, the adapter was not made for
            EVA or was trained already, there is neither data nor a state dict, or the state dict's shapes or names are
            not the model's.
    """
    active = getattr(model, "active_adapters", None)
    if not hasattr(model, "peft_config") or active is None:
        raise ValueError(f"model: expected a PeftModel, got {type(model).__name__}")
    if callable(active):
        active = active()
    if len(active) > 1:
        raise ValueError(f"model: expected a single active adapter, got {sorted(active)}")
    configs: Any = model.peft_config
    if configs[adapter_name].init_lora_weights != "eva":
        raise ValueError(
            f"model: expected an adapter made with init_lora_weights='eva', {adapter_name!r} was made with "
            f"{configs[adapter_name].init_lora_weights!r}"
        )
    adapter = PeftAdapter(model, adapter_name)
    require_ordinary(model)
    TrainedLayers.of(adapter).require_none()
    if eva_state_dict is None:
        if dataloader is None:
            raise ValueError("dataloader: expected one where there is no eva_state_dict, got None")
        eva_state_dict = get_eva_state_dict(
            model, dataloader, None, forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn, adapter_name,
            gather_distributed_inputs, show_progress_bar, match_gain=match_gain,
        )  # fmt: skip
    given = {name.removeprefix(_PREFIX): value for name, value in eva_state_dict.items()}
    # PEFT's function asks an adapter for "eva", and leaves it so.
    config = replace(EvaConfig.of(adapter.config.eva_config), save_as="eva")
    eva_plan = _plan_of(given, adapter.sites, config)
    with ordinary_tensors():
        adapter.apply(eva_plan)
    missing = [*(site.name for site in adapter.sites if site.name not in given), *adapter.left_alone]
    if missing:
        warnings.warn(
            f"eva_state_dict: it holds nothing for the layers {missing}, which keep their rank and a random A "
            f"(init_lora_weights=True). EVA does not apply to {adapter.left_alone or 'none of them by kind'}",
            stacklevel=2,
        )


def planned_config(peft_config: Any, eva_plan: EvaPlan) -> Any:
    """A copy of a ``LoraConfig`` that builds a model with the ranks of a plan, for :func:`eva_lora.apply` to fill.

    Alphas go with the ranks as the plan's ``adjust_scaling_factors`` says; layers of rank 0 are left out. For models
    whose ranks cannot change later, since they are built sharded. ``init_lora_weights`` becomes True where it is
    "orthogonal", which PEFT builds with even ranks alone, or False, whose random B would have to be overwritten.

    Args:
        peft_config: The ``LoraConfig`` that the statistics' model was made with.
        eva_plan: From :func:`eva_lora.plan`; of several PEFT models in one, the part of the one that ``peft_config`` is
            of (:meth:`eva_lora.EvaPlan.part`).

    Raises:
        ValueError: ``target_parameters`` cannot say which layers are left.
    """
    from peft.utils.other import get_pattern_key

    config, patterns = copy.deepcopy(peft_config), PatternsAmong(eva_plan.sites)
    config.rank_pattern, config.alpha_pattern = {}, {}
    if config.init_lora_weights in ("orthogonal", False):
        config.init_lora_weights = True
    for name, site in eva_plan.sites.items():
        key = get_pattern_key(peft_config.alpha_pattern.keys(), name)
        alpha = peft_config.alpha_pattern.get(key, peft_config.lora_alpha)
        if eva_plan.config.adjust_scaling_factors:
            growth = site.rank / site.configured_rank
            alpha *= math.sqrt(growth) if peft_config.use_rslora else growth
        if site.rank:
            config.rank_pattern[patterns.of(name)] = site.rank
            config.alpha_pattern[patterns.of(name)] = int(alpha) if float(alpha).is_integer() else alpha
    removed = [name for name, site in eva_plan.sites.items() if site.rank == 0]
    if removed:
        former = config.exclude_modules or []
        before = [former] if isinstance(former, str) else [rf"(.*\.)?{re.escape(name)}" for name in former]
        config.exclude_modules = "|".join([*before, *map(re.escape, removed)])  # a text is matched whole
        if config.target_parameters:
            of_parameters = [name for name in eva_plan.sites if is_targeted(name, config.target_parameters)]
            kept = [name for name in of_parameters if name not in removed]
            config.target_parameters = planned_targets(config.target_parameters, kept, of_parameters)
    return config


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: Any = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Start an adapter with one round of LoftQ (arXiv 2310.08659): B A fitted to the base's quantisation error.

    As PEFT's, for any quantised base and not bitsandbytes' 4 bits alone; and what the layer adds to its base's output
    is the fit, where PEFT's is off by the layer's scaling. With inputs at hand :func:`eva_lora.fit_quantization_error`
    repairs more.

    Args:
        peft_model: A ``PeftModel`` on a quantised base.
        model_path: The float weights, as ``float_weights`` in :func:`eva_lora.fit_quantization_error`. None: what the
            model says it was loaded from.
        adapter_name: The adapter to start.
        callback: Called as ``callback(peft_model, layer's name)`` after each layer; where it returns False the layer is
            as it was before.

    Raises:
        ValueError: no layer has a base weight, or a float weight is missing or cannot be what its base was made of.
        FileNotFoundError: there are no float weights where they were looked for.
    """
    adapter = PeftAdapter(peft_model, adapter_name)
    bases, _ = base_weights_of(adapter)
    floats = FloatWeights.of(loaded_from(peft_model) if model_path is None else model_path)
    weights = LayerWeights(peft_model, bases, floats)
    made = {}
    with adapter.disabled():
        for site in adapter.sites:
            if site.name in bases:
                fit = fit_layer(*weights.read(site.name), no_preference(site.in_features), site.rank)
                made[site.name] = completed(*fit.factors(site.rank), site.rank, None, 0)
    for name, (a, b) in made.items():
        before = adapter.write_factors(name, a, b)
        if callback is not None and not callback(peft_model, name):
            before()


def _plan_of(given: Mapping[str, Tensor], sites: list[LoraSite], config: EvaConfig) -> EvaPlan:
    """A plan that writes the matrices given, and leaves the other layers their rank and A."""
    names = {site.name for site in sites}
    unknown = sorted(set(given) - names)
    if given and not names & set(given):
        raise ValueError(f"eva_state_dict: none of its layers is one of the model's; it names {unknown}")
    if unknown:
        warnings.warn(f"eva_state_dict: not in the model, and left out: {unknown}", stacklevel=3)
    planned = {}
    for site in sites:
        a = given.get(site.name)
        if a is not None and (a.ndim != 2 or a.shape[1] != site.in_features or a.shape[0] % site.parts):
            raise ValueError(
                f"eva_state_dict: {site.name}: expected shape ({site.parts} · rank, {site.in_features}), "
                f"got {tuple(a.shape)}"
            )
        rank = site.rank if a is None else a.shape[0] // site.parts
        planned[site.name] = PlannedSite(site.name, rank, site.rank, site.in_features, (), -1, site.parts)
    lora_a = {name: a for name, a in given.items() if name in names}
    return EvaPlan(planned, lora_a, config, sum(site.rank for site in sites))


def _prefix(model: nn.Module) -> str:
    from peft import PeftModel

    return _PREFIX if any(isinstance(module, PeftModel) for module in model.modules()) else ""


def _no_mask(batch: Any) -> None:
    return None


@dataclass
class _Batches:
    """A loader by the name that it has here, checked as it is read: no loader is asked for its length, which streams
    have none of."""

    loader: Iterable[Any]
    are_mappings: bool
    may_be_empty: bool

    def __iter__(self) -> Iterator[Any]:
        if not hasattr(self.loader, "__iter__") and not hasattr(self.loader, "__getitem__"):
            raise TypeError(f"dataloader: expected an iterable of batches, got {type(self.loader).__name__}")
        for batch in self.loader:
            self.may_be_empty = True  # from now on: an iterator that is over is empty when it is asked again
            if self.are_mappings and not isinstance(batch, Mapping):
                raise TypeError(
                    f"dataloader: expected batches that are dictionaries, got {type(batch).__name__}; pass "
                    "prepare_model_inputs_fn and prepare_layer_inputs_fn for others"
                )
            yield batch
        if not self.may_be_empty:
            raise ValueError("dataloader: expected at least one batch, it is empty")


@dataclass
class _Prepared:
    """The caller's functions, and what the first of them made of the batch at hand."""

    peft_config: Any
    of_model: PrepareModel | None
    of_layer: PrepareLayer | Mapping[str, PrepareLayer] | None
    batch: Any = None

    @property
    def is_a_row_mask(self) -> bool:
        """Whether the functions do no more than our own row mask does, or leave every row in."""
        from peft.tuners.lora import eva

        models = (prepare_model_inputs_fn_language_modeling, eva.prepare_model_inputs_fn_language_modeling)
        layers = (prepare_layer_inputs_fn_language_modeling, eva.prepare_layer_inputs_fn_language_modeling)
        return self.of_layer is None or (self.of_model in models and self.of_layer in layers)

    def check_names(self, names: list[str]) -> None:
        if isinstance(self.of_layer, Mapping) and not set(self.of_layer) <= set(names):
            raise ValueError(
                f"prepare_layer_inputs_fn: expected names of layers, got {sorted(set(self.of_layer) - set(names))}"
            )

    def see(self, batch: Any) -> None:
        """Called with every batch, in the place of a row mask: which rows count is for the functions to say."""
        self.batch = copy.deepcopy(batch) if self.of_model is None else self.of_model(batch, self.peft_config)

    def rows(self, layer_input: tuple[Any, ...], name: str) -> Tensor:
        function = self.of_layer.get(name) if isinstance(self.of_layer, Mapping) else self.of_layer
        rows = (function or _every_row)(layer_input, self.batch, name)
        if not isinstance(rows, Tensor) or rows.ndim != 2:
            got = f"shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
            raise TypeError(f"prepare_layer_inputs_fn: layer {name}: expected rows (n, d), got {got}")
        return rows


@dataclass(frozen=True)
class _PreparedSite(LoraSite):
    """A site whose rows a function of the caller's chooses. It shares its input with none."""

    full_name: str = ""
    prepared: _Prepared | None = None

    @classmethod
    def of(cls, site: LoraSite, prefix: str, prepared: _Prepared) -> "_PreparedSite | LoraSite":
        if site.parts > 1 or site.rows is not None:
            return site  # convolutions, attention and experts have rows that such a function cannot know
        return cls(
            site.name, site.module, site.in_features, site.rank, site.rank_multiple, site.removable,
            full_name=prefix + site.name, prepared=prepared,
        )  # fmt: skip

    def inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterable[LayerInput]:
        assert self.prepared is not None
        return (LayerInput(self.prepared.rows(args or tuple(kwargs.values()), self.full_name)),)


class _Substituted:
    """An adapter with other sites in the place of its own."""

    def __init__(self, adapter: Any, sites: list[LoraSite]) -> None:
        self.sites, self.left_alone, self.eva_config = sites, adapter.left_alone, None
        self.disabled, self.apply = adapter.disabled, adapter.apply


class _BareModel:
    """A model without adapters, and the layers that a ``LoraConfig`` targets in it."""

    def __init__(self, model: nn.Module, peft_config: Any) -> None:
        from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
        from peft.utils.other import get_pattern_key
        from transformers.pytorch_utils import Conv1D

        config = copy.deepcopy(peft_config)
        if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
            config = _maybe_include_all_linear_layers(config, model)
        self.left_alone: dict[str, str] = {}
        self.eva_config = None
        self.invocation = getattr(peft_config, "alora_invocation_tokens", None)
        self.sites = []
        for name, module in model.named_modules():
            if not isinstance(module, (nn.Linear, Conv1D)):
                continue
            if config.target_modules is not None and not check_target_module_exists(config, name):
                continue
            rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
            width = module.in_features if isinstance(module, nn.Linear) else module.weight.shape[0]
            self.sites.append(LoraSite(name, module, width, rank))
        if not self.sites:
            raise ValueError(
                f"peft_config: target_modules {peft_config.target_modules!r} match no linear layer of the model"
            )

    @contextmanager
    def disabled(self) -> Iterator[None]:
        yield

    def apply(self, eva_plan: EvaPlan) -> None:
        raise TypeError("model: it has no adapter to write to")
