"""Every method that starts from gradients on every kind of PEFT's layers: right, or refused before anything is done."""

from dataclasses import replace

import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from eva_lora import METHODS, initialize
from support.gradients import FORMULAS, cosine, svd, whole
from support.kinds import Kind, call
from support.peft_kinds import KINDS, LINEARS, LLAMA
from support.tiny import state_of

METHODS_OF_GRADIENTS = [name for name, method in METHODS.items() if method.data == "gradients"]
GAP = 0.02
SMALL = 2.0**-18  # of the largest output: for a forward with other products of the same numbers, in float32
LARGE = ("encoder with a pooler", "vision transformer", "MobileNetV2", "diffusers UNet")  # the same layers, in others
TOO_SMALL = dict.fromkeys(("Conv1d", "Conv2d", "Conv3d"), "has rank 4, its weight has 6 directions, of which method=")
REFUSED = {"Conv2d with dilation": "its A reads other patches than the layer"}
#: Whose base weight stays as it is, though the method takes part of it.
HELD = ("DoRA", "MultiheadAttention", "lora_bias", "experts of ", "parameters of ", "base in ")
MORE = [Kind("lora_bias", **LLAMA, options={"target_modules": LINEARS, "lora_bias": True})]
ONE = "parameters of "  # a router's rows are probabilities, so that its G has one direction less than experts
ALL = [
    (replace(kind, options={**kind.options, "r": 1}) if kind.name.startswith(ONE) else kind).parameter()
    for kind in (*KINDS, *MORE)
    if not kind.name.startswith(LARGE)
]
QUICK = ("MultiheadAttention", "experts of GPT-OSS", "base in 4-bit", "Conv2d with dilation")


def loss_fn(model, batch):
    """With gradients of many directions."""
    found = call(model, batch).float()
    return (found - torch.randn(found.shape, generator=torch.Generator().manual_seed(5))).square().mean()


def layers_of(model):
    """Matrix → its LoRA layer, and which of the layer's parts it is."""
    found = {}
    for path, module in model.get_base_model().named_modules():
        if not isinstance(module, LoraLayer) or path.endswith("out_proj"):
            continue
        name = path.replace(".base_layer", "")
        if hasattr(module, "parameter_name"):
            name = f"{name}.{module.parameter_name}"
        attention = isinstance(module.get_base_layer(), nn.MultiheadAttention)
        parts = 2 if attention else getattr(module, "num_experts", 1)
        for part in range(parts):
            layer = module.base_layer.out_proj if attention and part == 1 else module
            found[f"{name}[{part}]" if parts > 1 else name] = (layer, 0 if attention else part)
    return found


def trained(layer, part, of=lambda parameter: parameter):
    """A (r, in) and B (out, r), or something of theirs: as far as they are trained."""
    found = [dict(m["default"].named_parameters())["weight"] for m in (layer.lora_A, layer.lora_B)]
    a, b = (of(parameter).detach() for parameter in found)
    experts = getattr(layer, "num_experts", 1)
    if experts > 1:  # as PEFT lays them out
        return a.view(experts, -1, a.shape[1])[part], b.view(len(b), -1, experts)[..., part]
    return a.flatten(1), b.flatten(1)


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind.id in QUICK])
def test_methods_are_right_or_refused_before_anything_is_done(kind, tmp_path):
    walk(kind, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALL)
def test_every_method_is_right_or_refused_before_anything_is_done(kind, tmp_path):
    walk(kind, tmp_path)


def walk(kind, folder):
    batches = kind.batches()[:2]
    exact = None
    for method in METHODS_OF_GRADIENTS:
        model, less = kind.model(), METHODS[method].base == "less"
        message = REFUSED.get(kind.name) or (less and TOO_SMALL.get(kind.name))
        if message:
            before = state_of(model)
            with pytest.raises(ValueError, match=message):
                initialize(model, never(), method, loss_fn=loss_fn)
            assert state_of(model) == before
            continue
        if exact is None:
            exact = whole(kind.model(), batches, loss_fn=loss_fn)
            if kind.name != "A on the meta device":
                require_what_b_learns(kind.model().eval(), batches, exact, kind.name)
        with torch.no_grad():
            expected = call(kind.base().eval(), batches[0])
        report = initialize(model, batches, method, loss_fn=loss_fn)
        rounded = method == "gora" and kind.name.startswith(ONE)  # its step is less than the loss's rounding
        assert report.losses[1] < report.losses[0] or rounded
        held = any("base weights stay as they are" in note for note in report.notes)
        assert held == (less and kind.name.startswith(HELD))
        if less:
            allowed = SMALL if kind.name != "bfloat16 base" else 2.0**-5  # of which what is left was rounded
            with torch.no_grad():
                found = call(model.eval(), batches[0])
            assert (found - expected).abs().max() <= allowed * expected.abs().max()
        compared = sum(compare(method, model, name, g.double()) for name, g in exact.items())
        assert compared > 0
        if held:
            kind.save(model, None, folder / method)
            with torch.no_grad():
                again = call(kind.reload(folder / method).eval(), batches[0])
            assert (again - found).abs().max() <= SMALL * found.abs().max()


def never():
    raise AssertionError("a batch was asked for")
    yield


def require_what_b_learns(model, batches, exact, kind):
    """While B is zero the loss's gradient by it is s G Aᵀ: autograd's, whatever the layer computes with."""
    layers = layers_of(model)
    for layer, _ in layers.values():
        layer.lora_A["default"].weight.requires_grad_(False)
    for batch in batches:
        (loss_fn(model, batch) / len(batches)).backward()
    learnt, wanted = {}, {}
    for name, (layer, part) in layers.items():
        learnt[name] = trained(layer, part, lambda p: p if p.grad is None else p.grad)[1]
        wanted[name] = layer.scaling["default"] * exact[name].double() @ trained(layer, part)[0].double().mT
    largest = max(g.norm() for g in wanted.values())
    assert set(learnt) == set(exact)
    for name, found in learnt.items():
        assert (found.double() - wanted[name]).norm() <= 1e-5 * largest, (kind, name)


def compare(method, model, name, g):
    """Whether A and B were held against the formula: where a gap says what it is."""
    layer, part = layers_of(model)[name]
    a, b = (factor.double() for factor in trained(layer, part))
    rank = len(a)
    if not g.any():
        return False
    its_b, its_a = FORMULAS[method](g, rank, layer.scaling["default"], a=a)
    if method == "gora":
        assert (b - its_b).norm() <= 1e-4 * its_b.norm(), name
        return True
    values = svd(g)[1]
    ends = (rank, 2 * rank) if METHODS[method].base == "less" else (rank,)
    if any(end < len(values) and values[end - 1] - values[end] < GAP * values[end - 1] for end in ends):
        return False
    if values[ends[-1] - 1] < 1e-4 * values[0]:  # of an expert that few tokens came to
        return False
    torch.testing.assert_close((b.norm(), a.norm()), (its_b.norm(), its_a.norm()), rtol=1e-3, atol=0)
    assert cosine(b, its_b) >= 0.99, name
    assert cosine(a.T, its_a.T) >= 0.99, name
    return True
