"""The dry run against the run itself, and its work against the model's own formula."""

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from eva_lora import EvaConfig, collect, estimate
from eva_lora.cli import main
from eva_lora.collecting.estimating import matmul_rate
from support.models import load_minilm, lora, minilm_text_batches, tiny_gpt2, tiny_llama, token_batches

pytestmark = pytest.mark.filterwarnings("ignore:EVA stopped at")

GPT2_LAYERS = ["c_attn", "c_proj", "c_fc"]


def on_meta(build, **options):
    return lora(build().to("meta"), **options)


@pytest.mark.parametrize(
    ("build", "batches", "options"),
    [
        (tiny_llama, token_batches, {}),
        (tiny_gpt2, token_batches, {"target_modules": GPT2_LAYERS, "fan_in_fan_out": True}),
        (load_minilm, minilm_text_batches, {"target_modules": "all-linear"}),
    ],
)
def test_layers_inputs_and_memory_are_those_of_the_run(build, batches, options):
    batch = batches()[0]
    config = EvaConfig(max_batches=1)
    expected = estimate(on_meta(build, **options), batch, config)
    statistics = collect(lora(build(), **options), [batch], config, progress=False)
    assert expected.ranks == {site.name: site.rank for site in statistics.sites}
    assert expected.in_features == {site.name: site.in_features for site in statistics.sites}
    sharing = [[s.name for s in statistics.sites if s.input == i] for i in range(len(statistics.inputs))]
    assert expected.inputs == sharing
    assert expected.statistic == [entry.kind for entry in statistics.inputs]
    shifts = 4 * sum(statistics.inputs[i].components.shape[1] for i in range(len(statistics.inputs)))
    assert expected.statistics_bytes + shifts == sum(entry.nbytes for entry in statistics.inputs)


def test_work_follows_from_the_models_shapes():
    batch, heads, tokens = 4, 4, 24
    expected = estimate(on_meta(tiny_llama), token_batches()[0])
    rows, hidden, inner, kv = batch * tokens, 32, 48, 16
    linear = 2 * rows * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner)
    attention = 2 * (2 * batch * heads * tokens * tokens * hidden // heads)
    assert expected.forward_flops == 3 * (linear + attention)  # the head's product is spared
    head = 2 * rows * hidden * 97
    with_head = estimate(on_meta(tiny_llama, target_modules=["q_proj", "lm_head"]), token_batches()[0])
    assert with_head.forward_flops == 3 * (linear + attention) + head
    assert expected.rows == rows
    assert expected.statistics_flops == 2 * rows * (9 * 32**2 + 3 * 48**2)  # exact statistics: XᵀX of 12 inputs
    assert expected.seconds_per_batch(1e9) == (expected.forward_flops + expected.statistics_flops) / 1e9


def test_nothing_of_the_weights_is_read(files, tmp_path):
    for path in (files / "base").iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    arguments = ["init", tmp_path, "--data", files / "train.jsonl", "--dry-run", "--rank", 4]
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    for fact in ("21, fed by 12 distinct inputs", "84 ranks", "weights ", "predicted ", "GFLOP/s just now"):
        assert fact in done.output
    assert "model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj" in done.output


def test_what_cannot_be_rehearsed_is_said():
    with pytest.raises(ValueError, match="expected every parameter on the meta device, base_model"):
        estimate(lora(tiny_llama()), token_batches()[0])

    class Peeking(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x) if x.sum() > 0 else x

    with pytest.raises(RuntimeError, match=r"^model: its forward cannot be rehearsed without values"):
        estimate(on_meta(Peeking, target_modules=["linear"]), torch.ones(3, 4))


def test_the_rate_is_a_positive_number():
    assert 1e6 < matmul_rate("cpu", torch.float32, width=64) < 1e16
