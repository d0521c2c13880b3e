"""LoRA layers of other libraries than PEFT, and of the layouts of those that are not installed here.

Every kind replaces the layers of one of three small models, with the base's weights in them.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from eva_lora import EvaPlan, apply

from . import layout_kinds
from .grouped_experts import GROUPED_EXPERTS
from .kinds import Kind, flat, patches, watched


class Net(nn.Module):
    """Three linear layers; the first and the second have one input."""

    def __init__(self, first=32, second=32, third=10):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(24, first), nn.Linear(24, second), nn.Linear(32, third)

    def forward(self, x):
        return self.third(torch.tanh(self.first(x)[..., :32] + self.second(x)[..., -32:]))


class ConvNet(nn.Module):
    """Two convolutions with padding and a stride."""

    def __init__(self, dilation=1):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1, dilation=dilation)
        self.second = nn.Conv2d(8, 6, 3, stride=2, padding=1)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def sequences():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, 20, 24, generator=generator) * 3 * 0.8 ** torch.arange(24) for _ in range(3)]


def images():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 3, 9, 9, generator=generator).cumsum(-1).cumsum(-2) / 4 for _ in range(3)]


@dataclass
class OtherKind(Kind):
    """A kind of another library.

    Attributes:
        layer: From a layer of the base to the one with a LoRA; None where the layer itself was changed.
        a, b: Paths of A and B from the module that holds them.
        holder: From the layer to that module.
        groups: Matrices stacked in one A.
        library: Package that has to be installed.
    """

    layer: Callable[[nn.Module], nn.Module | None] | None = None
    a: tuple[str, ...] = ("lora_A",)
    b: tuple[str, ...] = ("lora_B",)
    holder: Callable[[nn.Module], nn.Module] = lambda layer: layer
    groups: int = 1
    library: str | None = None
    removable = False

    def model(self) -> nn.Module:
        model = self.base()
        for name, layer in list(model.named_children()):
            torch.manual_seed(1)
            replacement = self.layer(layer)
            if replacement is not None:
                model.add_module(name, replacement)
        return model

    def _holders(self, model):
        return {name: self.holder(layer) for name, layer in model.named_children()}

    def matrices(self, model):
        return {
            name: [part.flatten(1) for path in self.a for part in get(holder, path).detach().chunk(self.groups)]
            for name, holder in self._holders(model).items()
        }

    def second(self, model):
        return [get(holder, path) for holder in self._holders(model).values() for path in self.b]

    def trained(self, model):
        return [p for holder in self._holders(model).values() for p in holder.parameters() if p.requires_grad]

    def save(self, model, eva_plan, folder):
        """What these libraries save, a state; and the plan, which says the ranks."""
        eva_plan.save(folder / "plan.safetensors")
        states = {name: holder.state_dict() for name, holder in self._holders(model).items()}
        torch.save(states, folder / "states")

    def reload(self, folder):
        model = self.model()
        apply(model, EvaPlan.load(folder / "plan.safetensors"))
        for name, state in torch.load(folder / "states").items():
            self._holders(model)[name].load_state_dict(state)
        return model


def get(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def rows_of(base, batches, rows=flat, copies=1):
    names = [name for name, _ in base.named_children()]
    return {
        name: [part for part in parts for _ in range(copies)]
        for name, parts in watched(base, batches, names, rows).items()
    }


def chunks(module, args, kwargs):
    """Each patch in as many pieces as the kernel is wide: what (B A).view(weight.shape) makes a row of A meet."""
    (rows,) = patches(module, args, kwargs)
    return [rows.reshape(-1, rows.shape[1] // module.kernel_size[0])]


def dilated(module, args, kwargs):
    size = module.in_channels * 9
    kernel = torch.eye(size, dtype=torch.float64).view(size, module.in_channels, 3, 3)
    out = nn.functional.conv2d(args[0].double(), kernel, None, module.stride, module.padding, module.dilation)
    return [out.flatten(2).movedim(1, 2).reshape(-1, size)]


def with_base(layer, base, weight="weight", bias="bias"):
    """A library's layer with the base's weights, frozen."""
    for path, value in ((weight, base.weight), (bias, base.bias)):
        parameter = get(layer, path)
        parameter.data.copy_(value.data)
        parameter.requires_grad = False
    return layer


def loralib_linear(base):
    import loralib

    return with_base(loralib.Linear(base.in_features, base.out_features, r=4, lora_alpha=8), base)


def loralib_merged(base):
    import loralib

    enabled = [True, False, True] if base.out_features == 48 else [True, True]
    made = loralib.MergedLinear(base.in_features, base.out_features, r=4, lora_alpha=8, enable_lora=enabled)
    return with_base(made, base)


def loralib_conv(base):
    import loralib

    made = loralib.Conv2d(
        base.in_channels, base.out_channels, 3, r=2, lora_alpha=4, stride=base.stride, padding=base.padding
    )
    return with_base(made, base, "conv.weight", "conv.bias")


def litgpt_linear(base):
    from litgpt.lora import LoRALinear

    made = LoRALinear(base.in_features, base.out_features, r=4, lora_alpha=8)
    return with_base(made, base, "linear.weight", "linear.bias")


def litgpt_qkv(base):
    from litgpt.lora import LoRAQKVLinear

    heads = 4 if base.out_features == 48 else 3  # 32 + 8 + 8 of query, key and value, or 6 + 2 + 2
    made = LoRAQKVLinear(
        base.in_features, base.out_features, head_size=8 if heads == 4 else 2, n_head=heads, n_query_groups=1, r=4,
        lora_alpha=8, enable_lora=(True, False, True),
    )  # fmt: skip
    return with_base(made, base, "linear.weight", "linear.bias")


def torchtune_layer(base, kind="LoRALinear"):
    from torchtune.modules import peft as tune

    made = getattr(tune, kind)(base.in_features, base.out_features, rank=4, alpha=8.0, use_bias=True)
    made = with_base(made, base)
    if kind == "DoRALinear":
        made.initialize_dora_magnitude()
    return made


def lycoris_layer(base, **options):
    from lycoris import LoConModule

    LoConModule("name", base, 1.0, 4, 8, **options).apply_to()
    base.requires_grad_(False)


def kohya_layer(base):
    layout_kinds.LoRAModule(base).apply_to()
    base.requires_grad_(False)


def frozen(make):
    """The layer that ``make`` makes, of a base whose weights are frozen."""
    return lambda base: make(base.requires_grad_(False))


def patcher(layer):
    return layer.forward.__self__


LORA = {"a": ("lora_a.weight",), "b": ("lora_b.weight",)}
DOWN_UP = {"a": ("lora_down.weight",), "b": ("lora_up.weight",)}
UP_DOWN = DOWN_UP | {"holder": patcher}
CONV = {"base": ConvNet, "batches": images, "record": partial(rows_of, rows=patches)}
LINEAR = {"base": Net, "batches": sequences, "record": rows_of}
ADAPTER = {"a": ("adapter.linear_in.weight",), "b": ("adapter.linear_out.weight",)}
QKV = partial(Net, 48, 48)
PAIR = {"record": partial(rows_of, copies=2)}


def kind(name, layer, options, **others):
    return OtherKind(name, layer=layer, **(options | others))


INSTALLED = [
    kind("loralib Linear", loralib_linear, LINEAR, library="loralib"),
    kind("loralib MergedLinear", loralib_merged, LINEAR, base=QKV, groups=2, library="loralib", **PAIR),
    kind("loralib ConvLoRA", loralib_conv, CONV, record=partial(rows_of, rows=chunks), step=3, library="loralib"),
    kind("LyCORIS LoCon, linear", lycoris_layer, LINEAR | UP_DOWN, library="lycoris"),
    kind("LyCORIS LoCon, convolution", lycoris_layer, CONV | UP_DOWN, library="lycoris"),
    kind(
        "LyCORIS LoCon, dilated convolution", lycoris_layer, CONV | UP_DOWN, base=partial(ConvNet, 2),
        record=partial(rows_of, rows=dilated), library="lycoris",
    ),
    kind("LyCORIS LoCon, bypass", partial(lycoris_layer, bypass_mode=True), CONV | UP_DOWN, library="lycoris"),
    kind("LyCORIS LoCon, rsLoRA", partial(lycoris_layer, rs_lora=True), LINEAR | UP_DOWN, library="lycoris"),
    kind(
        "LyCORIS DoRA", partial(lycoris_layer, weight_decompose=True), LINEAR | UP_DOWN, library="lycoris",
        computes_its_base=False,
    ),
    kind("torchtune LoRALinear", torchtune_layer, LINEAR | LORA, library="torchtune"),
    kind(
        "torchtune DoRALinear", partial(torchtune_layer, kind="DoRALinear"), LINEAR | LORA, library="torchtune",
        computes_its_base=False,
    ),
    kind("litgpt LoRALinear", litgpt_linear, LINEAR, library="litgpt"),
    kind("litgpt LoRAQKVLinear", litgpt_qkv, LINEAR, base=QKV, groups=2, library="litgpt", **PAIR),
]  # fmt: skip

LAYOUTS = [
    kind("cloneofsimo/lora Linear", frozen(layout_kinds.LoraInjectedLinear), LINEAR | DOWN_UP),
    kind("cloneofsimo/lora Conv2d", frozen(layout_kinds.LoraInjectedConv2d), CONV | DOWN_UP),
    kind("kohya sd-scripts Linear", kohya_layer, LINEAR | UP_DOWN),
    kind("kohya sd-scripts Conv2d", kohya_layer, CONV | UP_DOWN),
    kind("LoRA-ViT", frozen(layout_kinds._LoRALayer), LINEAR, a=("w_a.weight",), b=("w_b.weight",)),
    kind(
        "LoRA-ViT qkv", frozen(layout_kinds._LoRA_qkv_timm), LINEAR, base=partial(Net, 48, 48, 12), **PAIR,
        a=("linear_a_q.weight", "linear_a_v.weight"), b=("linear_b_q.weight", "linear_b_v.weight"),
    ),
    kind("torchtitan", frozen(layout_kinds.LoRALinear.from_linear), LINEAR | LORA),
    kind(
        "NeMo Automodel", frozen(layout_kinds.LinearLoRA.patch), LINEAR, a=("lora_A.weight",), b=("lora_B.weight",),
    ),
    kind("Megatron-Bridge", frozen(layout_kinds.MegatronLoRALinear), LINEAR | ADAPTER),
    GROUPED_EXPERTS,
]  # fmt: skip


def skipped_where_missing(one):
    library = getattr(one, "library", None)
    missing = library is not None and importlib.util.find_spec(library) is None
    return pytest.param(one, id=one.name, marks=[pytest.mark.skipif(missing, reason=f"{library} is not installed")])


VERSIONS = {"loralib": "0.1.2", "lycoris": "4.1.3", "torchtune": "0.6.1", "litgpt": "0.5.13"}
REFUSED = {
    "torchtune LoRAGroupedExperts": "merged with B ≠ 0; ranks that change without `adjust_scaling_factors`",
    "loralib": "merged with B ≠ 0; `Conv1d` and `Conv3d`, which cannot run; `Embedding` and groups are left out",
    "lycoris": "`use_scalar`, which would never train; Tucker, groups, LoHa, LoKr and others are left out",
    "torchtune": "merged with B ≠ 0",
    "litgpt": "merged with B ≠ 0",
    "LoRA-ViT": "a rank above alpha without `adjust_scaling_factors`: its scaling would be 0",
    "Megatron-Bridge": "A that is split over workers already; ranks divide by the workers",
    "cloneofsimo/lora": "a selector and groups are left out",
    "kohya sd-scripts": "groups are left out",
}


def table() -> str:
    """Every kind of the suite, for the documentation."""
    lines = ["| implementation | checked with | refused or left out |", "| --- | --- | --- |"]
    for one in (*INSTALLED, *LAYOUTS):
        library = getattr(one, "library", None)
        version = f"{library} {VERSIONS[library]}" if library else "its layout"
        refused = next((why for name, why in REFUSED.items() if name == library or one.name.startswith(name)), "")
        lines.append(f"| {one.name} | {version} | {refused} |")
    return "\n".join(lines)


OTHER_KINDS = [skipped_where_missing(one) for one in (*INSTALLED, *LAYOUTS)]
