"""What is peculiar to single kinds of PEFT layer."""

import peft
import pytest
import torch
from torch import nn

from eva_lora import EvaConfig, apply, collect, eva_initialize, plan
from support.bounds import EXACT_CAPTURES
from support.kinds import attention, call, watched
from support.models import captured_share, lora_a_of, scatter, token_batches
from support.peft_kinds import EXPERTS, STACKED_EXPERTS, Attentive, mixtral, seeded, tensors, unet, unet_batches
from support.versions import needs

pytestmark = pytest.mark.filterwarnings("ignore:EVA stopped at")

LENGTHS = torch.tensor([10, 4, 7, 9])


class Encoder(nn.Module):
    """PyTorch's own encoder, which packs padded batches into nested tensors in eval mode."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x, attention_mask):
        return self.encoder(x, src_key_padding_mask=~attention_mask)


def padded():
    mask = torch.arange(10) < LENGTHS[:, None]
    return [{"x": x, "attention_mask": mask} for x in tensors(4, 10, 16, count=3)]


def test_an_encoder_that_packs_its_padding_is_captured():
    base, data = seeded(Encoder)(), padded()
    config = peft.LoraConfig(r=4, target_modules=["self_attn", "linear1", "linear2"])
    model = peft.get_peft_model(base, config)
    assert base.encoder.use_nested_tensor
    report = eva_initialize(model, data, EvaConfig(max_batches=3), progress=False)
    assert base.encoder.use_nested_tensor
    assert report.num_rows == 3 * int(LENGTHS.sum())
    kept = torch.cat([batch["x"][batch["attention_mask"]] for batch in data]).double()
    first = base.encoder.layers[0].self_attn
    assert captured_share(first.lora_A["default"].weight.detach(), scatter(kept)) >= EXACT_CAPTURES
    mixed = []
    for batch in data:
        length_of = zip(batch["x"], LENGTHS.tolist(), strict=True)  # one sequence at a time needs no mask
        for x, length in length_of:
            alone = x[None, :length]
            mixed.append(attention(first.get_base_layer(), (alone, alone, alone), {})[1])
    a = first.base_layer.out_proj.lora_A["default"].weight.detach()
    assert captured_share(a, scatter(torch.cat(mixed).detach())) >= EXACT_CAPTURES


class Called(nn.Module):
    """One layer called by keyword, with rows alone, and with a strided view."""

    def __init__(self):
        super().__init__()
        self.keyword, self.rows, self.strided = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.keyword(x=x).mean() + self.rows(x[:, 0]).mean() + self.strided(x.transpose(0, 1)[::2]).mean()


def test_layers_are_captured_however_they_are_called():
    class Keyword(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    base = seeded(Called)()
    base.keyword = Keyword(8, 8)
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=["keyword", "rows", "strided"]))
    data = tensors(20, 6, 8, count=3)
    eva_initialize(model, data, EvaConfig(max_batches=3, tau=1.0), progress=False)
    x = torch.cat(data).double()
    seen = {"keyword": x, "rows": x[:, 0], "strided": x[:, ::2]}
    for name, a in lora_a_of(model).items():
        assert captured_share(a, scatter(seen[name].reshape(-1, 8))) >= EXACT_CAPTURES


class SequenceFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4)

    def forward(self, x, attention_mask):
        x = x.transpose(0, 1)
        return self.attention(x, x, x)[0]


def test_a_mask_fits_attention_that_has_its_sequences_first():
    x = tensors(6, 6, 16, count=1)[0]  # as many tokens as sequences: a transposed mask would go unnoticed
    mask = torch.arange(6) < torch.tensor([6, 2, 3, 6, 5, 1])[:, None]
    model = peft.get_peft_model(seeded(SequenceFirst)(), peft.LoraConfig(r=4, target_modules=["attention"]))
    report = eva_initialize(model, [{"x": x, "attention_mask": mask}], EvaConfig(max_batches=1), progress=False)
    assert report.num_rows == int(mask.sum())
    a = model.base_model.model.attention.lora_A["default"].weight.detach()
    assert captured_share(a, scatter(x[mask].double())) >= EXACT_CAPTURES


def attentive():
    return seeded(Attentive)(), {"target_modules": ["own", "other"]}


def experts():
    return mixtral(), {"target_modules": [], "target_parameters": EXPERTS}


NESTED = pytest.mark.parametrize("make", [attentive, pytest.param(experts, marks=needs(STACKED_EXPERTS))])


@NESTED
def test_rank_zero_keeps_other_adapters_in_nested_layers(make):
    base, targets = make()
    data = token_batches(2) if make is experts else [{"x": x, "memory": x} for x in tensors(3, 8, 16, count=2)]
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, **targets))
    model.add_adapter("other", peft.LoraConfig(r=2, init_lora_weights=False, **targets))
    theirs = {n: p.clone() for n, p in model.named_parameters() if n.endswith(".other.weight")}
    model.eval()
    with torch.no_grad():
        expected = call(
            model, data[0]
        )  # PEFT merges into an attention's weights and out again, with rounding of its own
    eva_plan = plan(collect(model, data, EvaConfig(max_batches=2), progress=False), budget=1)
    assert sorted(eva_plan.ranks.values())[-1] == 1
    apply(model, eva_plan)
    with torch.no_grad():
        assert torch.equal(call(model, data[0]), expected)
    ours = {n for n, p in model.named_parameters() if ".default." in n and "lora_A" in n}
    assert len(ours) == (2 if make is attentive else 1)  # an attention has two matrices A
    now = {n: p for n, p in model.named_parameters() if n.endswith(".other.weight")}
    assert now.keys() == theirs.keys()
    assert all(torch.equal(p, theirs[n]) for n, p in now.items())


@NESTED
def test_a_failing_apply_restores_nested_layers(monkeypatch, make):
    base, targets = make()
    data = token_batches(2) if make is experts else [{"x": x, "memory": x} for x in tensors(3, 8, 16, count=2)]
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, **targets))
    eva_plan = plan(collect(model, data, EvaConfig(max_batches=2), progress=False), budget=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    from eva_lora.adapters.peft_writing import PlanWriter

    original, calls = PlanWriter._remove, []

    def sometimes(self, *args):
        calls.append(args)
        original(self, *args)
        if len(calls) == list(eva_plan.ranks.values()).count(0):  # the last one
            raise MemoryError

    monkeypatch.setattr(PlanWriter, "_remove", sometimes)
    with pytest.raises(MemoryError):
        apply(model, eva_plan)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    with torch.no_grad():
        call(model, data[0])


def test_the_pass_leaves_4_bit_weights_as_they_are_packed():
    import bitsandbytes as bnb

    class Quantised(nn.Module):
        def __init__(self):
            super().__init__()
            linear, self.layer = nn.Linear(64, 64), bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32)
            self.layer.load_state_dict(linear.state_dict())

        def forward(self, x):
            return self.layer(x)

    base = Quantised().to("cpu")
    base.layer.support_avx512bf16_for_cpu = True  # as on a CPU that has the instructions
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["layer"]))
    inner = base.layer.base_layer if hasattr(base.layer, "base_layer") else base.layer
    packed = inner.weight.data.clone()
    eva_initialize(model, tensors(4, 16, 64), EvaConfig(max_batches=4), progress=False)
    assert inner.support_avx512bf16_for_cpu
    assert inner.weight.shape == packed.shape
    assert torch.equal(inner.weight.data, packed)
    model.train()
    model(tensors(4, 16, 64)[0]).square().mean().backward()


@needs("diffusers")
def test_an_adapter_that_diffusers_added_is_initialised():
    model = unet()
    model.add_adapter(peft.LoraConfig(r=4, init_lora_weights="gaussian", target_modules=["to_q", "to_k", "to_out.0"]))
    data = unet_batches()[:3]  # as many as the pass takes
    with torch.no_grad():
        expected = call(unet().eval(), data[0])
    report = eva_initialize(model, data, EvaConfig(max_batches=3), progress=False)
    names = [name for name in report.ranks if name.endswith("to_q")]
    rows = watched(unet(), data, names, lambda m, args, kwargs: [args[0].double().flatten(0, 1)])
    for name in names:
        layer = model.get_submodule(name)
        if report.ranks[name]:
            assert captured_share(layer.lora_A["default"].weight.detach(), scatter(rows[name][0])) >= EXACT_CAPTURES
    with torch.no_grad():
        assert torch.equal(call(model.eval(), data[0]), expected)
