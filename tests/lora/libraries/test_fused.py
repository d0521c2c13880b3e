"""Fused forwards laid out as Unsloth's and axolotl's: PEFT layers whose weights are read and which are never called."""

import copy
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from eva_lora import EvaConfig, eva_initialize
from support.bounds import EXACT_CAPTURES, require_as_near
from support.models import captured_share, scatter

pytestmark = pytest.mark.filterwarnings("ignore:EVA stopped at")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(16, 16, bias=False) for _ in range(4))

    def forward(self, x):
        q, k, v = (p(x) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(torch.softmax(q @ k.mT / 4, -1) @ v)


class FusedAttention(Attention):
    takes_module = False

    def forward(self, x):
        first = (self,) if self.takes_module else ()
        q, k, v = self.apply_qkv(*first, x)
        return self.apply_o(*first, torch.softmax(q @ k.mT / 4, -1) @ v)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(16, 24, bias=False), nn.Linear(16, 24, bias=False)
        self.down_proj = nn.Linear(24, 16, bias=False)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.self_attn, self.mlp = Attention(), Mlp()

    def forward(self, x):
        x = x + self.self_attn(x)
        return x + self.mlp(x)


def product(x, layer):
    """As the fused kernels: the weights of the layer, and never its forward."""
    out = x @ layer.base_layer.weight.T
    return out + layer.scaling["default"] * (x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T)


def apply_lora_qkv(self, x):
    return [product(x, layer) for layer in (self.q_proj, self.k_proj, self.v_proj)]


def apply_lora_o(self, x):
    return product(x, self.o_proj)


def apply_lora_mlp_swiglu(self, x):
    return product(nn.functional.silu(product(x, self.gate_proj)) * product(x, self.up_proj), self.down_proj)


def adapted():
    return get_peft_model(Block(), LoraConfig(r=4, target_modules=r".*_proj"))


def fuse(model, library):
    block = model.get_base_model()
    attention, mlp = block.self_attn, block.mlp
    attention.__class__ = FusedAttention
    attention.takes_module = library == "Unsloth"
    for name, function in (("apply_qkv", apply_lora_qkv), ("apply_o", apply_lora_o)):
        setattr(attention, name, function if library == "Unsloth" else types.MethodType(function, attention))
    mlp.forward = types.MethodType(apply_lora_mlp_swiglu, mlp)


@pytest.mark.parametrize("library", ["Unsloth", "axolotl"])
def test_every_layer_under_a_fused_forward_is_captured(library):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(8, 20, 16, generator=generator) * 0.8 ** torch.arange(16) for _ in range(3)]
    plain, fused = adapted(), adapted()
    fuse(fused, library)
    fused_forwards = {name: dict(vars(m)) for name, m in fused.named_modules()}
    base, seen = Block(), {}
    handles = [
        m.register_forward_pre_hook(lambda m, args, n=n: seen.setdefault(n, []).append(args[0].flatten(0, 1)))
        for n, m in base.named_modules()
        if isinstance(m, nn.Linear)
    ]
    with torch.no_grad():
        for batch in batches:
            base(batch)
    for handle in handles:
        handle.remove()
    reports = [eva_initialize(m, batches, EvaConfig(max_batches=3), progress=False) for m in (plain, fused)]
    assert reports[0].ranks == reports[1].ranks
    assert set(seen) == set(reports[1].ranks)
    for name, rows in seen.items():
        a = fused.get_base_model().get_submodule(name).lora_A["default"].weight.detach()
        assert captured_share(a, scatter(torch.cat(rows).double())) >= EXACT_CAPTURES
    for name, module in fused.named_modules():  # what the library hung on the modules is there again
        for attribute in ("apply_qkv", "apply_o", "forward"):
            assert vars(module).get(attribute) == fused_forwards[name].get(attribute)
    with torch.no_grad():
        found, plain = fused(batches[0]), base(batches[0])
        require_as_near(found, plain, base.double()(batches[0].double()))


def test_fused_forwards_come_back_after_an_error():
    model = adapted()
    fuse(model, "axolotl")
    before = copy.copy(vars(model.get_base_model().mlp))
    with pytest.raises(ValueError, match="expected an input of width 16"):
        eva_initialize(model, [torch.randn(2, 3, 17)], progress=False)
    assert vars(model.get_base_model().mlp)["forward"] == before["forward"]


class LinearAttention(nn.Module):
    """As axolotl's of Qwen3.5: it asks for fused forwards, and calls its projections where there are none."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        for name in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"):
            setattr(self, name, nn.Linear(16, 16, bias=False))

    def forward(self, x):
        found = self.apply_in_proj_fused(x) if hasattr(self, "apply_in_proj_fused") else None
        found = found or {name: layer(x) for name, layer in self.named_children() if name.startswith("in_")}
        out = getattr(self, "apply_out_proj", self.out_proj)
        return out(found["in_proj_qkv"] * torch.sigmoid(found["in_proj_z"]) + found["in_proj_b"] * found["in_proj_a"])


class SharedKeys(nn.Module):
    """As axolotl's attention without ``v_proj``."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.q_proj, self.k_proj, self.o_proj = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.v_proj = None

    def forward(self, x):
        q, k, v = self.apply_qkv(x) if hasattr(self, "apply_qkv") else (self.q_proj(x), *[self.k_proj(x)] * 2)
        return self.o_proj(torch.softmax(q @ k.mT / 4, -1) @ v)


def fuse_linear_attention(attention):
    attention.apply_in_proj_fused = lambda x: {
        name: product(x, layer) for name, layer in attention.named_children() if name.startswith("in_")
    }
    attention.apply_out_proj = lambda x: product(x, attention.out_proj)


def fuse_shared_keys(attention):
    attention.apply_qkv = lambda x: [product(x, attention.q_proj), *[product(x, attention.k_proj)] * 2]


@pytest.mark.parametrize(
    ("kind", "fuse"), [(LinearAttention, fuse_linear_attention), (SharedKeys, fuse_shared_keys)],
)  # fmt: skip
def test_what_else_axolotl_fuses_is_initialised_as_without(kind, fuse):
    batches = [torch.randn(8, 20, 16, generator=torch.Generator().manual_seed(0)) * 0.8 ** torch.arange(16)]
    plain, fused = (get_peft_model(kind(), LoraConfig(r=4, target_modules=r".*_proj.*")) for _ in range(2))
    fuse(fused.get_base_model())
    reports = [eva_initialize(m, batches, EvaConfig(max_batches=1), progress=False) for m in (plain, fused)]
    assert reports[0].ranks == reports[1].ranks
    expected = plain.state_dict()
    for name, value in fused.state_dict().items():
        assert value.equal(expected[name])
