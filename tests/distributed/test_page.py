"""The code on docs/distributed.md runs as it stands there, on two ranks."""

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import eva_lora
from support.models import LINEARS, tiny_llama, token_batches
from support.ranks import on_ranks

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"

pytestmark = pytest.mark.filterwarnings("ignore:EVA stopped at")


def test_the_code_on_the_page_runs():
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2

    def check(rank):
        config = LoraConfig(r=4, target_modules=LINEARS)
        names = {name: getattr(eva_lora, name) for name in ("apply", "collect", "eva_initialize", "plan")}
        names |= {"config": config, "get_peft_model": get_peft_model, "make_base": tiny_llama}
        names |= {"model": get_peft_model(tiny_llama(), config), "loader": token_batches(4, (4, 24), seed=rank)}
        names["shard"] = lambda model: fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        exec(blocks[0], names)
        names["model"] = get_peft_model(tiny_llama(), config)
        exec(blocks[1], names)
        layer = names["built"].base_model.model.model.layers[0].self_attn.q_proj
        return names["report"].ranks, names["eva_plan"].ranks, layer.lora_A["default"].weight.full_tensor()

    (ranks, planned, a), (other_ranks, _, other_a) = on_ranks(2, check)
    assert ranks == planned == other_ranks
    assert torch.equal(a, other_a)
