"""A mixture of experts laid out as torchtune's after 0.6.1 (modules/moe): written after its layout, not the library."""

import torch
from torch import nn

from eva_lora import EvaPlan, apply

from .kinds import Kind

EXPERTS, TOP_K, WIDTH, HIDDEN = 3, 2, 12, 20
MATRICES = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)

    def forward(self, x):  # (tokens, d) -> scores and tokens of the routed rows, by expert; rows of each expert
        scores, chosen = torch.topk(torch.sigmoid(self.gate(x)), TOP_K, dim=1)
        order = torch.argsort(chosen.flatten(), stable=True)
        counts = torch.histc(chosen.float().flatten(), bins=EXPERTS, min=0, max=EXPERTS)
        return scores.flatten()[order], order // TOP_K, counts


class LoRAGroupedExperts(nn.Module):
    __module__ = "torchtune.modules.moe.experts"  # as it is recognised

    def __init__(self, rank=4, alpha=8.0):
        super().__init__()
        self.rank, self.alpha, self.merged, self.act_fn = rank, alpha, False, nn.functional.silu
        for name, width, out in (("gate", WIDTH, HIDDEN), ("up", WIDTH, HIDDEN), ("down", HIDDEN, WIDTH)):
            setattr(self, f"{name}_proj", nn.Parameter(torch.randn(EXPERTS, width, out) / width**0.5, False))
            setattr(self, f"lora_{name}_a", nn.Parameter(torch.randn(EXPERTS, width, rank)))
            setattr(self, f"lora_{name}_b", nn.Parameter(torch.zeros(EXPERTS, rank, out)))

    def forward(self, x, num_tokens_per_expert):
        outputs = []
        for expert, rows in enumerate(torch.split(x, num_tokens_per_expert.long().tolist())):
            hidden = self.act_fn(self._layer("gate", expert, rows)) * self._layer("up", expert, rows)
            outputs.append(self._layer("down", expert, hidden))
        return torch.cat(outputs)

    def _layer(self, name, expert, x):
        a, b = (getattr(self, f"lora_{name}_{side}")[expert] for side in "ab")
        return x @ getattr(self, f"{name}_proj")[expert] + self.alpha / self.rank * (x @ a @ b)


class MoE(nn.Module):
    __module__ = "torchtune.modules.moe.moe"

    def __init__(self):
        super().__init__()
        self.router, self.experts = Router().requires_grad_(False), LoRAGroupedExperts()

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        scores, tokens, counts = self.router(flat)
        routed = self.experts(flat[tokens] * scores[:, None], counts)
        return torch.zeros_like(flat).index_add(0, tokens, routed).view_as(x)


class GroupedExpertsKind(Kind):
    """The mixture as a kind of layer: two sites, of all gate and up projections and of all down projections."""

    removable = False

    def model(self):
        torch.manual_seed(0)
        return MoE()

    def matrices(self, model):
        return {
            f"experts.{site}": list(getattr(model.experts, f"lora_{names[0]}_a").detach().mT)
            for site, names in MATRICES.items()
        }

    def second(self, model):
        return [getattr(model.experts, f"lora_{name}_b") for name in ("gate", "up", "down")]

    def save(self, model, eva_plan, folder):
        eva_plan.save(folder / "plan.safetensors")
        torch.save(model.state_dict(), folder / "state")

    def reload(self, folder):
        model = self.model()
        apply(model, EvaPlan.load(folder / "plan.safetensors"))
        model.load_state_dict(torch.load(folder / "state"))
        return model


def sequences():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, 30, WIDTH, generator=generator) * 0.7 ** torch.arange(WIDTH) for _ in range(3)]


def record(base, batches):
    """What every expert and its down projection is fed, token by token, from the definition."""
    found = {f"experts.{site}": [[] for _ in range(EXPERTS)] for site in MATRICES}
    experts = base.experts
    for x in torch.cat([batch.flatten(0, 1) for batch in batches]):
        scores = torch.sigmoid(base.router.gate(x))
        for expert in scores.topk(TOP_K).indices.tolist():
            routed = (x * scores[expert]).double()
            found["experts.gate_up_proj"][expert].append(routed)
            gate, up = (routed @ getattr(experts, f"{name}_proj")[expert].double() for name in ("gate", "up"))
            found["experts.down_proj"][expert].append(nn.functional.silu(gate) * up)
    return {name: [torch.stack(rows).detach() for rows in parts] for name, parts in found.items()}


GROUPED_EXPERTS = GroupedExpertsKind("torchtune LoRAGroupedExperts", lambda: GROUPED_EXPERTS.model(), sequences, record)
