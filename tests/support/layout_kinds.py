"""Layers laid out as those of libraries that are not installed here: written after their layout, not the libraries.

Each keeps its library's class names, attributes and forward, as far as an initialisation meets them.
"""

import torch
from torch import nn


class LoraInjectedLinear(nn.Module):  # cloneofsimo/lora, lora_diffusion/lora.py
    def __init__(self, base, r=4, scale=1.0):
        super().__init__()
        self.r, self.linear, self.scale = r, base, scale
        self.dropout, self.selector = nn.Dropout(0.1), nn.Identity()
        self.lora_down = nn.Linear(base.in_features, r, bias=False)
        self.lora_up = nn.Linear(r, base.out_features, bias=False)
        nn.init.zeros_(self.lora_up.weight)

    def forward(self, x):
        return self.linear(x) + self.dropout(self.lora_up(self.selector(self.lora_down(x)))) * self.scale


class LoraInjectedConv2d(nn.Module):  # the same
    def __init__(self, base, r=4, scale=1.0):
        super().__init__()
        self.r, self.conv, self.scale = r, base, scale
        self.dropout, self.selector = nn.Dropout(0.1), nn.Identity()
        self.lora_down = nn.Conv2d(
            base.in_channels, r, base.kernel_size, base.stride, base.padding, base.dilation, bias=False
        )
        self.lora_up = nn.Conv2d(r, base.out_channels, 1, bias=False)
        nn.init.zeros_(self.lora_up.weight)

    def forward(self, x):
        return self.conv(x) + self.dropout(self.lora_up(self.selector(self.lora_down(x)))) * self.scale


class LoRAModule(nn.Module):  # kohya sd-scripts, networks/lora.py
    def __init__(self, base, lora_dim=4, alpha=8):
        super().__init__()
        self.lora_dim, self.scale, self.multiplier = lora_dim, alpha / lora_dim, 1.0
        if isinstance(base, nn.Conv2d):
            self.lora_down = nn.Conv2d(
                base.in_channels, lora_dim, base.kernel_size, base.stride, base.padding, bias=False
            )
            self.lora_up = nn.Conv2d(lora_dim, base.out_channels, 1, bias=False)
        else:
            self.lora_down = nn.Linear(base.in_features, lora_dim, bias=False)
            self.lora_up = nn.Linear(lora_dim, base.out_features, bias=False)
        self.register_buffer("alpha", torch.tensor(alpha))
        nn.init.zeros_(self.lora_up.weight)
        self.org_module = base

    def apply_to(self):
        self.org_forward = self.org_module.forward
        self.org_module.forward = self.forward
        del self.org_module

    def forward(self, x):
        return self.org_forward(x) + self.lora_up(self.lora_down(x)) * self.multiplier * self.scale


class _LoRALayer(nn.Module):  # LoRA-ViT, lora.py
    def __init__(self, base, r=4, alpha=9):
        super().__init__()
        self.w, self.r, self.alpha = base, r, alpha
        self.w_a = nn.Linear(base.in_features, r, bias=False)
        self.w_b = nn.Linear(r, base.out_features, bias=False)
        nn.init.zeros_(self.w_b.weight)

    def forward(self, x):
        return self.w(x) + (self.alpha // self.r) * self.w_b(self.w_a(x))


class _LoRA_qkv_timm(nn.Module):  # the same
    def __init__(self, base, r=4, alpha=8):
        super().__init__()
        self.qkv, self.r, self.alpha, self.dim = base, r, alpha, base.out_features // 3
        for part in "qv":
            self.add_module(f"linear_a_{part}", nn.Linear(base.in_features, r, bias=False))
            self.add_module(f"linear_b_{part}", nn.Linear(r, self.dim, bias=False))
            nn.init.zeros_(self.get_submodule(f"linear_b_{part}").weight)

    def forward(self, x):
        qkv = self.qkv(x)
        qkv[..., : self.dim] += (self.alpha // self.r) * self.linear_b_q(self.linear_a_q(x))
        qkv[..., -self.dim :] += (self.alpha // self.r) * self.linear_b_v(self.linear_a_v(x))
        return qkv


class LoRALinear(nn.Linear):  # torchtitan, components/lora.py
    @classmethod
    def from_linear(cls, linear, rank=4, alpha=8.0):
        linear.__class__ = cls
        linear._lora_scaling = alpha / rank
        linear.lora_a = nn.Linear(linear.in_features, rank, bias=False)
        linear.lora_b = nn.Linear(rank, linear.out_features, bias=False)
        nn.init.zeros_(linear.lora_b.weight)
        return linear

    def forward(self, x):
        return super().forward(x) + self._lora_scaling * self.lora_b(self.lora_a(x))


class LinearLoRA(nn.Linear):  # NeMo Automodel, components/_peft/lora.py; as its Triton class, which never calls A
    @classmethod
    def patch(cls, linear, dim=4, alpha=8):
        linear.__class__ = type("PatchedLinearLoRA", (cls, nn.Linear), {})
        linear.dim, linear.scale = dim, alpha / dim
        linear.lora_A = nn.Linear(linear.in_features, dim, bias=False)
        linear.lora_B = nn.Linear(dim, linear.out_features, bias=False)
        nn.init.zeros_(linear.lora_B.weight)
        return linear

    def forward(self, x):
        base = nn.functional.linear(x, self.weight, self.bias)
        return base + self.scale * (x @ self.lora_A.weight.T @ self.lora_B.weight.T)


class ParallelLinearAdapter(nn.Module):  # Megatron-Bridge, peft/utils.py, with one tensor-parallel worker
    def __init__(self, width, out, dim=4, alpha=8):
        super().__init__()
        self.dim, self.alpha = dim, alpha
        self.linear_in, self.linear_out = nn.Linear(width, dim, bias=False), nn.Linear(dim, out, bias=False)
        nn.init.zeros_(self.linear_out.weight)

    def forward(self, x):
        return self.linear_out(self.linear_in(x)) * (self.alpha / self.dim)


class MegatronLoRALinear(nn.Module):  # Megatron-Bridge, peft/lora_layers.py
    def __init__(self, base):
        super().__init__()
        self.to_wrap, self.adapter = base, ParallelLinearAdapter(base.in_features, base.out_features)

    def forward(self, x):
        return self.to_wrap(x) + self.adapter(x)
