"""PEFT's LoRA: where its layers are, how to switch them off, and how a plan is written into them."""

import importlib.metadata
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..planning import EvaPlan
from .fused import unfused
from .outline import ModelOutline
from .peft_layers import parts_of, site_of
from .peft_writing import PlanWriter
from .sharded import plain_name
from .sites import LeftAlone, LoraSite

__all__ = ["PeftAdapter", "find"]

#: Initialisations that leave the base weights as they were; B is zeroed whatever it was.
_NEUTRAL_INITS = (True, False, "gaussian", "orthogonal", "eva")

_OLDEST = (0, 20)  # earlier ones save no ranks of parameters, and make layers anew in another way


def find(model: nn.Module) -> "PeftAdapter | None":
    """The active LoRA adapter of a PEFT model, or None if the model has no PEFT LoRA layer.

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
    return PeftAdapter(model)


class PeftAdapter:
    """One LoRA adapter of a PEFT model.

    Args:
        model: A ``PeftModel``, a ``LoraModel``, or a model with adapters injected into it.
        name: The adapter's name. None: the one that is active.

    Raises:
        ValueError: as :func:`find`.
    """

    def __init__(self, model: nn.Module, name: str | None = None) -> None:
        self._model = model
        self._root, self._configs = _root_and_configs(model)
        everything = _lora_layers(self._root)
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
            try:
                self.sites.append(site_of(layer_name, layer, self.name))
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

    def apply(self, plan: EvaPlan) -> None:
        """Write a plan into the layers and the ``LoraConfig``: all of it, or nothing.

        Raises:
            ValueError: the plan is for other layers, or for layers of another rank or width.
        """
        PlanWriter(self.name, self._root, self._configs, self.sites, self._everything).write(plan)

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
        for option in ("kasa_config", "use_qalora", "target_modules_to_tie", "arrow_config"):
            if getattr(config, option, None):
                raise ValueError(f"model: EVA does not work with a LoraConfig that sets {option}")


def _lora_layers(root: nn.Module) -> dict[str, Any]:
    """Every LoRA layer by the name it has in the base model; a layer for a parameter is named as that is."""
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper

    layers: dict[str, Any] = {path: m for path, m in root.named_modules() if isinstance(m, LoraLayer)}
    nested = {id(member) for layer in layers.values() for member in parts_of(layer)[1:]}
    named = {}
    for path, layer in layers.items():
        if id(layer) not in nested:
            name = plain_name(path).replace(".base_layer", "")
            named[f"{name}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else name] = layer
    return named


def _active_name(layers: dict[str, Any]) -> str:
    names = {name for layer in layers.values() for name in layer.active_adapters}
    if len(names) != 1:
        found = f"{len(names)} are: {sorted(names)}" if names else "none is"
        raise ValueError(f"model: expected exactly one active LoRA adapter, {found}; call model.set_adapter(name)")
    return names.pop()


def _root_and_configs(model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """The base model, relative to which layers are named, and its adapters' configs."""
    from peft import PeftModel
    from peft.tuners.lora import LoraModel

    for module in model.modules():
        configs: Any = getattr(module, "peft_config", None)
        if isinstance(configs, dict):
            wrapper: Any = module
            if isinstance(module, PeftModel):
                return wrapper.get_base_model(), configs
            return (wrapper.model if isinstance(module, LoraModel) else module), configs
    raise ValueError("model: it has PEFT LoRA layers, but no peft_config says how they were made")
