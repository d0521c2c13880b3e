"""The exported adapter: one rank, scaling 1, the same ΔW."""

import json

import peft
import pytest
import torch

from eva_lora import EvaConfig, apply, collect, eva_initialize, export_uniform, plan
from eva_lora.adapters.export import VLLM_RANKS
from support.bounds import gamma, require_as_near
from support.kinds import call
from support.models import lora, tiny_gpt2, tiny_llama, token_batches
from support.peft_kinds import KINDS, STACKED_EXPERTS
from support.versions import needs

pytestmark = pytest.mark.filterwarnings("ignore:EVA stopped at")


def trained(make=tiny_llama, budget=None, dtype=torch.float32, **options):
    """A model after EVA, with B as if it had been trained."""
    model = lora(make(), **options)
    apply(model, plan(collect(model, token_batches(), EvaConfig(max_batches=2), progress=False), budget=budget))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return model


def layers(model):
    return {n: m for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 3}, "rank_pattern": {"down_proj": 6}},
        {"budget": 12},
        {"dtype": torch.bfloat16},
    ],
    ids=["plain", "rsLoRA", "patterns", "removed layers", "bfloat16"],
)
@pytest.mark.parametrize("source", ["model", "folder"])
def test_every_delta_stays_and_every_rank_is_one(tmp_path, options, source):
    model = trained(**options)
    original = layers(model)
    if source == "folder":
        model.save_pretrained(tmp_path / "saved")
    out = export_uniform(model if source == "model" else tmp_path / "saved", tmp_path / "out")
    config = json.loads((out / "adapter_config.json").read_text())
    largest = max(m.r["default"] for m in original.values())
    assert (config["r"], config["lora_alpha"]) == (largest, largest)
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert config["use_rslora"] is False
    base = tiny_llama()
    reloaded = layers(peft.PeftModel.from_pretrained(base, out, autocast_adapter_dtype=False))
    assert reloaded.keys() == original.keys()
    unit = torch.finfo(options.get("dtype", torch.float32)).eps / 2
    for name, layer in reloaded.items():
        assert (layer.r["default"], layer.scaling["default"]) == (largest, 1.0)
        a, b = (getattr(original[name], f"lora_{x}")["default"].weight.double() for x in "AB")
        c, d = (getattr(layer, f"lora_{x}")["default"].weight.double() for x in "AB")
        expected = original[name].scaling["default"] * b @ a
        rounding = unit + 2 * gamma(largest + 1, torch.float64)  # of one factor, and of both products here
        assert ((d @ c - expected).abs() <= rounding * original[name].scaling["default"] * b.abs() @ a.abs()).all()


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (tiny_llama, {"use_dora": True}),
        (tiny_gpt2, {"target_modules": ["c_attn", "c_fc"], "lora_bias": True, "fan_in_fan_out": True}),
    ],
    ids=["DoRA", "Conv1D with bias"],
)
def test_outputs_stay(tmp_path, make, options):
    model = trained(make, **options).eval()
    reloaded = peft.PeftModel.from_pretrained(make(), export_uniform(model, tmp_path)).eval()
    batch = token_batches(1)[0]
    with torch.no_grad():
        ours, base = model(**batch).logits, make().eval()(**batch).logits
        theirs, exact = reloaded(**batch).logits, model.double()(**batch).logits
    assert (ours - base).abs().max() > 0.01
    require_as_near(theirs, ours, exact)


def test_the_rank_can_be_chosen(tmp_path):
    model = trained()
    largest = max(m.r["default"] for m in layers(model).values())
    assert peft.PeftConfig.from_pretrained(export_uniform(model, tmp_path / "a", rank=64)).r == 64
    assert peft.PeftConfig.from_pretrained(export_uniform(model, tmp_path / "b", buckets=VLLM_RANKS)).r == 8
    with pytest.raises(ValueError, match=rf"^rank: expected at least {largest}, the largest rank of a layer, got 1"):
        export_uniform(model, tmp_path / "c", rank=1)
    with pytest.raises(ValueError, match=r"^buckets: expected one of at least"):
        export_uniform(model, tmp_path / "c", buckets=[1, 2])
    with pytest.raises(ValueError, match=r"^rank: expected either rank or buckets"):
        export_uniform(model, tmp_path / "c", rank=8, buckets=[8])
    assert not (tmp_path / "c").exists()


def test_the_model_is_left_alone(tmp_path):
    model = trained(alpha_pattern={"q_proj": 3})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    described = dict(vars(model.peft_config["default"]))
    export_uniform(model, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert vars(model.peft_config["default"]) == described


def test_what_cannot_be_exported_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"^model_or_folder: expected a PeftModel or a folder, got LlamaForCausalLM"):
        export_uniform(tiny_llama(), tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config.json"):
        export_uniform(tmp_path, tmp_path / "out")
    trained().save_pretrained(tmp_path / "saved")
    weights = tmp_path / "saved" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is damaged"):
        export_uniform(tmp_path / "saved", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def in_float64(batch):
    if isinstance(batch, dict):
        return {name: in_float64(value) for name, value in batch.items()}
    return batch.double() if isinstance(batch, torch.Tensor) and batch.is_floating_point() else batch


NAMES = ["Conv2d", "MultiheadAttention", "experts of Mixtral", "experts of GPT-OSS", "diffusers UNet"]


@pytest.mark.parametrize("kind", [kind.parameter() for kind in KINDS if kind.name in NAMES])
def test_adapters_of_other_kinds_compute_the_same(tmp_path, kind):
    model, batch = kind.model(), kind.batches()[0]
    statistics = collect(model, kind.batches(), EvaConfig(max_batches=2), progress=False)
    budget = sum(site.rank for site in statistics.sites) - 3
    apply(model, plan(statistics, budget=budget))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    model.eval()
    reloaded = peft.PeftModel.from_pretrained(kind.base(), export_uniform(model, tmp_path, rank=9)).eval()
    layers_of = [m for m in reloaded.modules() if hasattr(m, "lora_A")]
    assert {(m.r["default"], m.scaling["default"]) for m in layers_of} == {(9, 1.0)}
    with torch.no_grad():
        ours, theirs, base = call(model, batch), call(reloaded, batch), call(kind.base().eval(), batch)
        if "experts" in kind.name:
            model.get_base_model().set_experts_implementation("eager")  # grouped products have no float64
        exact = call(model.double(), in_float64(batch))
    assert (ours - base).abs().max() > 0.01
    require_as_near(theirs, ours, exact)


@needs(STACKED_EXPERTS)
def test_a_folder_with_stacked_experts_must_come_as_a_model(tmp_path):
    kind = next(kind for kind in KINDS if kind.name == "experts of Mixtral")
    kind.model().save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"^model_or_folder: .* on parameters .*load it and pass the model"):
        export_uniform(tmp_path / "saved", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ranks_planned_for_serving_need_no_padding(tmp_path):
    """The three bounds that engines set, asked for before training: one rank or none, in steps that fit a bucket."""
    model = lora(tiny_llama(), r=8)
    config = EvaConfig(max_batches=2, min_rank=1, max_rank=16, rank_multiple=8)
    report = eva_initialize(model, token_batches(), config, progress=False)
    assert set(report.ranks.values()) <= {8, 16}
    out = export_uniform(model, tmp_path, buckets=VLLM_RANKS)
    assert peft.PeftConfig.from_pretrained(out).r == max(report.ranks.values())
    reloaded = layers(peft.PeftModel.from_pretrained(tiny_llama(), out))
    assert reloaded.keys() == layers(model).keys()
