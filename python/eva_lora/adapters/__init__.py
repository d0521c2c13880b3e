"""Models with LoRA layers: where A and B are, what a call brings a layer, what may be changed, how a plan is written.

Knows PyTorch modules and LoRA libraries; knows no loader, no statistic and no pass.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

from torch import nn

from ..planning import EvaPlan
from . import libraries, peft
from .base_weights import BaseWeight, Dequantize, Requantize
from .export import VLLM_RANKS, export_uniform
from .fused import is_fused
from .generators import noted_generators, ordinary_tensors, same_generators
from .outline import ModelOutline
from .parameters import ParameterSite
from .peft import PeftAdapter
from .peft_naming import PatternsAmong, is_targeted, planned_targets
from .plain import PlainExport, export_plain, load_adapter
from .preflight import (
    is_lora,
    is_partitioned,
    require_changeable,
    require_loaded,
    require_ordinary,
    require_watchable,
    waits_for_others,
    wrapped,
    wrapper_of,
)
from .sharded import whole_weights
from .site_adapter import SiteAdapter
from .sites import InnerWeight, LayerInput, LoraSite, Patches, Rows
from .training import TrainedLayers

__all__ = [
    "VLLM_RANKS",
    "BaseWeight",
    "Dequantize",
    "InnerWeight",
    "LayerInput",
    "LoraAdapter",
    "LoraSite",
    "ModelOutline",
    "ParameterSite",
    "Patches",
    "PatternsAmong",
    "PeftAdapter",
    "PlainExport",
    "Requantize",
    "Rows",
    "SiteAdapter",
    "TrainedLayers",
    "export_plain",
    "export_uniform",
    "find_adapter",
    "is_fused",
    "is_lora",
    "is_partitioned",
    "is_targeted",
    "load_adapter",
    "noted_generators",
    "ordinary_tensors",
    "planned_targets",
    "register_adapter",
    "require_changeable",
    "require_loaded",
    "require_ordinary",
    "require_watchable",
    "same_generators",
    "tell_left_alone",
    "waits_for_others",
    "whole_weights",
    "wrapped",
    "wrapper_of",
]


class LoraAdapter(Protocol):
    """One adapter of a model, whatever library made it. A library is supported by implementing this.

    One that also has ``zero_before_training()``, a mapping of layers' names to lists of tensors (most often B) that are
    zero until it is trained, is not overwritten in silence once it was. One that has ``acting()``, the same of what
    is switched on as things are, may be watched while it is there. One that has ``matrices()``, ``scalings()``,
    ``kept_whole()``, ``hold()``, ``freeze_second()`` and an ``apply`` that returns what undoes it, as
    adapters of layers that keep A and B as parameters have them, can start by the other methods.
    """

    @property
    def sites(self) -> Sequence[LoraSite]:
        """Layers EVA applies to, in the model's order."""

    @property
    def left_alone(self) -> Mapping[str, str]:
        """Name → reason of the adapter's layers that EVA does not apply to; they stay as they are."""

    @property
    def eva_config(self) -> object | None:
        """The EVA options the library itself carries, taken where the caller gives none."""

    def disabled(self) -> AbstractContextManager[None]:
        """Within it the model computes what its base computes; afterwards all is as before."""

    def apply(self, plan: EvaPlan) -> object:
        """Write the plan into the model: all of it, or none of it and an error."""


Find = Callable[[nn.Module], "LoraAdapter | Sequence[LoraSite] | None"]
F = TypeVar("F", bound=Find)

_registered: list[Find] = []


def register_adapter(find: F) -> F:
    """Make EVA find adapters of one's own; usable as a decorator.

    ``find(model)`` returns the model's sites (:class:`ParameterSite` for layers that keep A and B as
    parameters), a :class:`LoraAdapter`, or nothing if the model has none of its kind. What was registered
    last is asked first, before the libraries known here. Registering the same function again changes nothing.
    """
    if find not in _registered:
        _registered.append(find)
    return find


def find_adapter(model: nn.Module, sites: Sequence[LoraSite] | None = None) -> LoraAdapter:
    """The adapter of ``model``, or the one that ``sites`` make up.

    Raises:
        TypeError: ``model`` is no module, ``sites`` no sequence of sites.
        ValueError: no LoRA layer of a known implementation is found, or the adapter cannot be initialised.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module with LoRA layers, got {type(model).__name__}")
    if sites is not None:
        return SiteAdapter(sites)
    for find in (*reversed(_registered), peft.find, libraries.find):
        found = find(model)
        if isinstance(found, Sequence) and found:
            return SiteAdapter(found)
        if found is not None and not isinstance(found, Sequence):
            members = ("sites", "left_alone", "eva_config", "disabled", "apply")
            if find in _registered and not all(hasattr(found, name) for name in members):
                raise TypeError(
                    f"register_adapter: expected {find!r} to return a list of sites, a LoraAdapter or None, got "
                    f"{type(found).__name__}"
                )
            return found
    raise ValueError(
        "model: found no LoRA layers. Add them first, for example peft.get_peft_model(model, LoraConfig(...)); for "
        "layers of your own see eva_lora.register_adapter. Known: PEFT's LoRA and the libraries in docs/libraries.md."
    )


def tell_left_alone(adapter: LoraAdapter, method: str, stacklevel: int) -> None:
    """Warn of the adapter's layers that a method does not apply to."""
    if adapter.left_alone:
        named = "; ".join(f"{name}: {reason}" for name, reason in adapter.left_alone.items())
        warnings.warn(f"{method} leaves these layers as they are: {named}", stacklevel=stacklevel + 1)
