"""The code on the pages about PEFT and serving runs as it stands."""

import peft
import pytest
import torch

from support.models import LINEARS, tiny_llama, token_batches
from support.pages import blocks

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
