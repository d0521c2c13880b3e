"""The code of README.md and of the site's front page runs, on a small model."""

import peft
import pytest

from eva_lora import EvaReport, eva_initialize
from support.models import tiny_llama, token_batches
from support.pages import blocks

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What a page takes for granted: a base model, data, and a model with LoRA layers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("eva_lora.adapters._registered", [])
    loader = [{**batch, "labels": batch["input_ids"]} for batch in token_batches()]
    dataset = [{"input_ids": ids, "labels": ids} for ids in loader[0]["input_ids"]]
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=8, target_modules="all-linear"))
    return {"base": tiny_llama(), "loader": loader, "dataset": dataset, "model": model, "evaluate": evaluate(loader)}


def evaluate(loader):
    def evaluate(model):
        for batch in loader:
            model(**batch)

    return evaluate


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_each_block_runs(page, names):
    code = [block.code for block in blocks(page) if block.language == "python"]
    assert code
    trained = names.pop("model")
    for block in code:  # each begins with what the page takes for granted, and not with what a block before has left
        scope = {"eva_initialize": eva_initialize, **names, "model": trained}
        exec(compile(block, page, "exec"), scope)
    assert EvaReport.load("eva_report").ranks
