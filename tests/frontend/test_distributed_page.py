"""The code of docs/distributed.md runs as it stands; what several ranks make of it, tests/distributed shows."""

import peft
import pytest

from eva_lora import apply, collect, eva_initialize, plan
from support.models import LINEARS, captured_share, layer_inputs, lora_a_of, scatter, tiny_llama, token_batches
from support.pages import blocks


@pytest.mark.filterwarnings("ignore:EVA stopped at", "ignore:`init_lora_weights` is 'eva'")
def test_a_model_is_built_with_planned_ranks():
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS)
    loader = token_batches()
    names = {
        "eva_initialize": eva_initialize, "collect": collect, "plan": plan, "apply": apply, "config": config,
        "get_peft_model": peft.get_peft_model, "make_base": tiny_llama, "shard": lambda model: model,
        "model": peft.get_peft_model(tiny_llama(), config), "loader": loader,
    }  # fmt: skip
    code = [block.code for block in blocks("docs/distributed.md") if block.language == "python"]
    assert len(code) == 2
    for block in code:
        names["model"] = peft.get_peft_model(tiny_llama(), config)
        exec(compile(block, "distributed.md", "exec"), names)
    rows = layer_inputs(names["built"], loader)
    written = lora_a_of(names["built"])
    assert {name: len(a) for name, a in written.items()} == names["eva_plan"].ranks
    for name, a in written.items():
        assert captured_share(a, scatter(rows[name])) >= 0.995
