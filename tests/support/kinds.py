"""Kinds of LoRA layer that one suite checks: how to build each, what feeds it, and an independent record of that.

A kind of another library is a :class:`Kind` with its own ``adapt``, ``matrices`` and ``reload``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from support.versions import needs

Record = dict[str, list[torch.Tensor]]  # name of a layer in the base model -> rows (n, d) of each of its parts


@dataclass
class Kind:
    """One kind of layer in a small model.

    Attributes:
        name: Of the kind.
        base: Makes the base model, the same one every time.
        batches: What the loader yields.
        options: Of the ``LoraConfig``.
        record: From the base model and its batches, what every adapted layer is fed: written down independently
            of what is tested.
        adapt: From the base model to one with LoRA layers.
        config: Further options of EVA.
        computes_its_base: Whether the library's own model with B = 0 does, bit by bit, before EVA.
        step: What its ranks are multiples of.
        needs: A requirement that must be installed for it, such as "transformers>=5".
    """

    name: str
    base: Callable[[], nn.Module]
    batches: Callable[[], list[Any]]
    record: Callable[[nn.Module, list[Any]], Record]
    options: dict[str, Any] = field(default_factory=dict)
    adapt: Callable[["Kind"], nn.Module] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    computes_its_base: bool = True  # before EVA, bit by bit
    step: int = 1
    needs: str = "peft"
    removable = True

    def parameter(self):
        """Itself as the parameter of a test, by its name; skipped where what it needs is not installed."""
        return pytest.param(self, id=self.name, marks=needs(self.needs))

    def model(self) -> nn.Module:
        if self.adapt is not None:
            return self.adapt(self)
        return peft.get_peft_model(self.base(), peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **self.options}))

    def matrices(self, model: nn.Module) -> Record:
        """The matrices A of every layer, each (rank, d), by the names and parts of ``record``."""
        found: Record = {}
        for path, layer in model.get_base_model().named_modules():
            if not isinstance(layer, LoraLayer) or "default" not in layer.lora_A or path.endswith(".out_proj"):
                continue
            name, a = path.replace(".base_layer", ""), layer.lora_A["default"].weight.detach()
            if hasattr(layer, "parameter_name"):
                found[f"{name}.{layer.parameter_name}"] = list(a.chunk(layer.num_experts))
            elif isinstance(layer.get_base_layer(), nn.MultiheadAttention):
                found[name] = [a, layer.base_layer.out_proj.lora_A["default"].weight.detach()]
            else:
                found[name] = [a.flatten(1)]
        return found

    def second(self, model: nn.Module) -> list[nn.Parameter]:
        """Every B."""
        return [p for name, p in model.named_parameters() if p.requires_grad and "lora_B" in name]

    def trained(self, model: nn.Module) -> list[nn.Parameter]:
        return [p for p in model.parameters() if p.requires_grad]

    def save(self, model: nn.Module, eva_plan, folder) -> None:
        model.save_pretrained(folder)

    def reload(self, folder) -> nn.Module:
        return peft.PeftModel.from_pretrained(self.base(), folder)


def call(model: nn.Module, batch: Any) -> torch.Tensor:
    """The model's output as one tensor."""
    result = model(**batch) if isinstance(batch, dict) else model(batch)
    if isinstance(result, torch.Tensor):
        return result
    names = ("logits", "sample", "pooler_output", "last_hidden_state")
    return next(getattr(result, n) for n in names if getattr(result, n, None) is not None)


def watched(base: nn.Module, batches: list[Any], names: list[str], rows: Callable[[nn.Module, tuple, dict], Any]):
    """Run the base model, and collect what ``rows`` makes of every call of the modules named."""
    pieces: dict[str, list[list[torch.Tensor]]] = {name: [] for name in names}
    handles = [
        base.get_submodule(name).register_forward_pre_hook(
            lambda module, args, kwargs, name=name: pieces[name].append(rows(module, args, kwargs)), with_kwargs=True
        )
        for name in names
    ]
    base.eval()
    with torch.no_grad():
        for batch in batches:
            call(base, batch)
    for handle in handles:
        handle.remove()
    return {
        n: [torch.cat([call[p] for call in p_calls]) for p in range(len(p_calls[0]))] for n, p_calls in pieces.items()
    }


def flat(module, args, kwargs):
    x = args[0] if args else kwargs["hidden_states"]
    return [x.double().reshape(-1, x.shape[-1])]


def patches(module, args, kwargs):
    """Patches by a convolution whose every output channel copies one value of the patch."""
    x = args[0].double()
    size = module.in_channels * torch.Size(module.kernel_size).numel()
    kernel = torch.eye(size, dtype=torch.float64).view(size, module.in_channels, *module.kernel_size)
    convolve = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}[len(module.kernel_size)]
    out = convolve(x, kernel, None, module.stride, module.padding)  # without dilation: so is A
    return [out.flatten(2).movedim(1, 2).reshape(-1, size)]


def attention(module, args, kwargs):
    """Query, key and value rows, and the output of the heads before the projection, from the definition."""
    query, key, value = args[:3]
    distinct = [
        query,
        *([key] if key is not query else []),
        *([value] if value is not query and value is not key else []),
    ]
    heads, width = module.num_heads, module.embed_dim // module.num_heads
    weights, biases = module.in_proj_weight.double().chunk(3), module.in_proj_bias.double().chunk(3)
    q, k, v = (
        (x.double() @ w.T + b).unflatten(-1, (heads, width)).transpose(1, 2)
        for x, w, b in zip((query, key, value), weights, biases, strict=True)
    )
    mixed = torch.softmax(q @ k.mT / width**0.5, -1) @ v
    inputs = torch.cat([x.double().reshape(-1, x.shape[-1]) for x in distinct])
    return [inputs, mixed.transpose(1, 2).reshape(-1, module.embed_dim)]


def experts_record(gate: Callable, transposed: bool = False, bias: bool = False):
    """For each expert, the tokens routed to it and what they become after its gate, token by token."""

    def record(base, batches):
        found: Record = {}

        def see(name):
            def hook(module, args, kwargs):
                hidden, chosen = args[0].double(), args[1]
                e = module.num_experts
                into, out_of = (
                    found.setdefault(f"{name}.gate_up_proj", [[] for _ in range(e)]),
                    found.setdefault(f"{name}.down_proj", [[] for _ in range(e)]),
                )
                for token, experts in enumerate(chosen.tolist()):
                    for expert in experts:
                        x, w = hidden[token], module.gate_up_proj[expert].double()
                        up = x @ w if transposed else w @ x
                        if bias:
                            up = up + module.gate_up_proj_bias[expert].double()
                        into[expert].append(x)
                        out_of[expert].append(gate(module, up))

            return hook

        modules = {name: m for name, m in base.named_modules() if type(m).__name__.endswith("Experts")}
        handles = [m.register_forward_pre_hook(see(n), with_kwargs=True) for n, m in modules.items()]
        base.eval()
        with torch.no_grad():
            for batch in batches:
                call(base, batch)
        for handle in handles:
            handle.remove()
        return {n: [torch.stack(r) if r else torch.empty(0) for r in parts] for n, parts in found.items()}

    return record
