"""PEFT's LoRA: where its layers are, how to switch them off, and how a plan is written into them."""

import copy
import importlib.metadata
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from eva_kernels.low_rank_update import Scratch

from ..planning import EvaPlan
from .base_weights import BaseWeight
from .fused import unfused
from .outline import ModelOutline, plain_modules
from .peft_layers import (
    base_weight_of,
    factors,
    hold_halves,
    holds_halves,
    is_stacked,
    magnitude_of,
    matrices_of,
    parameters_of,
    parts_of,
    renew_magnitude,
    site_of,
)
from .peft_roots import base_models
from .peft_start import (
    LOADED_BY,
    begin,
    give_back,
    holders_of_memory,
    kept_whole,
    refuse_combining,
    require_movable,
    require_readable,
)
from .peft_writing import PlanWriter
from .plan_check import check_plan
from .sharded import fill_
from .sites import LeftAlone, LoraSite

__all__ = ["PeftAdapter", "PeftAdapters", "find"]

#: Initialisations that leave the base weights as they were. B begins as zero, but for False, which fills it with random
#: numbers, and "orthogonal", where B A is zero.
_NEUTRAL_INITS = (True, False, "gaussian", "orthogonal", "eva")

_OLDEST = (0, 20)  # earlier ones save no ranks of parameters, and make layers anew in another way


def find(model: nn.Module) -> "PeftAdapter | PeftAdapters | None":
    """The active LoRA adapter of a PEFT model, or those of the several that are in a model; None if it has no PEFT LoRA
    layer.

    Raises:
        ValueError: there is one, but EVA cannot initialise it; the message says why and what to do.
    """
    try:
        from peft.tuners.lora.layer import LoraLayer
    except ImportError:
        return None
    if not any(isinstance(module, LoraLayer) for module in model.modules()):
        return None
    installed = importlib.metadata.version("peft")
    if tuple(int(number) for number in re.findall(r"\d+", installed)[:2]) < _OLDEST:
        raise ValueError(f"model: expected layers of PEFT {_OLDEST[0]}.{_OLDEST[1]} or later, {installed} is installed")
    adapters = {path: PeftAdapter(model, root=root) for path, root in base_models(model).items()}
    return PeftAdapters(adapters) if len(adapters) > 1 else next(iter(adapters.values()))


class PeftAdapter:
    """One LoRA adapter of a PEFT model.

    Args:
        model: A ``PeftModel``, a ``LoraModel``, a model with adapters injected into it, or what wraps one of these.
        name: The adapter's name. None: the one that is active.
        root: The base model that it is in. None: the only one in ``model``.

    Raises:
        ValueError: as :func:`find`; or there are several PEFT models in ``model``, and no ``root`` says which is meant.
    """

    def __init__(self, model: nn.Module, name: str | None = None, *, root: nn.Module | None = None) -> None:
        self._model = model
        if root is None:
            roots = base_models(model)
            if len(roots) > 1:
                raise ValueError(f"model: expected one PEFT model, there are {len(roots)} in it: {list(roots)}")
            (root,) = roots.values()
        self._root = root
        self._configs: dict[str, Any] = vars(root)["peft_config"]
        self._of_any_adapter = everything = _lora_layers(self._root)
        self.name = _active_name(everything) if name is None else name
        self._everything = {n: layer for n, layer in everything.items() if self.name in layer.r}
        self._check_config()
        self.sites: list[LoraSite] = []
        self.left_alone: dict[str, str] = {}
        for layer_name, layer in self._everything.items():
            if any(member.merged for member in parts_of(layer)):
                raise ValueError(
                    f"model: the adapter of {layer_name} is merged into its base weight; call unmerge first"
                )
            if holds_halves(layer, self.name):
                raise ValueError(
                    f"model: half of A and B of {layer_name} is held, since it started from part of its base weight; "
                    "to begin anew, make the adapter anew"
                )
            try:
                site = site_of(layer_name, layer, self.name)
                self.sites.append(replace(site, parameters=parameters_of(layer, self.name)))
            except LeftAlone as reason:
                self.left_alone[layer_name] = str(reason)
        if not self.sites:
            raise ValueError(f"model: EVA applies to none of its LoRA layers: {self.left_alone}")
        self.layers: dict[str, Any] = {site.name: self._everything[site.name] for site in self.sites}

    @property
    def config(self) -> Any:
        """The adapter's ``LoraConfig``."""
        return self._configs[self.name]

    @property
    def eva_config(self) -> Any:
        """PEFT's ``EvaConfig`` where the ``LoraConfig`` carries one, else None."""
        return getattr(self.config, "eva_config", None)

    @property
    def invocation(self) -> list[int] | None:
        """Of an activated LoRA the tokens from whose last occurrence in a sequence on it acts, else None."""
        return getattr(self.config, "alora_invocation_tokens", None)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        outline = ModelOutline(self._model)
        switches = [m for m in outline.modules if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
        enabled = [m for m in switches if not m.disable_adapters]
        # Switching an adapter off and on again makes its parameters trainable, whatever they were before.
        trainable = [(p, p.requires_grad) for p in outline.parameters]
        # bitsandbytes repacks 4-bit weights in the first eval forward on such a CPU, and cannot train on them then.
        packing: list[Any] = [m for m in outline.modules if vars(m).get("support_avx512bf16_for_cpu", False)]
        try:
            for module in packing:
                module.support_avx512bf16_for_cpu = False
            for module in enabled:
                module.enable_adapters(False)
            with unfused(outline.modules):
                yield
        finally:
            for module in enabled:
                module.enable_adapters(True)
            for module in packing:
                module.support_avx512bf16_for_cpu = True
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)

    def apply(self, plan: EvaPlan) -> Callable[[], None]:
        """Write a plan into the layers and the ``LoraConfig``: all of it, or nothing.

        Returns:
            What undoes it.

        Raises:
            ValueError: the plan is for other layers, or for layers of another rank or width.
        """
        return PlanWriter(self.name, self._root, self._configs, self.sites, self._everything).write(plan)

    @torch.no_grad()
    def write_factors(self, name: str, a: Tensor, b: Tensor) -> Callable[[], None]:  # (r, d), (out, r)
        """Write A into a layer, and B such that the layer adds ``b`` A x; its rank stays. Returns what undoes it.

        A layer with DoRA computes with the sum of both then; its lengths follow.
        """
        layer = self.layers[name]
        (first,), (module,) = factors(layer, self.name)
        second: Any = module.weight
        magnitude = magnitude_of(layer, self.name)
        written = [first, second, *([] if magnitude is None else [magnitude.weight])]
        before = [parameter.detach().clone() for parameter in written]
        fill_(first, a.view(first.shape))
        fill_(second, (b / layer.scaling[self.name]).view(second.shape))
        renew_magnitude(layer, self.name)

        @torch.no_grad()
        def undo() -> None:
            for parameter, value in zip(written, before, strict=True):
                parameter.copy_(value)

        return undo

    def scalings(self) -> dict[str, float]:
        """Layer → what it multiplies B A x with."""
        return {name: float(layer.scaling[self.name]) for name, layer in self.layers.items()}

    def require_movable(self) -> None:
        """Raise unless part of each base weight can be moved into the adapter (:meth:`move`).

        Raises:
            ValueError: it cannot; the message names the layer and says why.
        """
        if getattr(self.config, "lora_bias", False):
            raise ValueError(
                "model: its LoraConfig sets lora_bias, and the weights it was saved with took part of a base"
            )
        holders = holders_of_memory(self._root)
        for name, layer in self.layers.items():
            require_movable(name, layer, holders)

    def kept_whole(self, *, read: bool = True) -> str:
        """Why base weights have to stay as they are, and what A and B start from is held beside them (:meth:`hold`);
        "" where part of each can be moved (:meth:`move`).

        Args:
            read: Whether weights have to be read. False: those that cannot be have to stay as they are.

        Raises:
            ValueError: a weight has to be read and cannot be; the message names the layer and says why.
        """
        for name, layer in self.layers.items() if read else ():
            require_readable(name, layer)
        if getattr(self.config, "lora_bias", False):
            return "lora_bias is set, with which PEFT saves no start but its default"
        holders = holders_of_memory(self._root)
        reasons = ((name, kept_whole(layer, holders)) for name, layer in self.layers.items())
        return next((f"of {name}: {reason}" for name, reason in reasons if reason), "")

    def hold(self, plan: EvaPlan) -> None:
        """Have the first half of each rank that a plan has just made trained, and hold the second."""
        for name, layer in self.layers.items():
            if plan.sites[name].rank:
                hold_halves(layer, self.name)

    def move(self, method: str, plan: EvaPlan) -> dict[str, float]:
        """Take s B A, as a plan has just made them, from each base weight: all or none. The adapter then loads with
        :func:`eva_lora.load_adapter` only.

        Returns:
            Layer → what its weight's dtype rounds off, over ‖W‖.
        """
        errors, scratch = {}, Scratch()
        try:
            for name, layer in self.layers.items():
                if plan.sites[name].rank:
                    errors[name] = begin(layer, self.name, scratch=scratch)
        except BaseException:
            self.move_back()
            raise
        self.name_start(f"{LOADED_BY}{method}")
        return errors

    def name_start(self, init: str) -> None:
        """Have the ``LoraConfig`` say what the adapter started as, and PEFT not combine it with others."""
        config = copy.deepcopy(self.config)
        config.init_lora_weights, config.eva_config = init, None
        self._configs[self.name] = config
        refuse_combining(self._model, self._root)

    def move_back(self) -> None:
        """Give base weights back what was taken from them, to a rounding."""
        for layer in self.layers.values():
            give_back(layer, self.name)

    def freeze_second(self) -> None:
        """Leave each B as it is in training: MiCA (arXiv 2604.01694), which PEFT does too where it knows it."""
        config = copy.deepcopy(self.config)
        # PEFT knows it of linear layers with nothing beside; elsewhere it could not load what was saved.
        known = not (config.lora_bias or config.use_dora) and not any(
            is_stacked(layer) or layer.get_base_layer().weight.ndim > 2 for layer in self.layers.values()
        )
        for layer in self.layers.values():
            for module in factors(layer, self.name)[1]:
                module.weight.requires_grad_(False)
            for member in parts_of(layer):
                if hasattr(member, "frozen_peft_weight_names"):  # what PEFT does not switch on again
                    member.frozen_peft_weight_names = {**member.frozen_peft_weight_names, self.name: ("lora_B",)}
                    config.init_lora_weights, config.eva_config = "mica" if known else True, None
        self._configs[self.name] = config

    def base_weights(self) -> tuple[dict[str, BaseWeight], dict[str, str]]:
        """Layer → its base weight, and layer → why it has none."""
        found, without = {}, {}
        dtype = next((p.dtype for p in self._root.parameters() if p.is_floating_point()), torch.float32)
        for site in self.sites:
            try:
                found[site.name] = base_weight_of(site, self.layers[site.name], self.name, dtype)
            except LeftAlone as reason:
                without[site.name] = str(reason)
        return found, without

    def matrices(self) -> tuple[dict[str, tuple[BaseWeight, ...]], dict[str, str]]:
        """Layer → for each of its parts, its base weight; and layer → why it has none."""
        found, without = {}, {}
        dtype = next((p.dtype for p in self._root.parameters() if p.is_floating_point()), torch.float32)
        for site in self.sites:
            try:
                found[site.name] = matrices_of(site, self.layers[site.name], self.name, dtype)
            except LeftAlone as reason:
                without[site.name] = str(reason)
        return found, without

    def zero_before_training(self) -> dict[str, list[Tensor]]:
        """Layer → its B, with a bias if it has one; where B does not begin as zero but B A does, what shows that."""
        found = {}
        for name, layer in self.layers.items():
            weights, second = factors(layer, self.name)
            tensors: list[Tensor] = [p for module in second for p in module.parameters()]
            if self.config.init_lora_weights == "orthogonal" and len(weights) == 1 and weights[0].device.type != "meta":
                tensors = [_more_than_rounding(tensors[0], weights[0], layer.get_base_layer()), *tensors[1:]]
            found[name] = tensors
        return found

    def acting(self) -> dict[str, list[Tensor]]:
        """Layer → what of its adapters changes its outputs unless it is zero: of those that are switched on, of
        whichever name, and of those that are merged into its base weight."""
        found: dict[str, list[Tensor]] = {}
        for name, layer in self._of_any_adapter.items():
            if layer.disable_adapters:
                continue
            for adapter in dict.fromkeys([*layer.active_adapters, *layer.merged_adapters]):
                if adapter in layer.lora_embedding_A:
                    found.setdefault(name, []).append(layer.lora_embedding_A[adapter])
                elif adapter in layer.r:
                    second = factors(layer, adapter)[1]
                    found.setdefault(name, []).extend(p for module in second for p in module.parameters())
        return found

    def _check_config(self) -> None:
        if self.name not in self._configs:
            raise ValueError(f"model: found no LoraConfig for adapter {self.name!r} in peft_config")
        config = self.config
        init = config.init_lora_weights
        if init not in _NEUTRAL_INITS:
            raise ValueError(
                f"model: init_lora_weights={init!r} has already changed the base weights or A to suit itself; build "
                "the adapter with init_lora_weights='eva' (or True) and initialise that"
            )
        for option in ("kasa_config", "use_qalora", "arrow_config"):
            if getattr(config, option, None):
                raise ValueError(f"model: EVA does not work with a LoraConfig that sets {option}")
        tied = getattr(config, "target_modules_to_tie", None)  # PEFT's own note of what the option came to
        if tied:
            raise ValueError(
                "model: EVA does not work with a LoraConfig that sets ensure_weight_tying and targets tied layers, "
                f"here {sorted(tied)}: one A would have to serve the inputs of both. Leave out the option or the layers"
            )


class PeftAdapters:
    """The adapters of several PEFT models in one model (an encoder and a decoder, two towers), as one.

    Layers are named by the path of their PEFT model and the name they have there; ranks move between all of them.

    Args:
        adapters: Path of each PEFT model → its adapter.
    """

    def __init__(self, adapters: Mapping[str, PeftAdapter]) -> None:
        self._adapters = dict(adapters)
        named = [(path, adapter, site) for path, adapter in adapters.items() for site in adapter.sites]
        self.sites = [replace(site, name=f"{path}.{site.name}") for path, _, site in named]
        self.left_alone = {
            f"{path}.{name}": reason
            for path, adapter in adapters.items()
            for name, reason in adapter.left_alone.items()
        }

    @property
    def eva_config(self) -> Any:
        """PEFT's ``EvaConfig`` that all of the ``LoraConfig`` carry, else None.

        Raises:
            ValueError: they carry different ones.
        """
        first, *others = (adapter.eva_config for adapter in self._adapters.values())
        if any(other != first for other in others):
            raise ValueError(
                f"model: the LoraConfigs of its PEFT models {list(self._adapters)} carry different eva_config; pass "
                "config"
            )
        return first

    def disabled(self) -> AbstractContextManager[None]:
        return next(iter(self._adapters.values())).disabled()  # all adapters of the model at once

    def scalings(self) -> dict[str, float]:
        """As of each adapter."""
        return {f"{path}.{n}": s for path, adapter in self._adapters.items() for n, s in adapter.scalings().items()}

    def kept_whole(self, *, read: bool = True) -> str:
        """As of the first adapter that has a reason: weights stay as they are in all of them then."""
        reasons = {path: adapter.kept_whole(read=read) for path, adapter in self._adapters.items()}  # each is asked
        return next((f"in {path}, {reason}" for path, reason in reasons.items() if reason), "")

    def hold(self, plan: EvaPlan) -> None:
        """As of each adapter."""
        for path, adapter in self._adapters.items():
            adapter.hold(plan.part(path))

    def matrices(self) -> tuple[dict[str, tuple[BaseWeight, ...]], dict[str, str]]:
        """As of each adapter."""
        found: dict[str, tuple[BaseWeight, ...]] = {}
        without: dict[str, str] = {}
        for path, adapter in self._adapters.items():
            weights, reasons = adapter.matrices()
            found |= {
                f"{path}.{name}": tuple(replace(part, name=f"{path}.{name}") for part in parts)
                for name, parts in weights.items()
            }
            without |= {f"{path}.{name}": reason for name, reason in reasons.items()}
        return found, without

    def move(self, method: str, plan: EvaPlan) -> dict[str, float]:
        """As of each adapter: all of them or none."""
        errors: dict[str, float] = {}
        done = []
        try:
            for path, adapter in self._adapters.items():
                errors |= {f"{path}.{name}": error for name, error in adapter.move(method, plan.part(path)).items()}
                done.append(adapter)
        except BaseException:
            for adapter in done:
                adapter.move_back()
            raise
        return errors

    def freeze_second(self) -> None:
        """As of each adapter."""
        for adapter in self._adapters.values():
            adapter.freeze_second()

    def base_weights(self) -> tuple[dict[str, BaseWeight], dict[str, str]]:
        """As of each adapter."""
        found: dict[str, BaseWeight] = {}
        without: dict[str, str] = {}
        for path, adapter in self._adapters.items():
            weights, reasons = adapter.base_weights()
            found |= {f"{path}.{name}": replace(weight, name=f"{path}.{name}") for name, weight in weights.items()}
            without |= {f"{path}.{name}": reason for name, reason in reasons.items()}
        return found, without

    def zero_before_training(self) -> dict[str, list[Tensor]]:
        """As of each adapter."""
        return {
            f"{path}.{name}": tensors
            for path, adapter in self._adapters.items()
            for name, tensors in adapter.zero_before_training().items()
        }

    def acting(self) -> dict[str, list[Tensor]]:
        """As of each adapter."""
        return {
            f"{path}.{name}": tensors
            for path, adapter in self._adapters.items()
            for name, tensors in adapter.acting().items()
        }

    def apply(self, plan: EvaPlan) -> Callable[[], None]:
        """Write a plan into all of them, or into none.

        Returns:
            What undoes it.

        Raises:
            ValueError: as :meth:`PeftAdapter.apply`.
        """
        check_plan(plan, self.sites)
        steps: list[Callable[[], None]] = []

        def undo() -> None:
            for step in reversed(steps):
                step()

        try:
            for path, adapter in self._adapters.items():
                steps.append(adapter.apply(plan.part(path)))
        except BaseException:
            undo()
            raise
        return undo


def _more_than_rounding(b: Tensor, a: Tensor, base: Any) -> Tensor:  # (out, r), (r, d) -> bool, without dimensions
    """Whether B A is more than the rounding of a B and an A whose exact product is zero.

    PEFT computes both in float32 and rounds them to the base weight's dtype.
    """
    dtypes = [t.dtype for t in (b, getattr(base, "weight", b)) if t.dtype.is_floating_point]
    float32 = torch.finfo(torch.float32).eps
    rounded = max(torch.finfo(dtype).eps for dtype in dtypes)  # half of it for each factor
    b, a = b.detach().float(), a.detach().float()
    # Each of three products, those that made the factors and this one, is off by at most r roundings.
    return (b @ a).norm() > (rounded + 3 * a.shape[0] * float32) * b.norm() * a.norm()


def _lora_layers(root: nn.Module) -> dict[str, Any]:
    """Every LoRA layer by the name it has in the base model; a layer for a parameter is named as that is."""
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper

    layers: dict[str, Any] = {path: m for path, m in plain_modules(root) if isinstance(m, LoraLayer)}
    nested = {id(member) for layer in layers.values() for member in parts_of(layer)[1:]}
    named = {}
    for path, layer in layers.items():
        if id(layer) not in nested:
            name = path.replace(".base_layer", "")
            named[f"{name}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else name] = layer
    return named


def _active_name(layers: dict[str, Any]) -> str:
    names = {name for layer in layers.values() for name in layer.active_adapters}
    if len(names) != 1:
        found = f"{len(names)} are: {sorted(names)}" if names else "none is"
        raise ValueError(f"model: expected exactly one active LoRA adapter, {found}; call model.set_adapter(name)")
    return names.pop()
