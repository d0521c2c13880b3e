"""PEFT's LoRA: where its layers are, how to switch them off, and how a plan is written into them."""

import copy
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import LoraSite

if TYPE_CHECKING:
    from ..planning import EvaPlan, PlannedSite

__all__ = ["PeftAdapter", "find"]

#: Initialisations that leave the base weights as they were; B is zeroed whatever it was.
_NEUTRAL_INITS = (True, False, "gaussian", "orthogonal", "eva")


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
    return PeftAdapter(model)


class PeftAdapter:
    """The one active LoRA adapter of a PEFT model.

    Args:
        model: A ``PeftModel``, a ``LoraModel``, or a model with adapters injected into it.

    Raises:
        ValueError: as :func:`find`.
    """

    def __init__(self, model: nn.Module) -> None:
        from peft.tuners.lora.layer import LoraLayer

        self._model = model
        self._root, self._configs = _root_and_configs(model)
        self.layers: dict[str, Any] = {n: m for n, m in self._root.named_modules() if isinstance(m, LoraLayer)}
        self.name = self._active_name()
        self.layers = {n: m for n, m in self.layers.items() if self.name in m.r}
        self._check_config()
        self._sites = [LoraSite(n, m, m.in_features, m.r[self.name]) for n, m in self.layers.items()]
        for name, layer in self.layers.items():
            self._check_layer(name, layer)

    @property
    def sites(self) -> list[LoraSite]:
        return self._sites

    @property
    def config(self) -> Any:
        """The adapter's ``LoraConfig``."""
        return self._configs[self.name]

    @property
    def eva_config(self) -> Any:
        """PEFT's ``EvaConfig`` where the ``LoraConfig`` carries one, else None."""
        return getattr(self.config, "eva_config", None)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        switches = [m for m in self._model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
        enabled = [m for m in switches if not m.disable_adapters]
        # Switching an adapter off and on again makes its parameters trainable, whatever they were before.
        trainable = [(p, p.requires_grad) for p in self._model.parameters()]
        try:
            for module in enabled:
                module.enable_adapters(False)
            yield
        finally:
            for module in enabled:
                module.enable_adapters(True)
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)

    def apply(self, plan: "EvaPlan") -> None:
        """Write A, zero B, set ranks and alphas, drop the adapter where the rank is 0, and make the
        ``LoraConfig`` say so, so that the adapter saves and loads as it is. All of it, or nothing.

        Raises:
            ValueError: the plan is for other layers, or for layers of another rank or width.
        """
        self._check_plan(plan)
        snapshots = {name: _Snapshot(layer) for name, layer in self.layers.items()}
        config = copy.deepcopy(self.config)
        config.init_lora_weights = "eva"  # what the weights are from here on
        config.eva_config = _peft_eva_config(plan)
        emptied = []
        try:
            with torch.no_grad(), torch.random.fork_rng(self._cuda_devices()):
                for name, layer in self.layers.items():
                    site = plan.sites[name]
                    if site.rank == 0:
                        emptied.append(name)
                    else:
                        self._write(layer, site, plan.lora_a[name], config, plan.config.adjust_scaling_factors)
                self._describe(config, set(emptied))
                for name in emptied:
                    self._remove(name)
        except BaseException:
            for name, snapshot in snapshots.items():
                snapshot.restore()
                _set_submodule(self._root, name, self.layers[name])
            raise
        if config.lora_bias:  # PEFT refuses to load lora_bias together with "eva"
            config.init_lora_weights, config.eva_config = self.config.init_lora_weights, self.config.eva_config
        self._configs[self.name] = config  # the caller's LoraConfig object stays as it was

    def _write(self, layer: Any, site: "PlannedSite", lora_a: Tensor, config: Any, adjust: bool) -> None:
        adapter = self.name
        old_rank, alpha = layer.r[adapter], layer.lora_alpha[adapter]
        on_meta = layer.lora_A[adapter].weight.device.type == "meta"
        if site.rank != old_rank or on_meta or adapter in layer.lora_variant:
            if adjust:
                growth = site.rank / old_rank
                alpha *= math.sqrt(growth) if layer.use_rslora[adapter] else growth
                alpha = int(alpha) if float(alpha).is_integer() else alpha
            # A variant (DoRA) derives parameters from B, so it starts over even where the rank stays.
            before = {name: (p.dtype, p.requires_grad) for name, p in layer.named_parameters()}
            layer.update_layer(adapter, r=site.rank, lora_alpha=alpha, config=config)
            for name, parameter in layer.named_parameters():
                dtype, requires_grad = before[name]
                parameter.data = parameter.data.to(dtype)
                parameter.requires_grad_(requires_grad)
            for container in ("lora_A", "lora_B", "lora_dropout", "lora_magnitude_vector"):
                modules = getattr(layer, container)
                if adapter in modules:
                    modules[adapter].train(layer.training)
        layer.lora_A[adapter].weight.copy_(lora_a)
        for parameter in layer.lora_B[adapter].parameters():
            parameter.zero_()

    def _remove(self, name: str) -> None:
        layer = self.layers[name]
        if len(layer.r) == 1:
            _set_submodule(self._root, name, layer.get_base_layer())
            return
        active = layer._active_adapter
        trainable = [(p, p.requires_grad) for p in layer.parameters()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer.delete_adapter(self.name)
        # Deleting makes PEFT switch another adapter on in this layer alone; the active one is simply absent here.
        layer._active_adapter = active
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)

    def _cuda_devices(self) -> list[torch.device]:
        return list({p.device for p in self._root.parameters() if p.device.type == "cuda"})

    def _describe(self, config: Any, emptied: set[str]) -> None:
        """Make the config's patterns and targets those of the layers as they are now."""
        kept = {name: layer for name, layer in self.layers.items() if name not in emptied}
        everything = [name for name, _ in self._root.named_modules()]
        config.rank_pattern = {
            _pattern(name, everything): layer.r[self.name]
            for name, layer in kept.items()
            if layer.r[self.name] != config.r
        }
        config.alpha_pattern = {
            _pattern(name, everything): layer.lora_alpha[self.name]
            for name, layer in kept.items()
            if layer.lora_alpha[self.name] != config.lora_alpha
        }
        if not emptied:
            return
        config.layers_to_transform = config.layers_pattern = None  # target_modules names every layer from here on
        if any(gone.endswith(f".{name}") for gone in emptied for name in kept):
            config.target_modules = "|".join(re.escape(name) for name in kept)  # a string is matched whole
        else:
            config.target_modules = set(kept)

    def _active_name(self) -> str:
        names = {name for layer in self.layers.values() for name in layer.active_adapters}
        if len(names) != 1:
            found = f"{len(names)} are: {sorted(names)}" if names else "none is"
            raise ValueError(f"model: expected exactly one active LoRA adapter, {found}; call model.set_adapter(name)")
        return names.pop()

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

    def _check_layer(self, name: str, layer: Any) -> None:
        from transformers.pytorch_utils import Conv1D

        base = layer.get_base_layer()
        kinds = (nn.Linear, Conv1D)
        lora_a = dict(layer.lora_A).get(self.name)
        if not isinstance(base, kinds) or not isinstance(lora_a, nn.Linear):
            raise ValueError(
                f"model: LoRA layer {name} wraps a {type(base).__name__}, which is not available yet; supported: "
                "nn.Linear and transformers' Conv1D. Leave it out of target_modules"
            )
        shape = tuple(lora_a.weight.shape)
        if shape != (layer.r[self.name], layer.in_features):
            raise ValueError(
                f"model: A of {name} has shape {shape}, expected {(layer.r[self.name], layer.in_features)}"
            )
        if layer.merged:
            raise ValueError(f"model: the adapter of {name} is merged into its base weight; call unmerge first")

    def _check_plan(self, plan: "EvaPlan") -> None:
        missing = sorted(set(self.layers) - set(plan.sites))
        unknown = sorted(set(plan.sites) - set(self.layers))
        if missing or unknown:
            raise ValueError(
                f"plan: it is for other layers than the model's: not in the plan {missing}, not in the model {unknown}"
            )
        for name, layer in self.layers.items():
            site = plan.sites[name]
            if layer.get_base_layer().weight.device.type == "meta":
                raise ValueError(f"model: the base weight of {name} is on the meta device; load it first")
            if (site.configured_rank, site.in_features) != (layer.r[self.name], layer.in_features):
                raise ValueError(
                    f"plan: {name} was planned from rank {site.configured_rank} and width {site.in_features}, the "
                    f"model has rank {layer.r[self.name]} and width {layer.in_features}"
                )


class _Snapshot:
    """All that :meth:`PeftAdapter.apply` can change in one layer, to put back if it fails."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        names = (*layer.adapter_layer_names, *layer.other_param_names, "lora_variant")
        self._containers = {n: copy.copy(_items(getattr(layer, n))) for n in names if _is_container(layer, n)}
        self._active = layer._active_adapter
        self._values = [
            (p, p.requires_grad, None if p.device.type == "meta" else p.detach().clone())
            for n in layer.adapter_layer_names
            for p in (getattr(layer, n).parameters() if _is_container(layer, n) else ())
        ]

    def restore(self) -> None:
        for name, items in self._containers.items():
            container = _items(getattr(self._layer, name))
            container.clear()
            container.update(items)
        self._layer._active_adapter = self._active
        with torch.no_grad():
            for parameter, requires_grad, value in self._values:
                if value is not None:
                    parameter.copy_(value)
                parameter.requires_grad_(requires_grad)


def _is_container(layer: Any, name: str) -> bool:
    return isinstance(getattr(layer, name, None), (dict, nn.ModuleDict, nn.ParameterDict))


def _items(container: Any) -> dict[str, Any]:
    """The dict that holds a container's entries."""
    if isinstance(container, nn.ModuleDict):
        return container._modules
    if isinstance(container, nn.ParameterDict):
        return container._parameters
    return container


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


def _pattern(name: str, everything: list[str]) -> str:
    """``name`` as a key of ``rank_pattern``: PEFT matches such keys as regular expressions at the name's end."""
    ambiguous = any(other.endswith(f".{name}") for other in everything)
    return f"^{re.escape(name)}" if ambiguous else name


def _set_submodule(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)


def _peft_eva_config(plan: "EvaPlan") -> Any:
    from peft import EvaConfig

    config = plan.config
    return EvaConfig(
        rho=config.rho, tau=config.tau, use_label_mask=config.use_label_mask, label_mask_value=config.label_mask_value,
        whiten=config.whiten, adjust_scaling_factors=config.adjust_scaling_factors,
    )  # fmt: skip
