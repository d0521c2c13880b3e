"""What a layer computes with, whatever keeps its weight; and the float weights that it was made of."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from eva_lora.adapters import BaseWeight, find_adapter
from eva_lora.fitting import FloatWeights
from support.models import LINEARS, tiny_gpt2, tiny_llama

UNIT = 2.0**-24


def linear(out=24, width=64, bias=True):
    torch.manual_seed(0)
    return nn.Linear(width, out, bias=bias).requires_grad_(False)


class Packed(nn.Module):
    """A quantiser nobody knows: codes and scales, and a forward that makes a matrix of them."""

    def __init__(self, source):
        super().__init__()
        scale = source.weight.abs().amax(1, keepdim=True) / 7
        self.register_buffer("codes", (source.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = source.bias

    def matrix(self):
        return self.codes.float() * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.matrix().to(x.dtype), self.bias)


class Scaled(nn.Linear):
    """Its weight is not what inputs are multiplied with: they are scaled first."""

    def forward(self, x):
        return super().forward(x * torch.linspace(0.5, 2, self.in_features))


def base(module, width=64, out=24, **options):
    return BaseWeight("it", module, width, out, torch.float32, **options)


def test_a_float_weight_is_read_as_it_is():
    module = linear()
    assert torch.equal(base(module).read(), module.weight)


def test_a_conv1d_of_transformers_is_read_the_right_way_round():
    torch.manual_seed(0)
    module = Conv1D(24, 64).requires_grad_(False)
    assert torch.equal(base(module, fan_in_fan_out=True).read(), module.weight.T)
    assert torch.equal(base(module).read(), module.weight.T)  # read the wrong way round, it is not what is computed


@pytest.mark.parametrize("quantiser", ["nf4", "fp4", "int8", "hqq"])
def test_known_quantisers_weights_are_what_their_layers_compute_with(quantiser):
    module = linear(64)
    if quantiser == "hqq":
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        config = BaseQuantizeConfig(nbits=4, group_size=16)
        made = HQQLinear(copy.deepcopy(module), config, compute_dtype=torch.float32, device="cpu")
    else:
        import bitsandbytes as bnb

        if quantiser == "int8":
            made = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
        else:
            made = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type=quantiser)
            made.support_avx512bf16_for_cpu = False
        made.load_state_dict(module.state_dict())
        made = made.to("cpu")
    before = {name: tensor.clone() for name, tensor in made.state_dict().items() if isinstance(tensor, torch.Tensor)}
    weight = base(made, out=64).read()
    assert 0.001 < (weight - module.weight).norm() / module.weight.norm() < 0.2
    x = torch.randn(16, 64)
    expected = x @ weight.T + module.bias
    # bitsandbytes rounds inputs to 8 bits for 8-bit weights, and to float16
    rounding = 1 / 64 if quantiser == "int8" else 2 * 64 * UNIT
    bound = rounding * (x.abs() @ weight.abs().T + module.bias.abs())
    assert ((made(x).float() - expected).abs() <= bound).all()
    for name, tensor in made.state_dict().items():
        if name in before:
            assert torch.equal(tensor, before[name]), name


def test_an_unknown_quantiser_is_shown_the_identity():
    module = Packed(linear(width=600))
    weight = base(module, width=600).read()
    # y = q + b rounds once, y − b once more
    assert (
        (weight - module.matrix()).abs() <= 2 * UNIT * (module.matrix().abs() + 2 * module.bias.abs()[:, None])
    ).all()


def test_a_weight_that_is_not_computed_with_is_not_believed():
    module = Scaled(64, 24, bias=False).requires_grad_(False)
    expected = module.weight * torch.linspace(0.5, 2, 64)
    assert torch.allclose(base(module).read(), expected, rtol=2 * UNIT, atol=0)


@pytest.mark.parametrize("way", ["as it is", "its own forward", "its class's forward"])
def test_only_a_plain_linear_layer_is_not_asked_what_it_computes_with(way, monkeypatch):
    module, calls = linear(bias=False), []
    scale = torch.linspace(0.5, 2, 64)

    def scaled(layer, x):
        calls.append(len(x))
        return nn.functional.linear(x * scale, layer.weight)

    if way == "its own forward":
        module.forward = lambda x: scaled(module, x)
    elif way == "its class's forward":
        monkeypatch.setattr(nn.Linear, "forward", scaled)
    expected = module.weight if way == "as it is" else module.weight * scale
    assert torch.allclose(base(module).read(), expected, rtol=2 * UNIT, atol=0)
    assert bool(calls) == (way != "as it is")


def test_dequantize_is_asked_first_and_checked():
    module = Packed(linear())
    asked = []

    def dequantize(name, layer):
        asked.append((name, layer))
        return layer.matrix()

    assert torch.equal(base(module).read(dequantize), module.matrix())
    assert asked == [("it", module)]
    assert torch.equal(base(linear()).read(lambda name, layer: None), linear().weight)
    for wrong in (lambda name, layer: layer.matrix() * 1.5, lambda name, layer: layer.matrix().T):
        with pytest.raises(ValueError, match=r"dequantize: what it returned for layer it, .* is not the matrix"):
            base(module).read(wrong)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda w: w.flatten(), ValueError, "is not the matrix"),
        (lambda w: w.sum(), ValueError, "is not the matrix"),
        (lambda w: w.roll(1, 0)[..., None], ValueError, "is not the matrix"),
        (lambda w: w.roll(1, 1).bfloat16(), ValueError, "is not the matrix"),
        (lambda w: w.index_fill(0, torch.tensor(3), float("nan")), ValueError, "is not the matrix"),
        (lambda w: w.numpy(), TypeError, "expected a tensor or None for layer it, it returned a ndarray"),
        (lambda w: (w, None), TypeError, "expected a tensor or None for layer it, it returned a tuple"),
    ],
)
def test_whatever_else_a_callable_returns_is_refused(returned, error, message):
    with pytest.raises(error, match=f"dequantize: .*{message}"):
        base(Packed(linear())).read(lambda name, layer: returned(layer.matrix()))


def test_a_callable_may_return_other_dtypes():
    module = Packed(linear())
    for dtype in (torch.float64, torch.bfloat16):
        read = base(module).read(lambda name, layer, dtype=dtype: layer.matrix().to(dtype))
        assert torch.equal(read, module.matrix().to(dtype).float())


class Choosy(Packed):
    """It takes no rows without a batch around them."""

    def forward(self, x):
        if x.ndim < 3:
            raise RuntimeError("expected 3 dimensions")
        return super().forward(x)


def test_a_layer_that_cannot_be_asked_is_named():
    with pytest.raises(ValueError, match=r"layer it: a Choosy, it does not take .*: RuntimeError: expected 3 dim"):
        base(Choosy(linear())).read()


def test_a_layer_that_is_no_matrix_is_refused():
    with pytest.raises(ValueError, match="layer it: expected outputs of 24 features for inputs of 64"):
        base(nn.Sequential(Packed(linear()), nn.Linear(24, 5))).read()


def test_samples_tell_bases_apart_and_are_the_same_each_time():
    module = linear()
    assert base(module).samples(4) == base(module).samples(4)
    assert len(base(module).samples(4)) == 16
    other = copy.deepcopy(module)
    other.weight[0, 0] += 1
    assert base(module).samples(4) != base(other).samples(4)
    assert len(base(linear(2, 3), 3, 2).samples(4)) == 6


def test_peft_s_layers_say_what_they_are_added_to():
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=LINEARS))
    bases, without = find_adapter(model).base_weights()
    plain = dict(tiny_llama().named_parameters())
    assert without == {}
    assert len(bases) == 21
    for name, weight in bases.items():
        assert torch.equal(weight.read(), plain[f"{name}.weight"])


def test_what_is_not_one_matrix_says_why():
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], alora_invocation_tokens=[1]))
    bases, without = find_adapter(model).base_weights()
    assert bases == {}
    assert set(without) == {f"model.layers.{i}.self_attn.q_proj" for i in range(3)}
    assert "not W + s B A" in without["model.layers.0.self_attn.q_proj"]


# --- float weights


def named(model):
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


@pytest.fixture
def saved(tmp_path):
    """A folder with two files and an index, as large models are saved."""
    weights = named(tiny_llama())
    halves = [dict(list(weights.items())[:13]), dict(list(weights.items())[13:])]
    index = {}
    for i, half in enumerate(halves):
        save_file(half, tmp_path / f"model-{i}.safetensors")
        index |= dict.fromkeys(half, f"model-{i}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return tmp_path


LAYER = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize("kind", ["index", "file", "files", "state dict", "module", "in PEFT's", "itself"])
def test_float_weights_come_from_anywhere(saved, tmp_path_factory, kind):
    model = tiny_llama()
    single = tmp_path_factory.mktemp("single")
    save_file(named(model), single / "model.safetensors")
    loose = tmp_path_factory.mktemp("loose")
    save_file(named(model), loose / "other.safetensors")
    source = {
        "index": saved, "file": single / "model.safetensors", "files": str(loose), "state dict": named(model),
        "module": model, "in PEFT's": get_peft_model(tiny_llama(), LoraConfig(target_modules=LINEARS)),
        "itself": FloatWeights.of(model),
    }[kind]  # fmt: skip
    weight = model.get_submodule(LAYER).weight.detach()
    read = FloatWeights.of(source).read(LAYER, weight + 0.01)
    assert torch.equal(read, weight)
    read.zero_()
    assert weight.any()  # what was read is its own


def test_float_weights_are_float32_wherever_they_are():
    model = tiny_llama().bfloat16()
    weight = model.get_submodule(LAYER).weight.detach()
    read = FloatWeights.of(model).read(LAYER, weight.float())
    assert read.dtype == torch.float32
    assert torch.equal(read, weight.float())


def test_names_may_begin_otherwise_on_either_side():
    weights = FloatWeights.of({"transformer.h.0.c_fc.weight": torch.ones(2, 2), "wte.weight": torch.ones(2, 2)})
    assert weights.key_of("h.0.c_fc") == "transformer.h.0.c_fc.weight"
    assert weights.key_of("model.wte") == "wte.weight"
    with pytest.raises(ValueError, match="a weight of layer c_proj in the state dict, there is none"):
        weights.key_of("c_proj")
    twice = FloatWeights.of({"a.fc.weight": torch.ones(1), "b.fc.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"there is several: .'a.fc.weight', 'b.fc.weight'"):
        twice.key_of("fc")
    assert FloatWeights.of({"fc.weight": torch.ones(1), "a.fc.weight": torch.ones(1)}).key_of("fc") == "fc.weight"
    # an "up_proj" is not the end of "gate_up_proj"
    with pytest.raises(ValueError, match="there is none"):
        FloatWeights.of({"gate_up_proj.weight": torch.ones(1)}).key_of("up_proj")


def test_tied_weights_are_found_by_each_name():
    config = copy.deepcopy(tiny_llama().config)
    config.tie_word_embeddings = True
    model = type(tiny_llama())(config)
    weights = FloatWeights.of(model)
    assert torch.equal(weights.read("lm_head", model.lm_head.weight.detach()), model.model.embed_tokens.weight)


def test_weights_of_gpt2_are_turned():
    model = tiny_gpt2()
    matrix = model.transformer.h[0].attn.c_attn.weight.detach().T
    weights = FloatWeights.of(model)
    assert torch.equal(weights.read("transformer.h.0.attn.c_attn", matrix, fan_in_fan_out=True), matrix)


def test_wrong_weights_are_refused(tmp_path):
    weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    other = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    for state, message in (
        ({"fc.weight": other}, "are not what its base was made of: their cosine is"),
        ({"fc.weight": weight.T.contiguous()}, r"expected \(8, 6\) for layer fc, the state dict has \(6, 8\)"),
        ({"fc.weight": 10 * weight}, "are not what its base was made of: .* 10 times as long"),
        ({"fc.weight": weight.to(torch.float8_e4m3fn)}, "is torch.float8_e4m3fn, quantised itself"),
        ({"fc.weight": weight.to(torch.int8)}, "is torch.int8, quantised itself"),
        ({"fc.weight": torch.full((8, 6), float("nan"))}, "has NaN or Inf"),
        ({"fc.weight": torch.where(weight > 1, torch.inf, weight)}, "has NaN or Inf"),
        ({"fc.weight": torch.empty(8, 6, device="meta")}, "is on the meta device; load it first"),
    ):
        with pytest.raises(ValueError, match=message):
            FloatWeights.of(state).read("fc", weight)
    for nothing in (3, "", None):
        with pytest.raises(TypeError, match="float_weights: expected a folder"):
            FloatWeights.of(nothing)
    with pytest.raises(TypeError, match="'a' is a int"):
        FloatWeights.of({"a": 1})
    with pytest.raises(FileNotFoundError, match="there are no safetensors"):
        FloatWeights.of(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        FloatWeights.of(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"fc.weight": "gone.safetensors"}}')
    with pytest.raises(FileNotFoundError, match=r"files that are not there: .'gone.safetensors'"):
        FloatWeights.of(tmp_path)


def test_damaged_folders_are_refused_before_anything_is_read(saved):
    index = saved / "model.safetensors.index.json"
    whole = index.read_text()
    listed = json.loads(whole)["weight_map"]
    elsewhere = json.dumps({"weight_map": {**listed, f"{LAYER}.weight": "model-0.safetensors"}})
    for text, message in (
        ("{", "is no index of safetensors: JSONDecodeError"),
        ('{"metadata": {}}', "is no index of safetensors: KeyError"),
        ("[]", "is no index of safetensors: TypeError"),
        (elsewhere, f"says that {LAYER}.weight is in model-0.safetensors, which does not hold it"),
    ):
        index.write_text(text)
        with pytest.raises(ValueError, match=f"float_weights: .*{message}"):
            FloatWeights.of(saved)
    index.write_text(whole)
    file = saved / "model-1.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"model-1.safetensors is damaged or no safetensors file"):
        FloatWeights.of(saved)
    file.write_bytes(content)
    index.unlink()
    (saved / "again.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"again.safetensors and .*model-1.safetensors both hold .*; name the file"):
        FloatWeights.of(saved)


def test_a_model_that_is_nowhere_is_said_to_be(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="float_weights: there is no folder no/such-model"):
        FloatWeights.of("no/such-model")


# --- weights in packed integers, as GPTQ and AWQ keep them

BITS, GROUP, EACH = 4, 16, 8  # bits of a weight, inputs that share a scale, weights in an int32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the outputs in an int32


def quantised_parts(weight):  # (out, in) -> codes (in, out), zeros and scales (in / group, out)
    groups = weight.T.reshape(-1, GROUP, len(weight))
    low, high = groups.amin(1), groups.amax(1)
    scales = (high - low) / (2**BITS - 1)
    zeros = (-low / scales).round()
    codes = (groups / scales[:, None] + zeros[:, None]).round().clamp(0, 2**BITS - 1)
    return codes.reshape(weight.T.shape).to(torch.int64), zeros.clamp(0, 2**BITS - 1).to(torch.int64), scales


def packed(values, order=range(EACH)):  # (n, m) -> (n, m / 8) int32
    shifts = torch.tensor([BITS * order.index(i) for i in range(EACH)])
    sums = (values.reshape(len(values), -1, EACH) << shifts).sum(-1)
    return torch.where(sums >= 2**31, sums - 2**32, sums).to(torch.int32)


def unpacked(values, order=range(EACH)):  # (n, m / 8) int32 -> (n, m)
    shifts = torch.tensor([BITS * order.index(i) for i in range(EACH)])
    return ((values[..., None] >> shifts) & (2**BITS - 1)).flatten(1)


class Integers(nn.Module):
    """A layer of GPTQ's or AWQ's: integers that say nothing to whoever does not know how they are packed."""

    def __init__(self, source, kind):
        super().__init__()
        codes, zeros, scales = quantised_parts(source.weight)
        self.kind, self.bias = kind, source.bias
        self.register_buffer("scales", scales)
        if kind == "gptq":  # eight inputs in an int32; zeros less one
            self.register_buffer("qweight", packed(codes.T.contiguous()).T.contiguous())
            self.register_buffer("qzeros", packed((zeros - 1) % 2**BITS))
        else:  # eight outputs in an int32, in an order of its own
            self.register_buffer("qweight", packed(codes, AWQ_ORDER))
            self.register_buffer("qzeros", packed(zeros, AWQ_ORDER))
        self.expected = ((codes - zeros.repeat_interleave(GROUP, 0)) * scales.repeat_interleave(GROUP, 0)).T

    def forward(self, x):
        return nn.functional.linear(x, self.expected.to(x.dtype), self.bias)


def dequantized(name, layer):
    if layer.kind == "gptq":
        codes, zeros = unpacked(layer.qweight.T.contiguous()).T, (unpacked(layer.qzeros) + 1) % 2**BITS
    else:
        codes, zeros = unpacked(layer.qweight, AWQ_ORDER), unpacked(layer.qzeros, AWQ_ORDER)
    return ((codes - zeros.repeat_interleave(GROUP, 0)) * layer.scales.repeat_interleave(GROUP, 0)).T


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_packed_integers_are_read_by_a_callable_and_by_unit_vectors(kind):
    source = linear()
    module = Integers(source, kind)
    assert (module.expected - source.weight).abs().max() <= 0.51 * module.scales.max()
    assert torch.equal(base(module).read(dequantized), module.expected)
    # Of unit vectors: the bias is added and taken off again.
    rounding = 4 * UNIT * (module.expected.abs().max() + source.bias.abs().max())
    assert (base(module).read() - module.expected).abs().max() <= rounding
    with pytest.raises(ValueError, match="dequantize: what it returned for layer it"):
        base(module).read(lambda name, layer: dequantized(name, layer).roll(1, 0))
