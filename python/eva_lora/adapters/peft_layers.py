"""PEFT's kinds of LoRA layer: what each is as a site, and where its matrices A and B are."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .base_weights import BaseWeight, KnownWeight
from .held import Halves, hold, is_held
from .sites import InnerWeight, LayerInput, LeftAlone, LoraSite, Patches, Rows, first_tensor

__all__ = [
    "ConvSite",
    "base_weight_of",
    "factors",
    "hold_halves",
    "holds_halves",
    "is_stacked",
    "magnitude_of",
    "matrices_of",
    "parameters_of",
    "parts_of",
    "renew_magnitude",
    "second_of",
    "site_of",
]


@dataclass(frozen=True)
class ConvSite(LoraSite):
    """A convolution; its rows are the patches that A's kernel sees."""

    patches: Patches | None = None

    @property
    def rows(self) -> Rows | None:
        return self.patches

    def output_rows(self, output: Tensor) -> Tensor:
        spatial = 0 if self.patches is None else len(self.patches.stride)
        return output.movedim(-1 - spatial, -1)  # of one sample without its batch dimension, too


@dataclass(frozen=True)
class AttentionSite(LoraSite):
    """``nn.MultiheadAttention``: one A for query, key and value together, and one for the output projection.

    Neither A is ever called, and neither is the output projection, so its input is computed a second time: by
    the same attention with the identity in the projection's place.
    """

    @property
    def inner(self) -> tuple[InnerWeight, ...]:
        layer: Any = self.module
        return InnerWeight(layer.get_base_layer(), "in_proj_weight"), InnerWeight(layer.out_proj, "weight")

    def inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterable[LayerInput]:
        base: Any = self.module
        while hasattr(base, "base_layer"):
            base = base.base_layer
        named = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs)
        distinct: list[Tensor] = []
        for name in ("query", "key", "value"):
            x = named.get(name)
            if not isinstance(x, Tensor):
                raise TypeError(f"layer {self.name}: expected a tensor as {name}, got {type(x).__name__}")
            if not any(x is other for other in distinct):
                distinct.append(x)
        outputs = _without_projection(base)(*args, **kwargs)[0]
        yield from (LayerInput(self._sequences_first(base, x), 0) for x in distinct)
        yield LayerInput(self._sequences_first(base, outputs), 1)

    @staticmethod
    def _sequences_first(base: Any, x: Tensor) -> Tensor:  # (batch, tokens, d)
        return x if base.batch_first or x.ndim == 2 else x.transpose(0, 1)


def _without_projection(attention: nn.MultiheadAttention) -> nn.MultiheadAttention:
    weight = attention.out_proj.weight
    identity = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype, device="meta")
    identity.weight = nn.Parameter(torch.eye(weight.shape[0], dtype=weight.dtype, device=weight.device), False)
    identity.bias = nn.Parameter(torch.zeros_like(identity.weight[0]), False)
    twin = copy.copy(attention)
    twin.training = False  # its dropout would draw from the random generators once more
    twin._modules = {**attention._modules, "out_proj": identity}
    return twin


@dataclass(frozen=True)
class ParameterOfModule(LoraSite):
    """A parameter that PEFT was given by its name, whatever module multiplies with it.

    Attributes:
        parameter: Its name there.
    """

    parameter: str = "weight"

    @property
    def inner(self) -> tuple[InnerWeight, ...]:
        layer: Any = self.module
        base = layer.get_base_layer()
        transposed = layer.num_experts > 1 and not layer._did_swap_in_out_features
        return (InnerWeight(base, self.parameter, transposed),)


@dataclass(frozen=True)
class ExpertsSite(ParameterOfModule):
    """One stacked projection of a mixture of experts in transformers: a part for every expert.

    Its parameter is "gate_up_proj" or "up_proj", which see the tokens routed to each expert, or "down_proj", whose
    input is computed a second time from those.
    """

    def inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterable[LayerInput]:
        experts: Any = self.module
        while hasattr(experts, "base_layer"):
            experts = experts.base_layer
        hidden = first_tensor(self.name, args, kwargs)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        choices = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and not v.dtype.is_floating_point]
        if len(choices) != 1 or choices[0].shape[0] != len(hidden):
            raise TypeError(
                f"layer {self.name}: expected one integer tensor (tokens, top_k) that says who is routed where"
            )
        chosen = choices[0].reshape(-1)  # (tokens · top_k,)
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=self.parts).tolist()
        tokens = order // choices[0].shape[1]
        for expert, mine in enumerate(torch.split(tokens, counts)[: self.parts]):
            if len(mine):
                x = hidden[mine]
                rows = _after_gate(experts, expert, x) if self.parameter == "down_proj" else x
                yield LayerInput(rows, expert, mine, (len(hidden),), hidden)


def _after_gate(experts: Any, expert: int, x: Tensor) -> Tensor:  # (n, intermediate)
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    weight = getattr(experts, name)[expert]
    up = x @ (weight if experts.is_transposed else weight.T)
    if experts.has_bias:
        up = up + getattr(experts, f"{name}_bias")[expert]
    gated: Tensor = experts._apply_gate(up) if experts.has_gate else experts.act_fn(up)
    return gated


def site_of(name: str, layer: Any, adapter: str) -> LoraSite:
    """The site that a PEFT LoRA layer is.

    Raises:
        LeftAlone: EVA does not apply to it.
        ValueError: it cannot be right as it is; the message names the layer and says why.
    """
    from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper

    rank = layer.r[adapter]
    if adapter in layer.lora_embedding_A:
        raise LeftAlone("an embedding's input is token numbers, which have no directions of variance")
    lora_a = getattr(layer.lora_A[adapter], "_fsdp_wrapped_module", layer.lora_A[adapter])
    if isinstance(layer, ParamWrapper):
        return _parameter_site(name, layer, adapter)
    if isinstance(layer, MultiheadAttention):
        return AttentionSite(name, layer, layer.embed_dim, rank, parts=2)
    if isinstance(lora_a, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        base = layer.get_base_layer()
        if base.groups > 1:
            raise LeftAlone(f"with groups={base.groups} each group of outputs reads a part of A of its own")
        reaching = [d for d, k in zip(base.dilation, base.kernel_size, strict=True) if k > 1 and d > 1]
        if reaching and base.padding != "same":
            raise ValueError(
                f"model: PEFT's adapter of {name} cannot run: its A has no dilation, the layer has {base.dilation}, "
                "and their outputs differ in size. Leave it out of target_modules"
            )
        patches = Patches.of(lora_a)
        return ConvSite(name, layer, patches.width, rank, patches=patches)
    if not isinstance(lora_a, nn.Linear):
        raise LeftAlone(f"its A is a {type(lora_a).__name__}")
    if lora_a.weight.shape[0] != rank:
        raise ValueError(f"model: A of {name} has shape {tuple(lora_a.weight.shape)}, expected rank {rank}")
    return LoraSite(name, layer, lora_a.weight.shape[1], rank)


def _parameter_site(name: str, layer: Any, adapter: str) -> LoraSite:
    base = layer.get_base_layer()
    width, rank = layer.lora_A[adapter].weight.shape[1], layer.r[adapter]
    parameter = layer.parameter_name
    if layer.num_experts == 1:
        if isinstance(base, nn.Linear) or (parameter == "weight" and type(base).__name__.endswith("Router")):
            return ParameterOfModule(name, layer, width, rank, parameter=parameter)
        raise LeftAlone(f"it is a parameter of a {type(base).__name__}, of which EVA does not know what it multiplies")
    known = ("has_gate", "has_bias", "is_transposed", "_apply_gate")
    up = "gate_up_proj" if getattr(base, "has_gate", True) else "up_proj"
    if not all(hasattr(base, attribute) for attribute in known) or parameter not in (up, "down_proj"):
        raise LeftAlone(
            f"it is a stack of {layer.num_experts} matrices of a {type(base).__name__}, whose routing EVA does not know"
        )
    return ExpertsSite(name, layer, width, rank, parts=layer.num_experts, parameter=parameter)


def base_weight_of(
    site: LoraSite, layer: Any, adapter: str, dtype: torch.dtype, *, convolutions: bool = False
) -> BaseWeight:
    """The base weight that a site's B A is added to; inputs of linear layers are of ``dtype``.

    Args:
        convolutions: Whether one of a convolution will do, which is multiplied with patches of the module's inputs.

    Raises:
        LeftAlone: what B A is added to is not one matrix that is multiplied with the site's rows.
    """
    base = layer.get_base_layer()
    if hasattr(layer, "parameter_name"):
        many = f"a stack of {site.parts} experts' matrices" if site.parts > 1 else "one parameter of a larger module"
        raise LeftAlone(f"it is {many}, a {type(base).__name__}, which cannot be asked what each computes with")
    if site.parts > 1:
        raise LeftAlone(f"it is a {type(base).__name__}, whose matrices are multiplied inside of it")
    variant = layer.lora_variant.get(adapter)
    if variant is not None and magnitude_of(layer, adapter) is None:
        raise LeftAlone(f"its adapter is a {type(variant).__name__}, not W + s B A")
    b = layer.lora_B[adapter].weight
    if isinstance(site, ConvSite) and not convolutions:
        raise LeftAlone("it is a convolution, whose B A is not multiplied with its inputs but with patches of them")
    if isinstance(site, ConvSite) and Patches.of(base) != site.patches:
        raise LeftAlone("its A reads other patches than the layer, whose padding_mode or dilation it does not have")
    weight = getattr(base, "weight", None)
    if type(weight) is nn.Parameter and weight.is_floating_point():
        dtype = weight.dtype  # models may keep some layers in another
    return BaseWeight(
        site.name, base, site.in_features, b.shape[0], dtype,
        fan_in_fan_out=bool(getattr(layer, "fan_in_fan_out", False)),
        bias_beside=getattr(layer.lora_B[adapter], "bias", None) is not None,
    )  # fmt: skip


def matrices_of(site: LoraSite, layer: Any, adapter: str, dtype: torch.dtype) -> tuple[BaseWeight, ...]:
    """For each of a site's parts, the base weight that its B A is added to.

    Raises:
        LeftAlone: as :func:`base_weight_of`; or a parameter with such matrices is not there in floating point.
    """
    for weight in site.inner:
        parameter, owner = weight.owner._parameters.get(weight.name), type(weight.owner).__name__
        if parameter is None or not parameter.is_floating_point() or parameter.itemsize < 2:
            raise LeftAlone(f"{weight.name} of its {owner} is quantised, or no parameter")
        if parameter.device.type == "meta" or hasattr(weight.owner, "_hf_hook"):
            raise LeftAlone(f"{weight.name} of its {owner} is on the meta device or offloaded")
    if not is_stacked(layer):
        return (base_weight_of(site, layer, adapter, dtype, convolutions=True),)
    base = layer.get_base_layer()
    read = [partial(_matrix_of, weight, part) for weight in site.inner for part in range(len(weight.matrices()))]
    return tuple(
        KnownWeight(site.name, base, site.in_features, len(matrix()), dtype, part=part, matrix=matrix)
        for part, matrix in enumerate(read)
    )


def is_stacked(layer: Any) -> bool:
    """Whether a layer's matrices are parameters of a larger module, which nobody can call one by one."""
    from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper

    return isinstance(layer, (MultiheadAttention, ParamWrapper))


def _matrix_of(weight: InnerWeight, part: int) -> Tensor:  # (out, in)
    return weight.matrices()[part]


def second_of(layer: Any, modules: list[nn.Module], lora_b: Tensor) -> list[Tensor]:  # (parts · out, r)
    """The weights of a layer's modules B, of matrices B part after part."""
    experts = getattr(layer, "num_experts", 1)
    if experts > 1:  # (out, r · experts)
        return [lora_b.view(experts, -1, lora_b.shape[1]).permute(1, 2, 0).flatten(1)]
    weights: list[Any] = [module.weight for module in modules]
    return [*torch.split(lora_b, [len(weight) for weight in weights])]


def hold_halves(layer: Any, adapter: str) -> None:
    """Have the first half of an adapter's rank trained, and hold the second."""
    experts = getattr(layer, "num_experts", 1)
    for member in parts_of(layer):
        hold(member.lora_A[adapter], {"weight": Halves(0, outer=experts)})
        hold(member.lora_B[adapter], {"weight": Halves(1, inner=experts)})


def holds_halves(layer: Any, adapter: str) -> bool:
    """Whether :func:`hold_halves` was done."""
    return adapter in layer.lora_A and is_held(layer.lora_A[adapter])


def magnitude_of(layer: Any, adapter: str) -> Any:
    """The module with DoRA's lengths of the rows of W + s B A, where a layer has one."""
    kept = getattr(layer, "lora_magnitude_vector", {})
    return kept[adapter] if adapter in kept and "Dora" in type(layer.lora_variant.get(adapter)).__name__ else None


def renew_magnitude(layer: Any, adapter: str) -> None:
    """Make DoRA's lengths those of W + s B A as it is now, so that it computes with just that."""
    magnitude = magnitude_of(layer, adapter)
    if magnitude is None:
        return
    (a,), (b,) = factors(layer, adapter)
    kept: nn.Parameter = magnitude.weight
    magnitude.update_layer(base_layer=layer.get_base_layer(), lora_A=a, lora_B=b.weight, scaling=layer.scaling[adapter])
    kept.data.copy_(magnitude.weight.data.view(kept.shape))
    magnitude.weight = kept  # the same object as before: an optimizer or wrapper may know it


def parts_of(layer: Any) -> list[Any]:
    """The LoRA layers that make up one: itself, and what is nested in it and shares its rank."""
    from peft.tuners.lora.layer import MultiheadAttention

    return [layer, layer.base_layer.out_proj] if isinstance(layer, MultiheadAttention) else [layer]


def factors(layer: Any, adapter: str) -> tuple[list[Tensor], list[nn.Module]]:
    """The weights of A, in the order of the site's parts, and the modules B."""
    members = parts_of(layer)
    return [member.lora_A[adapter].weight for member in members], [member.lora_B[adapter] for member in members]


def parameters_of(layer: Any, adapter: str) -> int:
    """Of A and B, for each unit of the layer's rank; of weights that this process holds a part of 0, not known."""
    weights, modules = factors(layer, adapter)
    second: list[Any] = [module.weight for module in modules]
    sizes = [weight.numel() for weight in (*weights, *second)]
    rank: int = layer.r[adapter]
    return 0 if any(size % rank for size in sizes) else sum(sizes) // rank
