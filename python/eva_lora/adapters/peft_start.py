"""PEFT layers that start with part of their base weight: W becomes W − s B₀ A₀, and B₀ A₀ is kept beside A and B.

What is kept is in the adapter's state dict, so that every way to save the adapter saves it. The config then names an
initialisation that PEFT does not know, so that PEFT refuses to load such an adapter onto W, where it would be wrong.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from eva_kernels._double import double
from eva_kernels._transfer import sent
from eva_kernels.low_rank_update import Scratch, add_low_rank_

from .peft_layers import factors, is_stacked
from .preflight import living

__all__ = [
    "LOADED_BY",
    "STARTS",
    "Start",
    "begin",
    "give_back",
    "holders_of_memory",
    "kept_whole",
    "refuse_combining",
    "require_movable",
    "require_readable",
    "samples_of",
    "start_of",
]

LOADED_BY = "eva_lora.load_adapter: "  # begins ``init_lora_weights`` of such an adapter; the method follows
STARTS = "lora_start"  # PEFT saves what is named after its prefix
SAMPLES = 32

_INSTEAD = "eva_lora.export_plain makes an ordinary adapter of it, for the base as it was, which does"
_NEUTRAL = (True, False, "gaussian", "orthogonal", "eva")  # initialisations that neither read the base nor change it

#: What of PEFT takes a model's state to do with it what would be wrong → why.
_STATE_TAKEN_BY = {
    "hotswap_adapter_from_state_dict": f"it cannot be swapped for another, which does not make up for that. {_INSTEAD}",
    "get_base_model_state_dict": "these weights are what is left; unload() gives back the base",
    "set_base_model_state_dict": "on these weights, from which nothing is taken, it would be wrong; unload() first",
}


class Start(nn.Module):
    """A₀, B₀ and the scaling of one layer's adapter, and a hook that gives the layer its base back without it.

    The hook adds s B₀ A₀ x to the base layer's output wherever the adapter is switched off, is not the active one, or
    is not merged while others are.

    Args:
        layer: PEFT's, its base weight as it was.
        adapter: The adapter's name.
        a, b: (r, …) and (out, r, …), as A and B are kept.

    Attributes:
        kept_a, kept_b: A₀ and B₀. No adapter should be called like them: PEFT saves none whose path holds another
            adapter's name.
        kept_w: (k,) float32: some entries of W, to know it again.
    """

    kept_a: Tensor
    kept_b: Tensor
    kept_w: Tensor

    def __init__(self, layer: Any, adapter: str, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.register_buffer("kept_a", a)
        self.register_buffer("kept_b", b)
        self.register_buffer("kept_w", samples_of(layer.get_base_layer().weight))
        self._layer, self._adapter, self.scaling = (layer,), adapter, float(layer.scaling[adapter])

    def factors(self) -> tuple[Tensor, Tensor]:  # (out, r), (r, in) float64
        """s B₀ and A₀."""
        return self.scaling * double(self.kept_b.flatten(1)), double(self.kept_a.flatten(1))

    def hook(self, base: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """The base layer's output, what it lacks added: what of s B₀ A₀ x the adapter does not bring itself."""
        lacking = self._lacking()
        if not any(lacking):
            return output
        (x, *_) = args
        x, a, b = x.to(self.kept_a.dtype), self.kept_a, self.kept_b
        if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            convolved = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[b.ndim - 3]
            added = convolved(base._conv_forward(x, a, None), b)
        else:
            added = nn.functional.linear(nn.functional.linear(x, a), b)
        one, *more = lacking
        if more:
            scale = sent(torch.tensor(lacking, dtype=added.dtype, device="cpu"), added.device)
            added *= scale.view(-1, *[1] * (added.ndim - 1))
        else:
            added *= one
        return output + added.to(output.dtype)

    def acts_with(self) -> float:
        """What the adapter's B A is multiplied with in the base weight, where it is merged into it; else 0.

        Raises:
            ValueError: the scaling was changed, and nothing tells whether before it was merged or after.
        """
        (layer,) = self._layer
        if self._adapter not in layer.merged_adapters:
            return 0.0
        if float(layer.scaling[self._adapter]) != self.scaling:
            raise ValueError(
                f"the scaling of adapter {self._adapter!r}, which took part of its base weight, is {self.scaling}, and "
                f"{float(layer.scaling[self._adapter])} where it is merged, which may be since: unmerge it first"
            )
        return self.scaling

    def _lacking(self) -> list[float]:
        """What B₀ A₀ x has to be multiplied with: one number, or one for each sample of a mixed batch."""
        (layer,) = self._layer
        if layer.merged_adapters:
            return [self.scaling - self.acts_with()]
        if layer.disable_adapters:
            return [self.scaling]
        without = self.scaling - float(layer.scaling[self._adapter])  # 0, unless somebody scales the adapter
        mixed = getattr(layer, STARTS).mixed
        names = [self._adapter if self._adapter in layer.active_adapters else ""] if mixed is None else mixed
        return [without if name == self._adapter else self.scaling for name in names]

    def _load_from_state_dict(self, *args: Any) -> None:
        """Nothing: it is what the base was changed by, which :meth:`Starts.compare` has seen to."""


class Starts(nn.ModuleDict):
    """Adapter → :class:`Start`, of one layer. The base gets its part back when PEFT takes out an adapter, or the layer;
    what PEFT would do beside them wrongly is refused, or done right, by methods of the layer's own.

    Args:
        layer: PEFT's.

    Attributes:
        mixed: Inside of a forward with ``adapter_names=``: the adapter of each sample.
    """

    mixed: Sequence[str] | None = None

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self._layer = (layer,)
        layer.other_param_names = (*layer.other_param_names, STARTS)  # what PEFT deletes of an adapter
        layer.unload_and_optionally_merge_module = self.unload
        layer.update_layer = self.update_layer
        layer.supports_lora_conversion = self.supports_lora_conversion
        layer._mixed_batch_forward = self.mixed_batch_forward
        layer.register_load_state_dict_pre_hook(self.compare)
        layer.register_state_dict_pre_hook(self.require_kept)

    @torch.no_grad()
    def __delitem__(self, adapter: str) -> None:
        (layer,) = self._layer
        start: Any = self[adapter]
        super().__delitem__(adapter)
        base = layer.get_base_layer()
        for key, hook in [*base._forward_hooks.items()]:
            if getattr(hook, "__self__", None) is start:
                del base._forward_hooks[key]
        if not start.acts_with():
            _add(layer, start, 1.0, Scratch())

    def mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        """PEFT's, the base's output being that of W for every sample whose adapter does not make up for it."""
        (layer,) = self._layer
        self.mixed = adapter_names
        try:
            output: Tensor = type(layer)._mixed_batch_forward(layer, x, *args, adapter_names=adapter_names, **kwargs)
            return output
        finally:
            self.mixed = None

    def update_layer(self, adapter: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's: add an adapter, or make one anew; raise ValueError where that reads or changes the base's weight."""
        (layer,) = self._layer
        config = kwargs["config"]
        if len(self) and (config.init_lora_weights not in _NEUTRAL or config.use_dora):
            what = "DoRA" if config.use_dora else f"init_lora_weights={config.init_lora_weights!r}"
            raise ValueError(
                f"adapter {adapter!r}: {what} computes with the base weight itself, of which {next(iter(self))!r} took "
                "part; add it to a base of its own"
            )
        type(layer).update_layer(layer, adapter, *args, **kwargs)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's ``convert_to_lora`` can be right: not of an adapter that is more than its B A."""
        (layer,) = self._layer
        return adapter_name not in self and bool(type(layer).supports_lora_conversion(layer, adapter_name))

    def require_kept(self, _: nn.Module, prefix: str, __: bool) -> None:
        """Before a layer's state is taken: raise ValueError where PEFT does so to go on past every hook.

        Who saves an adapter takes the state in the same way: only the stack tells them apart.
        """
        frame = sys._getframe()
        while frame.f_back is not None and frame.f_code.co_name not in _STATE_TAKEN_BY:
            frame = frame.f_back
        why = _STATE_TAKEN_BY.get(frame.f_code.co_name)
        swapped = frame.f_locals.get("adapter_name", "")  # PEFT takes for an adapter's own whatever holds its name
        for adapter, start in self.items():
            if why is not None and any(swapped in f"{prefix}{STARTS}.{adapter}.{key}" for key in start._buffers):
                raise ValueError(f"adapter {adapter!r} took part of its base weight: {why}")

    def compare(self, _: nn.Module, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Before a layer's state is loaded: raise ValueError where A and B, or the base, are of another start."""
        for adapter, start in self.items():
            kept: dict[str, Any] = {
                f"{prefix}{STARTS}.{adapter}.{name}": getattr(start, name) for name in ("kept_a", "kept_b")
            }
            given = {key: state_dict[key] for key in kept if key in state_dict}
            for key in (f"{prefix}lora_A.{adapter}.weight", f"{prefix}base_layer.weight"):
                if key in state_dict and not given:
                    raise ValueError(
                        f"{key.removesuffix('.weight')} comes without what it started from, and this model's base was "
                        "changed by a start of its own; load an ordinary adapter into a fresh base"
                    )
            if any(
                x.shape != kept[key].shape or not torch.equal(x.to(kept[key]), kept[key]) for key, x in given.items()
            ):
                raise ValueError(
                    f"{prefix}{STARTS}.{adapter} is not what this model's base was changed by; load the adapter into a "
                    "fresh base with eva_lora.load_adapter"
                )

    def unload(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
        """What PEFT puts in the layer's place: its base, with the adapters that are to be merged."""
        (layer,) = self._layer
        if merge:
            layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        for adapter in [*self]:
            del self[adapter]
        base: nn.Module = layer.get_base_layer()
        return base


def start_of(layer: Any, adapter: str) -> Start | None:
    """What a layer's adapter started with, if that was taken from its base."""
    starts: Any = getattr(layer, STARTS, None)
    return starts[adapter] if starts is not None and adapter in starts else None


def refuse_combining(model: nn.Module, root: nn.Module) -> None:
    """Have the ``LoraModel`` around a base model refuse weighted sums with adapters that took part of it: PEFT makes
    them of A and B alone.

    Args:
        model: Where it should be; the base model alone may have been given, and then it is wherever it is.
    """
    from peft import LoraModel

    inside = [module for module in model.modules() if isinstance(module, LoraModel) and module.model is root]
    for tuner in inside or (tuner for tuner in living(LoraModel) if tuner.model is root):
        tuner.add_weighted_adapter = partial(_combine, tuner)


def _combine(tuner: Any, adapters: Sequence[str], *args: Any, **kwargs: Any) -> None:
    for adapter in adapters:
        if any(start_of(module, adapter) is not None for module in tuner.modules()):
            raise ValueError(
                f"adapter {adapter!r} cannot be part of a weighted sum: it took part of its base weight, and is more "
                f"than its B A. {_INSTEAD}"
            )
    type(tuner).add_weighted_adapter(tuner, adapters, *args, **kwargs)


def holders_of_memory(root: nn.Module) -> Counter[int]:
    """Address of each parameter and buffer → how many of the modules' tensors have memory there, itself among them."""
    tensors = [
        tensor
        for module in root.modules()
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None and tensor.device.type != "meta" and tensor.layout == torch.strided and tensor.numel()
    ]
    ranges = sorted((t.device.index or 0, t.data_ptr(), t.data_ptr() + span(t) * t.element_size()) for t in tensors)
    held: Counter[int] = Counter()
    device, last, end = -1, 0, 0  # the range that reaches furthest, so far
    for place, start, stop in ranges:
        held[start] += 1
        if place == device and start < end and start != last:
            held[start] += 1
            held[last] += 1
        if place != device or stop > end:
            device, last, end = place, start, stop
    return held


def span(tensor: Tensor) -> int:
    """From its first element to its last in memory, in elements: fewer than it has where some are the same."""
    return 1 + sum((size - 1) * abs(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def require_movable(name: str, layer: Any, holders: Counter[int]) -> None:
    """Raise unless part of a layer's base weight can be moved into its adapter.

    Args:
        holders: Of the model, as :func:`holders_of_memory` says.

    Raises:
        ValueError: it has to stay as it is (:func:`kept_whole`).
    """
    _require(name, kept_whole(layer, holders))


def require_readable(name: str, layer: Any) -> None:
    """Raise unless a layer's base weight is here, as it was.

    Raises:
        ValueError: it is quantised, not here, sharded, or part of it was moved already.
    """
    _require(name, _unreadable(layer))


def _require(name: str, reason: str) -> None:
    if reason:
        raise ValueError(f"model: the base weight of {name} cannot give part of itself to the adapter: {reason}")


def _unreadable(layer: Any) -> str:
    base, started = layer.get_base_layer(), getattr(layer, STARTS, None)
    if started:
        return f"part of it is with the adapter {next(iter(started))!r} already"
    for weight in _base_tensors(layer):
        if type(weight) not in (nn.Parameter, Tensor) or not weight.is_floating_point() or weight.itemsize < 2:
            return f"it is quantised ({type(base).__name__}, {type(weight).__name__})"
        if weight.device.type == "meta" or hasattr(base, "_hf_hook"):
            return "it is on the meta device or offloaded"
    return ""


def kept_whole(layer: Any, holders: Counter[int]) -> str:
    """Why a layer's base weight has to stay as it is; "" where it need not."""
    if unreadable := _unreadable(layer):
        return unreadable
    if is_stacked(layer):
        return f"it is part of a {type(layer.get_base_layer()).__name__}, which is computed with as a whole"
    if any(getattr(layer, "use_dora", {}).values()):
        return "its adapter is DoRA, whose lengths are of the whole weight's rows"
    weight = layer.get_base_layer().weight
    if holders[weight.data_ptr()] > 1:
        return "another module has the same weight or part of it, which would change with it"
    if span(weight) < weight.numel():
        return "several of its entries are one in memory"
    return ""


def _base_tensors(layer: Any) -> list[Any]:
    base = layer.get_base_layer()
    if hasattr(layer, "parameter_name"):
        return [layer.get_param()]
    if is_stacked(layer):
        return [base.in_proj_weight, layer.out_proj.weight]
    return [getattr(base, "weight", None)]


@torch.no_grad()
def begin(
    layer: Any,
    adapter: str,
    a: Tensor | None = None,
    b: Tensor | None = None,
    scratch: Scratch | None = None,
) -> float:
    """Take s B A from a layer's base weight, and keep A and B as they are, or as they are given.

    Args:
        scratch: One for all layers. None: memory of its own.

    Returns:
        ‖W − (what is left, in the weight's dtype) − s B A‖ / ‖W‖: what that dtype rounds off.
    """
    weights, modules = factors(layer, adapter)
    parts: list[Any] = [weights[0], modules[0].weight]
    kept = [(x.detach() if given is None else given.to(x)).clone() for x, given in zip(parts, (a, b), strict=True)]
    start = Start(layer, adapter, *kept)
    rounding = _add(layer, start, -1.0, scratch or Scratch())
    if not hasattr(layer, STARTS):
        setattr(layer, STARTS, Starts(layer))
    getattr(layer, STARTS)[adapter] = start
    layer.get_base_layer().register_forward_hook(start.hook)
    return rounding


def give_back(layer: Any, adapter: str) -> None:
    """Give a layer's base weight back what :func:`begin` took, if it did, to a rounding."""
    if start_of(layer, adapter) is not None:
        del getattr(layer, STARTS)[adapter]


def samples_of(weight: Tensor) -> Tensor:  # (k,) float32
    """Some entries of a weight: the same ones each time."""
    flat = weight.detach().flatten()
    return flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES].float().clone()


def _add(layer: Any, start: Start, times: float, scratch: Scratch) -> float:
    """Add so many times s B₀ A₀ to a layer's base weight: all of it, or nothing but a rounding.

    Returns:
        What the weight's dtype rounds off, over the norm that the weight had.
    """
    left, right = start.factors()
    if getattr(layer, "fan_in_fan_out", False):
        left, right = right.T, left.T
    return add_low_rank_(layer.get_base_layer().weight.data, times * left, right, scratch=scratch)
