"""EVA at the beginning of trainings of sentence embeddings: sentence-transformers' trainer, and SetFit's around it."""

import copy

import peft
import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertModel

from eva_lora import EvaConfig, collect, plan
from eva_lora.integrations.transformers import EvaCallback, eva_initialize_trainer
from support.models import lora_a_of
from support.texts import tokenizer, words

sentence_transformers = pytest.importorskip("sentence_transformers", reason="no sentence_transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own

CONFIG = EvaConfig(max_batches=4)
LORA = peft.LoraConfig(r=4, target_modules=["query", "key", "value", "dense"], init_lora_weights="eva")
OPTIONS = {"report_to": "none", "save_strategy": "no", "max_steps": 1}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    BertModel(BertConfig(vocab_size=97, max_position_embeddings=64, **sizes)).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path


def adapted(encoder):
    """A SentenceTransformer whose model has LoRA layers; that model; and what it will be called with."""
    encoder[0].auto_model = inner = peft.get_peft_model(encoder[0].auto_model, copy.deepcopy(LORA))
    calls = []
    encoder[0].register_forward_pre_hook(lambda _, args: calls.append(dict(args[0])))
    return encoder, inner, calls


def require_begun(inner, calls, report, folder):
    """What EVA found is what a pass finds in the calls that it ran; then the step moved B."""
    fresh = peft.get_peft_model(BertModel.from_pretrained(folder / "model"), copy.deepcopy(LORA))
    names = ("input_ids", "attention_mask")
    seen = [{name: call[name] for name in names} for call in calls[: report.num_batches]]
    expected = plan(collect(fresh, iter(seen), CONFIG, progress=False))
    assert report.num_batches == CONFIG.max_batches
    assert report.num_rows == sum(int(call["attention_mask"].sum()) for call in seen)
    assert any((call["attention_mask"] == 0).any() for call in seen)
    assert report.ranks == expected.ranks
    assert len(set(report.ranks.values())) > 1
    found = lora_a_of(inner)  # the first step leaves A alone, as B was zero
    assert all(torch.equal(found[name], expected.lora_a[name]) for name, rank in expected.ranks.items() if rank)
    assert any(b.any() for name, b in inner.state_dict().items() if "lora_B" in name)


def test_a_sentence_transformers_trainer_begins_with_eva(folder):
    encoder, inner, calls = adapted(sentence_transformers.SentenceTransformer(str(folder / "model"), device="cpu"))
    texts = [{"anchor": words(i, 5), "positive": words(i + 40, 3 + i % 4)} for i in range(12)]
    arguments = sentence_transformers.SentenceTransformerTrainingArguments(
        str(folder / "out"), per_device_train_batch_size=4, use_cpu=True, **OPTIONS
    )
    from sentence_transformers.sentence_transformer import losses

    loss = losses.MultipleNegativesRankingLoss(encoder)
    trainer = sentence_transformers.SentenceTransformerTrainer(
        encoder, args=arguments, train_dataset=Dataset.from_list(texts), loss=loss
    )
    report = eva_initialize_trainer(trainer, CONFIG)
    assert len(calls) == 4
    trainer.train()
    require_begun(inner, calls, report, folder)


def test_setfit_begins_with_eva_by_a_callback_and_is_refused_otherwise(folder):
    setfit = pytest.importorskip("setfit", reason="no setfit")
    model = setfit.SetFitModel.from_pretrained(str(folder / "model"), device="cpu")
    _, inner, calls = adapted(model.model_body)
    data = Dataset.from_list([{"text": words(i, 3 + i % 4), "label": i % 2} for i in range(8)])
    callback = EvaCallback(CONFIG)
    arguments = setfit.TrainingArguments(
        str(folder / "out"), batch_size=4, num_iterations=2, warmup_proportion=0, l2_weight=0, **OPTIONS
    )
    trainer = setfit.Trainer(model, arguments, train_dataset=data, callbacks=[callback])
    with pytest.raises(
        TypeError, match=r"trainer: expected a transformers\.Trainer, got setfit\.trainer\.Trainer; .*Eva"
    ):
        eva_initialize_trainer(trainer)
    trainer.train()
    require_begun(inner, calls, callback.report, folder)
    assert len(model.predict(["w1 w2", "w3"])) == 2
