"""How a plan is written into the layers of a PEFT adapter, and what of them is put back if that fails."""

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..planning import EvaPlan, PlannedSite
from .generators import same_generators
from .peft_layers import ConvSite, factors, parts_of, renew_magnitude, second_of
from .peft_naming import PatternsAmong, base_names, retarget
from .plan_check import check_plan
from .sharded import fill_
from .sites import LoraSite

__all__ = ["PlanWriter"]


class PlanWriter:
    """Writes plans into one adapter of a PEFT model.

    Args:
        name: The adapter's name.
        root: The base model, relative to which layers are named.
        configs: The model's ``LoraConfig`` for each adapter; the adapter's is replaced.
        sites: The layers that EVA applies to.
        everything: All layers that have the adapter, by name.
    """

    def __init__(
        self,
        name: str,
        root: nn.Module,
        configs: dict[str, Any],
        sites: Sequence[LoraSite],
        everything: Mapping[str, Any],
    ) -> None:
        self._name, self._root, self._configs, self._sites, self._everything = name, root, configs, sites, everything
        self._layers = {site.name: everything[site.name] for site in sites}

    def write(self, plan: EvaPlan) -> Callable[[], None]:
        """Write A, and B or zero, set ranks and alphas, drop the adapter where the rank is 0, and make the
        ``LoraConfig`` say so, so that the adapter saves and loads as it is. All of it, or nothing.

        Returns:
            What undoes it.

        Raises:
            ValueError: the plan is for other layers, or for layers of another rank or width; or no ``LoraConfig`` says
                which layers are left.
        """
        check_plan(plan, self._sites)
        for name, layer in self._layers.items():
            base = layer.get_base_layer()
            if not hasattr(base, "_hf_hook") and any(p.device.type == "meta" for p in base.parameters()):
                raise ValueError(f"model: the base weight of {name} is on the meta device; load it first")
        snapshots = [_Snapshot(member) for layer in self._layers.values() for member in parts_of(layer)]
        replaced: list[tuple[nn.Module, str, nn.Module]] = []
        before = self._configs[self._name]
        config = copy.deepcopy(before)
        if plan.lora_b or plan.config.save_as == "plain":
            config.init_lora_weights, config.eva_config = True, None
        elif not (config.lora_bias or any(isinstance(site, ConvSite) for site in self._sites)):  # refused with "eva"
            config.init_lora_weights, config.eva_config = "eva", _peft_eva_config(plan)
        emptied = [name for name in self._layers if plan.sites[name].rank == 0]

        def undo() -> None:
            self._configs[self._name] = before
            for parent, child, module in reversed(replaced):
                setattr(parent, child, module)
            for snapshot in snapshots:
                snapshot.restore()

        try:
            with torch.no_grad(), same_generators({p.device for p in self._root.parameters()}):
                for name, layer in self._layers.items():
                    if name not in emptied:
                        adjust = plan.config.adjust_scaling_factors
                        self._write(layer, plan, plan.sites[name], config, adjust)
                self._describe(config, set(emptied))
                for name in emptied:
                    self._remove(self._layers[name], replaced)
            self._configs[self._name] = config  # the caller's LoraConfig object stays as it was
        except BaseException:
            undo()
            raise
        return undo

    def _write(
        self,
        layer: Any,
        plan: EvaPlan,
        site: PlannedSite,
        config: Any,
        adjust: bool,
    ) -> None:
        adapter, lora_a, lora_b = self._name, plan.lora_a.get(site.name), plan.lora_b.get(site.name)
        old_rank, alpha = layer.r[adapter], layer.lora_alpha[adapter]
        on_meta = factors(layer, adapter)[0][0].device.type == "meta"
        if lora_a is None and not on_meta:  # A stays, even where what depends on B starts over
            lora_a = torch.cat([weight.clone().flatten(1) for weight in factors(layer, adapter)[0]])
        if site.rank != old_rank or on_meta or adapter in layer.lora_variant:
            if adjust:
                growth = site.rank / old_rank
                alpha *= math.sqrt(growth) if layer.use_rslora[adapter] else growth
                alpha = int(alpha) if float(alpha).is_integer() else alpha
            # A variant (DoRA) derives parameters from B, so it starts over from a zero B even where the rank stays.
            if any(hasattr(weight, "device_mesh") for weight in factors(layer, adapter)[0]):
                raise ValueError(
                    f"model: the adapter of {site.name} is sharded and would have to be made anew, for its rank of "
                    f"{site.rank} or for DoRA. Apply before it is sharded, or build the model with those ranks "
                    "(eva_lora.peft.planned_config)"
                )
            members = parts_of(layer)
            before = [{n: (p, p.dtype, p.requires_grad) for n, p in _adapter_parameters(member)} for member in members]
            plain = copy.copy(config)
            plain.init_lora_weights, plain.eva_config = True, None
            layer.update_layer(adapter, r=site.rank, lora_alpha=alpha, config=plain)
            _materialise(layer, adapter)
            for member, known in zip(members, before, strict=True):
                for path, parameter in _adapter_parameters(member):
                    former, dtype, requires_grad = known[path]
                    parameter.data = parameter.data.to(dtype)
                    parameter.requires_grad_(requires_grad)
                    if (former.shape, former.device) == (parameter.shape, parameter.device):
                        former.data = former.data.to(dtype)
                        former.copy_(parameter)  # the same object as before: a wrapper may know it
                        owner, _, name = path.rpartition(".")
                        setattr(member.get_submodule(owner), name, former)
                for container in ("lora_A", "lora_B", "lora_dropout", "lora_magnitude_vector"):
                    modules = getattr(member, container)
                    if adapter in modules:
                        modules[adapter].train(layer.training)
        weights, second = factors(layer, adapter)
        if lora_a is not None:
            for weight, rows in zip(weights, lora_a.chunk(len(weights)), strict=True):
                fill_(weight, rows.view(weight.shape))
        for parameter in (p for module in second for p in module.parameters()):
            parameter.zero_()
        if lora_b is not None:
            for module, rows in zip(second, second_of(layer, second, lora_b / layer.scaling[adapter]), strict=True):
                b: Any = module.weight
                fill_(b, rows.reshape(b.shape))
            bias: Any = getattr(module, "bias", None)
            if bias is not None and site.name in plan.lora_bias:
                fill_(bias, plan.lora_bias[site.name] / layer.scaling[adapter])
            renew_magnitude(layer, adapter)

    def _remove(self, layer: Any, replaced: list[tuple[nn.Module, str, nn.Module]]) -> None:
        members = parts_of(layer)
        if len(layer.r) == 1:
            for member in reversed(members):  # what is nested comes first
                parent, child = _holder(self._root, member)
                replaced.append((parent, child, member))
                setattr(parent, child, member.base_layer)
            return
        for member in members:
            active = member._active_adapter
            trainable = [(p, p.requires_grad) for _, p in _adapter_parameters(member)]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                member.delete_adapter(self._name)
            # Deleting makes PEFT switch another adapter on in this layer alone; the active one is simply absent here.
            member._active_adapter = active
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)

    def _describe(self, config: Any, emptied: set[str]) -> None:
        """Make the config's patterns and targets those of the layers as they are now."""
        kept = {name: layer for name, layer in self._everything.items() if name not in emptied}
        names = base_names(self._root)
        patterns = PatternsAmong([*names[0], *self._everything])
        for pattern, values, default in (
            ("rank_pattern", {name: layer.r[self._name] for name, layer in kept.items()}, config.r),
            ("alpha_pattern", {name: layer.lora_alpha[self._name] for name, layer in kept.items()}, config.lora_alpha),
        ):
            unlike = {patterns.of(name): value for name, value in values.items() if value != default}
            setattr(config, pattern, unlike)
        parameters = [name for name, layer in kept.items() if hasattr(layer, "parameter_name")]
        retarget(config, names, [name for name in kept if name not in parameters], parameters)


class _Snapshot:
    """All that :meth:`PlanWriter.write` can change in one layer, to put back if it fails."""

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


def _adapter_parameters(layer: Any) -> list[tuple[str, nn.Parameter]]:
    """Parameters of all adapters of one layer, those of its base and of what is nested in it left out."""
    containers = [(name, getattr(layer, name)) for name in layer.adapter_layer_names if _is_container(layer, name)]
    return [(f"{name}.{n}", p) for name, container in containers for n, p in container.named_parameters()]


def _materialise(layer: Any, adapter: str) -> None:
    """Give an adapter weights of its own where its base layer's are on the meta device but while it runs: PEFT makes
    them there too, and they would never be loaded."""
    hook = getattr(layer.get_base_layer(), "_hf_hook", None)
    modules = [getattr(layer, name)[adapter] for name in ("lora_A", "lora_B") if adapter in getattr(layer, name)]
    if hook is not None and any(p.device.type == "meta" for module in modules for p in module.parameters()):
        for module in modules:
            module.to_empty(device=hook.execution_device)
        layer.reset_lora_parameters(adapter, True)


def _holder(root: nn.Module, module: nn.Module) -> tuple[nn.Module, str]:
    """Where a module hangs: its parent, and its name there."""
    return next((p, n) for p in root.modules() for n, child in p._modules.items() if child is module)


def _is_container(layer: Any, name: str) -> bool:
    return isinstance(getattr(layer, name, None), (dict, nn.ModuleDict, nn.ParameterDict))


def _items(container: Any) -> dict[str, Any]:
    """The dict that holds a container's entries."""
    if isinstance(container, nn.ModuleDict):
        return container._modules
    if isinstance(container, nn.ParameterDict):
        return container._parameters
    return container


def _peft_eva_config(plan: EvaPlan) -> Any:
    from peft import EvaConfig

    config = plan.config
    return EvaConfig(
        rho=config.settled_rho, tau=config.tau,
        use_label_mask=config.use_label_mask, label_mask_value=config.label_mask_value,
        whiten=config.whiten, adjust_scaling_factors=config.adjust_scaling_factors,
    )  # fmt: skip
