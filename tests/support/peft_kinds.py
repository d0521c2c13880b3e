"""PEFT's kinds of LoRA layer, for the suite over kinds."""

import functools

import peft
import torch
import transformers
from torch import nn
from transformers import BertConfig, BertModel, MixtralConfig, MixtralForCausalLM, ViTConfig, ViTModel

from support.kinds import Kind, attention, experts_record, flat, patches, watched
from support.models import LINEARS, load_mobilenet, tiny_gpt2, tiny_llama, token_batches

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
STACKED_EXPERTS = "transformers>=5.3"  # the first that says of a stack of experts how it is gated and laid out


class Convolutions(nn.Module):
    """A stride, an even kernel and padding; then dilation with padding "same", if the kind has it."""

    def __init__(self, dimensions, dilation=1):
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
        self.first = conv(3, 8, (4, 3, 2)[:dimensions], stride=2, padding=1)
        self.second = conv(8, 8, 3, padding="same", dilation=dilation)
        self.pointwise = conv(8, 6, 1)
        self.branch = conv(8, 6, 1)

    def forward(self, x):
        x = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.pointwise(x) + self.branch(x)


class Attentive(nn.Module):
    """Self-attention, then attention to another sequence; ``nn.MultiheadAttention`` twice."""

    def __init__(self):
        super().__init__()
        self.own = nn.MultiheadAttention(16, 4, batch_first=True)
        self.other = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x, memory):
        x = self.own(x, x, x, need_weights=False)[0] + x
        return self.other(x, memory, memory)[0]


class TwoLinears(nn.Module):
    """For base layers of other types than ``nn.Linear``, which ``swap`` makes of them."""

    def __init__(self, swap=lambda linear: linear):
        super().__init__()
        self.first, self.second = swap(nn.Linear(64, 64)), swap(nn.Linear(64, 64))

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def seeded(make):
    @functools.wraps(make)
    def build():
        torch.manual_seed(0)
        return make()

    return build


def tensors(*shape, count=4):
    generator = torch.Generator().manual_seed(1)
    scale = torch.linspace(2, 0.2, shape[-1])
    return [torch.randn(*shape, generator=generator) * scale for _ in range(count)]


def every(names, rows=flat):
    return lambda base, batches: watched(base, batches, list(names), rows)


def every_linear(base, batches):
    names = [n for n, m in base.named_modules() if n.rpartition(".")[2] in LINEARS]
    return watched(base, batches, names, flat)


def ending(*ends, rows=flat):
    return lambda base, batches: watched(
        base, batches, [n for n, _ in base.named_modules() if n.rpartition(".")[2] in ends], rows
    )


def image_batches(size, count=3, channels=3):
    generator = torch.Generator().manual_seed(2)
    smooth = nn.functional.interpolate
    small = [torch.rand(4, channels, size // 4, size // 4, generator=generator) for _ in range(count)]
    return [{"pixel_values": smooth(x, size=(size, size), mode="bilinear")} for x in small]


def two_adapters(kind):
    model = peft.get_peft_model(kind.base(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS))
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    return model


def on_meta(kind):
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS, init_lora_weights="eva")
    return peft.get_peft_model(kind.base(), config, low_cpu_mem_usage=True)


def quantised(swap_name):
    def swap(linear):
        if swap_name == "hqq":
            from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

            config = BaseQuantizeConfig(nbits=4, group_size=16)
            return HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")
        import bitsandbytes as bnb

        if swap_name == "8-bit":
            new = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
        else:
            new = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
            new.support_avx512bf16_for_cpu = False  # after a forward in eval mode it could not train any more
        new.load_state_dict(linear.state_dict())
        return new.to("cpu")

    @seeded
    def build():
        model = TwoLinears(swap)
        if swap_name in ("4-bit", "8-bit"):
            setattr(model, f"is_loaded_in_{swap_name.replace('-', '')}", True)
        return model

    return build


def silu_gate(module, up):
    gate, value = up.chunk(2)
    return nn.functional.silu(gate) * value


def gpt_oss_gate(module, up):
    gate, value = up[::2].clamp(max=module.limit), up[1::2].clamp(-module.limit, module.limit)
    return (value + 1) * gate * torch.sigmoid(gate * module.alpha)


def small(config, **options):
    return config(
        **{
            "vocab_size": 97, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2, "max_position_embeddings": 64,
            **options,
        }
    )  # fmt: skip


@seeded
def mixtral():
    return MixtralForCausalLM(small(MixtralConfig, num_local_experts=4))


@seeded
def qwen_moe():
    config = small(transformers.Qwen3MoeConfig, num_experts=4, moe_intermediate_size=24, head_dim=8)
    return transformers.Qwen3MoeForCausalLM(config)


@seeded
def gpt_oss():
    model = transformers.GptOssForCausalLM(small(transformers.GptOssConfig, num_local_experts=4, head_dim=8))
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "router.weight")):  # zeros at first, which would route everything alike
            nn.init.normal_(parameter, std=0.5)
    return model


@seeded
def bert():
    config = BertConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    return BertModel(config)


@seeded
def vit():
    return ViTModel(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=16,
            patch_size=4,
        )
    )


@seeded
def unet():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip


def unet_batches():
    generator = torch.Generator().manual_seed(3)
    return [
        {
            "sample": torch.randn(6, 4, 8, 8, generator=generator),
            "timestep": torch.randint(0, 1000, (6,), generator=generator),
            "encoder_hidden_states": torch.randn(6, 7, 24, generator=generator),
        }
        for _ in range(6)
    ]


def unet_record(base, batches):
    names = [n for n, _ in base.named_modules() if n.endswith((".to_q", ".to_k", ".to_out.0", ".conv1", ".conv2"))]
    mixed = lambda m, args, kwargs: (patches if isinstance(m, nn.Conv2d) else flat)(m, args, kwargs)  # noqa: E731
    return watched(base, batches, names, mixed)


def mobilenet_record(base, batches):
    names = [n for n, m in base.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    return watched(base, batches, [n for n in names if mobilenet_target(n)], patches)


def mobilenet_target(name):
    return name.startswith(("conv_stem.first_conv", "layer.4.", "layer.12.")) and not name.endswith(
        "conv_3x3.convolution"
    )


def bfloat16_llama():
    return tiny_llama().to(torch.bfloat16)


LLAMA = {"base": tiny_llama, "batches": token_batches, "record": every_linear}
MOE = {
    "batches": lambda: token_batches(shape=(4, 32)),
    "options": {"target_modules": [], "target_parameters": EXPERTS},
    "needs": STACKED_EXPERTS,
}
CONVS = ["first", "second", "pointwise", "branch"]


def conv_kind(dimensions, dilation=1):
    shape = {1: (8, 3, 40), 2: (6, 3, 14, 12), 3: (4, 3, 8, 8, 8)}[dimensions]
    return Kind(
        f"Conv{dimensions}d" + (" with dilation" if dilation > 1 else ""),
        seeded(lambda: Convolutions(dimensions, dilation)),
        lambda: tensors(*shape),
        every(CONVS, patches),
        {"target_modules": CONVS},
    )


def quantised_kind(name):
    return Kind(
        f"base in {name}", quantised(name), lambda: tensors(5, 16, 64), every(["first", "second"]),
        {"target_modules": ["first", "second"]},
    )  # fmt: skip


KINDS = [
    Kind("Linear", **LLAMA, options={"target_modules": LINEARS}),
    Kind("DoRA", **LLAMA, options={"target_modules": LINEARS, "use_dora": True}),
    Kind("rsLoRA", **LLAMA, options={"target_modules": LINEARS, "use_rslora": True}),
    Kind("two adapters", **LLAMA, adapt=two_adapters),
    Kind("A on the meta device", **LLAMA, adapt=on_meta),
    Kind("bfloat16 base", bfloat16_llama, token_batches, every_linear, {"target_modules": LINEARS}),
    Kind(
        "Conv1D of transformers", tiny_gpt2, token_batches, ending("c_attn", "c_fc"),
        {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    ),
    conv_kind(1), conv_kind(2), conv_kind(3), conv_kind(2, dilation=2),
    Kind(
        "MultiheadAttention", seeded(Attentive),
        lambda: [{"x": x, "memory": y} for x, y in zip(tensors(4, 10, 16), tensors(4, 7, 16)[::-1], strict=True)],
        every(["own", "other"], attention), {"target_modules": ["own", "other"]},
        computes_its_base=False,  # PEFT merges B A into the weights for a call and takes it out again
    ),
    Kind("experts of Mixtral", mixtral, record=experts_record(silu_gate), **MOE),
    Kind("experts of Qwen3-MoE", qwen_moe, record=experts_record(silu_gate), **MOE),
    Kind("experts of GPT-OSS", gpt_oss, record=experts_record(gpt_oss_gate, transposed=True, bias=True), **MOE),
    Kind(
        "parameters of Linear and of a router", mixtral, MOE["batches"],
        lambda b, batches: {f"{n}.weight": r for n, r in ending("q_proj", "gate")(b, batches).items()},
        {"target_modules": [], "target_parameters": ["q_proj.weight", "gate.weight"]}, needs=STACKED_EXPERTS,
    ),
    quantised_kind("4-bit"), quantised_kind("8-bit"), quantised_kind("hqq"),
    Kind(
        "encoder with a pooler", bert, lambda: token_batches(10), ending("query", "dense"),
        {"target_modules": ["query", "dense"]},
    ),
    Kind(
        "vision transformer", vit, lambda: image_batches(16), ending("q_proj", "o_proj", "fc1", "fc2"),
        {"target_modules": ["q_proj", "o_proj", "fc1", "fc2"]}, needs="transformers>=5.9",  # where they are called so
    ),
    Kind(
        "MobileNetV2", load_mobilenet, lambda: image_batches(64, count=2), mobilenet_record,
        {"target_modules": r"(conv_stem\.first_conv|layer\.(4|12))\..*(?<!3x3\.)convolution"},
    ),
    Kind(
        "diffusers UNet", unet, unet_batches, unet_record,
        {"target_modules": r".*(\.to_q|\.to_k|\.to_out\.0|\.conv1|\.conv2)"}, needs="diffusers",
    ),
]  # fmt: skip
