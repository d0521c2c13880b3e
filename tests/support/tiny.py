"""The smallest model that shares inputs, masks rows and calls a layer twice, and what a run of it is compared by."""

import hashlib
from dataclasses import fields

import peft
import torch
from torch import nn

WIDTH = 12


class Tiny(nn.Module):
    """Two blocks of q, k, v fed by one tensor and an MLP; the last layer is called twice."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in ("q", "k", "v", "up", "down")}) for _ in range(2)
        )

    def forward(self, x, attention_mask=None):  # (batch, tokens, WIDTH)
        for block in self.blocks:
            x = x + torch.tanh(block["q"](x) * block["k"](x) + block["v"](x))
            x = block["down"](torch.sin(9 * block["up"](x)))  # of another spectrum: ranks move
            x = x + block["down"](x)
        return x


def tiny_model(seed=0, rank=2, base_seed=0):
    torch.manual_seed(base_seed)
    base = Tiny()
    torch.manual_seed(seed)
    options = {"r": rank, "target_modules": ["q", "k", "v", "up", "down"], "init_lora_weights": True}
    return peft.get_peft_model(base, peft.LoraConfig(**options))


def tiny_batches(count=8, shape=(2, 9), seed=1):
    generator = torch.Generator().manual_seed(seed)
    scales = 0.6 ** torch.arange(WIDTH)
    return [
        {
            "x": torch.randn(*shape, WIDTH, generator=generator) * scales,
            "attention_mask": torch.rand(shape, generator=generator) < 0.8,
        }
        for _ in range(count)
    ]


def fingerprint_of(statistics):
    """A hash of everything in an ``EvaStatistics`` but what it took, to the last bit."""
    total = hashlib.sha256()
    for field in fields(statistics):
        if field.name == "inputs":
            for entry in statistics.inputs:
                for part in fields(entry):
                    value = getattr(entry, part.name)
                    total.update(value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode())
        elif field.name not in ("seconds", "peak_memory"):
            total.update(repr(getattr(statistics, field.name)).encode())
    return total.hexdigest()


def state_of(model):
    """Everything of a model that a run has to leave alone: weights, flags, hooks, switches, the config."""
    modules = dict(model.named_modules())
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_forward_pre_hooks_with_kwargs")
    weights = hashlib.sha256()
    for name, value in model.state_dict().items():
        weights.update(name.encode() + value.numpy().tobytes())
    return {
        "weights": weights.hexdigest(),
        "parameters": {name: (id(p), p.requires_grad) for name, p in model.named_parameters()},
        "modules": {name: id(module) for name, module in modules.items()},
        "training": {name: module.training for name, module in modules.items()},
        "checkpointing": {n: vars(m).get("gradient_checkpointing") for n, m in modules.items()},
        "hooks": {name: [list(getattr(module, table)) for table in hooks] for name, module in modules.items()},
        "switches": {n: m.disable_adapters for n, m in modules.items() if hasattr(m, "disable_adapters")},
        "ranks": {n: dict(m.r) for n, m in modules.items() if hasattr(m, "lora_A")},
        "config": {name: repr(vars(config)) for name, config in model.peft_config.items()},
        "grad": torch.is_grad_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "random": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
    }
