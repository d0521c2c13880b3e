"""The code on the pages about PEFT and serving runs as it stands."""

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from eva_lora import EvaConfig, eva_initialize, export_uniform
from support.models import LINEARS, lora, lora_a_of, tiny_llama, token_batches
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
    other = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=8, target_modules=LINEARS))
    names = {"base": base, "loader": loader, "model": model, "other": other}
    for block in code:
        exec(compile(block, page, "exec"), names)
    for folder in tmp_path.glob("adapter-*"):
        assert peft.PeftConfig.from_pretrained(folder).r in (8, 32)


def test_an_exported_adapter_takes_the_place_of_another_in_a_loaded_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    *_, swap = (block.code for block in blocks("docs/serving.md") if block.language == "python")
    first, second = (lora(tiny_llama(), target_modules=LINEARS) for _ in range(2))
    for model, batches in ((first, token_batches(3)), (second, token_batches(3, seed=9))):
        eva_initialize(model, batches, EvaConfig(max_batches=3, min_rank=1), progress=False)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    assert rank_of(first) != rank_of(second)
    names = {"model": first, "other": second, "base": tiny_llama(), "export_uniform": export_uniform}
    exec(compile(swap, "serving.md", "exec"), names)
    alone = peft.PeftModel.from_pretrained(tiny_llama(), "adapter-second")
    batch = token_batches(1)[0]
    served, expected, before = (model.eval()(**batch).logits for model in (names["served"], alone, first))
    assert torch.equal(served, expected)
    assert not torch.equal(served, before)


def rank_of(model):
    return {name: len(a) for name, a in lora_a_of(model).items()}


def test_the_code_on_the_page_about_coming_from_pefts_eva_runs():
    """PEFT's own code first, then with one line changed, and with three: the same ranks but for PEFT's."""
    blocks_of_page = [block.code for block in blocks("docs/migrating.md") if block.language == "python"]
    assert len(blocks_of_page) == 3
    data = [
        {"input_ids": row, "attention_mask": torch.ones_like(row)} for b in token_batches(3) for row in b["input_ids"]
    ]
    found = []
    for code in blocks_of_page:
        loader = torch.utils.data.DataLoader(data, batch_size=4)
        names = {"base": tiny_llama(), "targets": LINEARS, "loader": loader}
        exec(compile(code, "migrating.md", "exec"), names)
        found.append(rank_of(names["model"]))
    assert found[1] == found[2]
    assert {sum(ranks.values()) for ranks in found} == {8 * 21}
    # One import differs; then an import, a call, and what is printed of it.
    lines = [set(code.splitlines()) for code in blocks_of_page]
    assert len(lines[1] - lines[0]) == 1
    assert len(lines[2] - lines[0]) == 3


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
