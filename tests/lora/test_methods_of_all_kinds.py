"""Every method on every kind of LoRA layer: right against the dense formulas, or refused before anything is changed."""

import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from eva_lora import METHODS, EvaConfig, collect, initialize
from support.bounds import UNIT_ROUNDOFF
from support.grouped_experts import GROUPED_EXPERTS, MATRICES
from support.kinds import Kind, call
from support.method_formulas import BETA, FORMULAS, FROM_INPUTS, GAP
from support.other_kinds import INSTALLED, LAYOUTS, OTHER_KINDS, OtherKind
from support.peft_kinds import KINDS, LINEARS, LLAMA

SMALL = 2.0**-18  # of the largest output: for a forward with other products of the same numbers, in float32
INVERTIBLE = 1e4  # condition of R; above, the formulas' inverse makes 1e-3 of what a float32 rounds off its rows
ROWS = {  # of the weight, that each of a layer's pairs of A and B is added to
    "loralib MergedLinear": lambda out: [(0, 16), (32, 48)] if out == 48 else [(0, 5), (5, 10)],
    "litgpt LoRAQKVLinear": lambda out: [(0, 32), (40, 48)] if out == 48 else [(0, 6), (8, 10)],
    "LoRA-ViT qkv": lambda out: [(0, out // 3), (out - out // 3, out)],
}
REFUSED = {
    "loralib ConvLoRA": "its B A is not multiplied with the patches that its base layer sees",
    "LyCORIS DoRA": "is no multiple of B A x",
    "torchtune DoRALinear": "is no multiple of B A x",
    "litgpt LoRAQKVLinear": "third has rank 4, its weight has 2 directions",
    "Megatron-Bridge": "its base weight is elsewhere",
    "Conv2d with dilation": "its A reads other patches than the layer",
    "base in 4-bit": "it is quantised",
    "base in 8-bit": "it is quantised",
    "base in hqq": "it is quantised",
}
MORE = [
    Kind("lora_bias", **LLAMA, options={"target_modules": LINEARS, "lora_bias": True}),
]
QUICK = ("pissa", "mica", "corda")
#: PEFT's whose base weights stay as they are.
HELD = ("torchtune LoRAGroupedExperts", "DoRA", "MultiheadAttention", "lora_bias", "experts of ", "parameters of ")
LARGE = ("encoder with a pooler", "vision transformer", "MobileNetV2", "diffusers UNet")  # the same layers, in others
QUICK_KINDS = (
    "MultiheadAttention", "experts of GPT-OSS", "Conv2d with dilation", "base in 4-bit", "loralib MergedLinear",
    "loralib ConvLoRA", "LyCORIS LoCon, convolution", "LyCORIS DoRA", "torchtune LoRALinear", "litgpt LoRAQKVLinear",
    "LoRA-ViT qkv", "Megatron-Bridge", "torchtune LoRAGroupedExperts",
)  # fmt: skip


def outputs(model, batch):
    model.eval() if not any(hasattr(m, "merge_weights") for m in model.modules()) else None  # loralib's eval() merges
    with torch.no_grad():
        return call(model, batch)


@dataclass
class Case:
    """One kind's base, what its layers are fed, and statistics of that: all of it, and of what is to be kept."""

    base: nn.Module
    batches: list[Any]
    rows: dict[str, list[torch.Tensor]]
    kept_rows: dict[str, list[torch.Tensor]]
    data: Any
    keep: Any


@cache
def case_of(name):
    (kind,) = (kind for kind in (*KINDS, *MORE, *INSTALLED, *LAYOUTS) if kind.name == name)
    batches = kind.batches()
    data = statistics_of(kind.model(), batches)
    batches = batches[: data.num_batches]  # a pass may end before
    kept = batches[: len(batches) // 2 + 1]
    keep = statistics_of(kind.model(), kept)
    assert keep.num_batches == len(kept)
    rows, kept_rows = (kind.record(kind.base(), some) for some in (batches, kept))
    return Case(kind.base().eval(), batches, rows, kept_rows, data, keep)


def statistics_of(model, batches):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # not converged: there are few batches
        config = EvaConfig(max_batches=len(batches), tau=1.0, keep_moments=True)
        return collect(model, batches, config, progress=False)


def start(case, model, method):
    data = None if METHODS[method].data == "none" else case.data
    return initialize(model, data, method, keep=case.keep if method == "sc-lora" else None, beta=BETA)


def weights_of(kind, base, name):
    """The matrices that a layer's pairs of A and B are added to, as the base multiplies with them."""
    owner, _, parameter = name.rpartition(".")
    if kind is GROUPED_EXPERTS:
        return [w.T for matrix in MATRICES[parameter] for w in getattr(base.experts, f"{matrix}_proj").detach()]
    if "experts" in name:
        experts = base.get_submodule(owner)
        stack = getattr(experts, parameter).detach()
        return [*(stack.mT if experts.is_transposed else stack)]
    if parameter == "weight":
        return [base.get_submodule(owner).weight.detach()]
    layer = base.get_submodule(name)
    if isinstance(layer, nn.MultiheadAttention):
        return [layer.in_proj_weight.detach(), layer.out_proj.weight.detach()]
    weight = layer.weight.detach()
    weight = weight.T if type(layer).__name__ == "Conv1D" else weight.flatten(1)
    return [weight[start:end] for start, end in ROWS.get(kind.name, lambda out: [(0, out)])(len(weight))]


def taken(kind, case, model, name):
    """W less what a layer computes with while its trained matrices are zero, pair after pair; and its scaling."""
    if isinstance(kind, OtherKind):
        layer, before = model.get_submodule(name), case.base.get_submodule(name)
        if isinstance(before, nn.Conv2d):
            x = torch.randn(4, before.in_channels, 9, 9, generator=torch.Generator().manual_seed(3))
            return before, x, before(x) - layer(x)
        eye = torch.eye(before.in_features)[None]
        difference = (before(eye) - layer(eye))[0].T
        rows = ROWS.get(kind.name, lambda out: [(0, out)])(len(difference))
        outside = torch.ones(len(difference), dtype=torch.bool)
        for begin, end in rows:
            outside[begin:end] = False
        assert not difference[outside].any()
        return [difference[begin:end] for begin, end in rows]
    if kind is GROUPED_EXPERTS:
        pairs = [
            tuple(getattr(model.experts, f"lora_{matrix}_{side}").detach() for side in "ab")
            for matrix in MATRICES[name.rpartition(".")[2]]
        ]
        return [-scaling_of(kind) * each.T for a, b in pairs for each in a @ b]
    owner = name.rpartition(".")[0]
    layers = dict(model.get_base_model().named_modules())
    layer = layers.get(name)
    if not isinstance(layer, LoraLayer):  # of a parameter: such layers are nested
        layer, parameter = layers[owner], name.rpartition(".")[2]
        while layer.parameter_name != parameter:
            layer = layer.base_layer
    b, a = (module["default"].weight.detach() for module in (layer.lora_B, layer.lora_A))
    if not hasattr(layer, "parameter_name"):
        delta = layer.scaling["default"] * b.flatten(1) @ a.flatten(1)
    if isinstance(layer.get_base_layer(), nn.MultiheadAttention):
        return [-delta, -layer.base_layer.out_proj.get_delta_weight("default").detach()]
    if hasattr(layer, "parameter_name"):
        delta = layer.get_delta_weight("default").detach()
        return [*(-delta if layer._did_swap_in_out_features else -delta.mT)] if layer.num_experts > 1 else [-delta]
    left = case.base.get_submodule(name).weight.detach() - layer.get_base_layer().weight.detach()
    return [(left.T if type(layer.get_base_layer()).__name__ == "Conv1D" else left.flatten(1)) - delta]


def scaling_of(kind):
    if kind.name.startswith("cloneofsimo"):
        return 1.0
    return 4.0 if "rsLoRA" in kind.name else 2.0  # 8 / √4, 8 / 4, and 9 // 4


def base_state(kind, model):
    """All weights but the adapter's."""
    mine = {id(p) for p in kind.trained(model)}
    return {n: p.detach().clone() for n, p in model.named_parameters() if id(p) not in mine and "lora_" not in n}


SMALL_KINDS = [kind for kind in KINDS if not kind.name.startswith(LARGE)]
ALL_KINDS = [*(kind.parameter() for kind in (*SMALL_KINDS, *MORE)), *OTHER_KINDS]


@pytest.mark.parametrize("kind", [kind for kind in ALL_KINDS if kind.id in QUICK_KINDS])
def test_methods_are_right_or_refused_before_anything_is_changed(kind):
    walk(kind, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_every_method_is_right_or_refused_before_anything_is_changed(kind):
    walk(kind, FROM_INPUTS)


def walk(kind, methods):
    case = case_of(kind.name)
    batch, compared = case.batches[0], 0
    for method in methods:
        model = kind.model()
        expected = outputs(kind.base() if kind.computes_its_base else model, batch)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        weights = base_state(kind, model)
        too_few = METHODS[method].data == "all" and kind.name == "Conv1D of transformers"
        if kind.name in REFUSED or too_few:
            with pytest.raises(ValueError, match="rows tell" if too_few else REFUSED[kind.name]):
                start(case, model, method)
            after = model.state_dict()
            assert all(value.is_meta or torch.equal(value, after[name]) for name, value in before.items())
            continue
        report = start(case, model, method)
        kept = base_state(kind, model)  # before a forward: PEFT's of attention merges into its weights and back
        allowed = SMALL if kind.name != "bfloat16 base" else 2.0**-5  # of which what is left was rounded
        assert (outputs(model, batch) - expected).abs().max() <= allowed * expected.abs().max()
        held = any("base weights stay as they are" in note for note in report.notes)
        assert held == (METHODS[method].base == "less" and (isinstance(kind, OtherKind) or kind.name.startswith(HELD)))
        if held or method == "mica":
            assert all(torch.equal(kept[n], value) for n, value in weights.items())
        with torch.no_grad():
            for parameter in kind.trained(model):
                parameter.zero_() if method != "mica" else parameter.fill_(1.0)
        compared += sum(compare(kind, case, model, method, name, rank) for name, rank in report.ranks.items())
    assert compared > 0 or kind.name in REFUSED


def compare(kind, case, model, method, name, rank):
    """How many of a layer's pairs of A and B were held against the formula: those where a gap says what it is."""
    scaling, pairs, compared = scaling_of(kind), [], 0
    weights = weights_of(kind, case.base, name)
    rows, kept = case.rows[name], case.kept_rows[name]
    if kind is GROUPED_EXPERTS:  # whose matrices gate and up are fed the same
        rows, kept = (each * (len(weights) // len(each)) for each in (rows, kept))
    for w, *seen in zip(weights, rows, kept, strict=True):
        seen = [x if len(x) else torch.cat([*filter(len, of)]) for x, of in zip(seen, (rows, kept), strict=True)]
        moments = [x.double().T @ x.double() / len(x) for x in seen]
        known = rank < min(w.shape) and not (METHODS[method].power == 2 and torch.linalg.cond(moments[0]) > INVERTIBLE)
        pairs.append(known and FORMULAS[method](w.double(), moments[0], rank, scaling, kept=moments[1]))
    got = taken(kind, case, model, name)
    if isinstance(got, tuple):  # of a convolution, what it puts out less
        layer, x, difference = got
        got = [(layer, x, difference)]
    for part, pair in zip(got, pairs, strict=True):
        if not pair or not pair[2] > GAP * pair[3]:
            continue
        b, a, *_ = pair
        compared += 1
        wanted = scaling * b @ a
        if isinstance(part, tuple):
            layer, x, part = part
            kernel = wanted.view(layer.weight.shape)
            wanted = nn.functional.conv2d(x.double(), kernel, None, layer.stride, layer.padding, layer.dilation)
        if method == "mica":  # up to the columns' signs
            columns = part.double() if part.ndim == 2 else part.double().movedim(1, 0).flatten(1)
            assert columns.any(), name
            assert (columns - b @ (b.T @ columns)).norm() <= 1e-3 * columns.norm(), name
            continue
        rounding = UNIT_ROUNDOFF[torch.bfloat16] * weights[0].norm() if kind.name == "bfloat16 base" else 0
        assert (part - wanted).norm() <= 1e-3 * wanted.norm() + rounding, (name, method)
    return compared
