"""The code on the pages about PEFT and serving runs as it stands."""

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from support.models import LINEARS, tiny_llama, token_batches
from support.pages import blocks
from support.versions import LOADS_BITSANDBYTES, needs

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("page", ["peft.md", "serving.md"])
def test_the_code_on_the_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("eva_lora.adapters._registered", [])
    code = [block.code for block in blocks(f"docs/{page}") if block.language == "python"]
    assert len(code) >= 2
    base, loader = (
        tiny_llama(),
        torch.utils.data.DataLoader(
            [{"input_ids": row} for batch in token_batches(3) for row in batch["input_ids"]], batch_size=4
        ),
    )
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=8, target_modules=LINEARS))
    model.save_pretrained("adapter")
    names = {"base": base, "loader": loader, "model": model}
    for block in code:
        exec(compile(block, page, "exec"), names)
    for folder in tmp_path.glob("adapter-*"):
        assert peft.PeftConfig.from_pretrained(folder).r in (8, 32)


@needs(LOADS_BITSANDBYTES)
def test_the_code_on_the_page_about_quantised_bases_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    wide = LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    LlamaForCausalLM(wide).save_pretrained("float")
    code = [block.code for block in blocks("docs/quantised-bases.md") if block.language == "python"]
    assert len(code) == 2
    names = {"folder": "float", "loader": token_batches(4)}
    for block in code:
        exec(compile(block, "quantised-bases.md", "exec"), names)
    assert names["report"].hidden_error[1] < names["report"].hidden_error[0]
