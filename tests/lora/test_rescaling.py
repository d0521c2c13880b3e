"""Bases whose quantiser moved scales, which are known here, between norms and layers before it rounded, as AWQ does."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from eva_lora import EvaConfig
from eva_lora import fit_quantization_error as fit
from eva_lora.adapters import BaseWeight, find_adapter
from eva_lora.fitting import FloatWeights, LayerWeights
from eva_lora.peft import replace_lora_weights_loftq
from support.models import lora, tiny_llama, token_batches
from support.quantised import quantised

UNIT = 2.0**-24
GROUP = 16


def scales(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(count, generator=generator, dtype=torch.float64) * 2 - 1).exp()  # from 1 / e to e


def moved(norms, before, after, s, added=0.0):
    """Divide norms' weights and rows of the layers before by s, and multiply columns of those after with it."""
    with torch.no_grad():
        for norm in norms:
            norm.weight.copy_((norm.weight.double() + added) / s - added)
        for linear in before:
            linear.weight.copy_(linear.weight.double() / s[:, None])
        for linear in after:
            linear.weight.copy_(linear.weight.double() * s)


def awq_like(floats):
    """The same function with other weights."""
    model = copy.deepcopy(floats)
    for i, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        norm = layer.input_layernorm
        moved([norm], [], [attention.q_proj, attention.k_proj, attention.v_proj], scales(len(norm.weight), 4 * i))
        norm = layer.post_attention_layernorm
        moved([norm], [], [mlp.gate_proj, mlp.up_proj], scales(len(norm.weight), 4 * i + 1))
        moved([], [attention.v_proj], [attention.o_proj], scales(attention.o_proj.in_features, 4 * i + 2))
        moved([], [mlp.up_proj], [mlp.down_proj], scales(mlp.down_proj.in_features, 4 * i + 3))
    return model


@pytest.fixture(scope="module")
def floats():
    model = tiny_llama(key_value_heads=4)
    for name, weight in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(weight, 0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    return model


@pytest.fixture(scope="module")
def given(floats):
    """What the quantiser rounds."""
    return awq_like(floats)


@pytest.fixture(scope="module")
def base(given):
    return quantised(given, group=GROUP)


def read(base, floats):
    """Layer → the float weight, scaled, and what the base computes with."""
    model = lora(copy.deepcopy(base))
    bases, _ = find_adapter(model).base_weights()
    source = LayerWeights(model, bases, FloatWeights.of(floats))
    return {name: source.read(name) for name in bases}


def test_scales_of_norms_are_exact_and_those_between_layers_are_one_fit_to_both(floats, given, base):
    lost, between = 0.0, 0
    for name, (weight, quantized) in read(base, floats).items():
        assert torch.equal(quantized, base.get_submodule(name).weight)
        true, kind = given.get_submodule(name).weight.detach(), name.rpartition(".")[2]
        if kind in ("q_proj", "k_proj", "gate_proj"):
            # The norm and the weight of the base, their ratio and the product are rounded once each.
            assert ((weight - true).abs() <= 4 * UNIT * true.abs()).all(), name
            continue
        lost += float((weight - true).square().sum() / (quantized - true).square().mean())
        between += weight.shape[1] if kind in ("o_proj", "down_proj") else 0
    # A least-squares fit to n numbers in noise loses n times the variance of one: n scales in two layers together, and
    # 2 n if each layer had its own. Halfway between is five standard deviations from either.
    assert between == 3 * (32 + 48)
    assert lost < 1.5 * between


def test_what_is_known_of_norms_that_add_one_and_of_layers_that_are_as_they_were(floats):
    """Gemma's norms; a base of which nothing was rounded; and a layer of which nothing was moved."""
    model = copy.deepcopy(floats)
    layer = model.model.layers[1]
    for norm in (layer.input_layernorm, floats.model.layers[1].input_layernorm):
        assert norm.weight.min() > 0.5
    attention = layer.self_attn
    fed = [attention.q_proj, attention.k_proj, attention.v_proj]
    moved([layer.input_layernorm], [], fed, scales(32, 1), added=1.0)
    for made in (model, quantised(model, group=GROUP)):
        for name, (weight, _) in read(made, floats).items():
            true = model.get_submodule(name).weight.detach()
            assert ((weight - true).abs() <= 4 * UNIT * true.abs()).all(), name


def test_scales_that_nothing_tells_are_fitted_row_by_row_and_column_by_column():
    """Of a layer between two others: rows and columns, neither of which a norm or another layer's scales explain."""
    torch.manual_seed(0)
    floats = nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 64))
    model = copy.deepcopy(floats)
    moved([model[0]], [], [], scales(48, 1))
    moved([], [model[1]], [], scales(64, 2))
    moved([], [], [model[1]], scales(48, 3))
    base = quantised(model, group=GROUP)
    source = LayerWeights(base, {"1": BaseWeight("1", base[1], 48, 64, torch.float32)}, FloatWeights.of(floats))
    weight, quantized = source.read("1")
    true = model[1].weight.detach()
    lost = float((weight - true).square().sum() / (quantized - true).square().mean())
    assert lost < 1.5 * (64 + 48)  # of the 64 · 48 that the error is made of
    assert source.other_norm == "0"


def test_a_fit_is_to_the_float_model_and_says_how_far_that_is(floats, given, base):
    reports = {}
    for kind, weights in (("theirs", floats), ("given", given)):
        reports[kind] = fit(
            lora(copy.deepcopy(base)), token_batches(9), weights, EvaConfig(rho=1.0, max_batches=6, tau=1.0),
            hold_back=3, progress=False,
        )  # fmt: skip
    assert any("moves scales between layers" in note for note in reports["theirs"].notes)
    assert not any("moves scales" in note for note in reports["given"].notes)
    # Of two layers' errors, of out · in numbers each, one fit to both takes out: at most one part in 64.
    np.testing.assert_allclose(reports["theirs"].hidden_error, reports["given"].hidden_error, rtol=1 / 64)
    for name, layer in reports["theirs"].layers.items():
        assert layer.weight_error == pytest.approx(reports["given"].layers[name].weight_error, rel=1 / 64), name


def test_loftq_s_rounds_are_refused_and_peft_s_function_scales_them_too(floats, base):
    models = [lora(copy.deepcopy(base)) for _ in range(3)]
    with pytest.raises(ValueError, match="rounds: expected 1 on a base whose weights were rescaled"):
        fit(
            models[0], None, floats, EvaConfig(rho=1), method="loftq", rounds=2, progress=False,
            requantize=lambda name, layer, matrix: None,
        )  # fmt: skip
    fit(models[1], None, floats, EvaConfig(rho=1), method="loftq", progress=False)
    replace_lora_weights_loftq(models[2], floats)
    theirs, ours = (
        {name: p for name, p in model.named_parameters() if "lora_" in name} for model in (models[1], models[2])
    )
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
