"""EVA at the beginning of trainings, with the trainers themselves: transformers', TRL's and Lightning's."""

import copy
import random

import numpy as np
import peft
import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from eva_lora import EvaConfig, collect, eva_initialize, plan, watching
from eva_lora.integrations.transformers import EvaCallback, eva_initialize_trainer
from support.models import LINEARS, lora, lora_a_of, tiny_llama
from support.pages import blocks
from support.texts import causal, tokenizer, words
from support.tiny import fingerprint_of

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own

CONFIG = EvaConfig(max_batches=4)
EVA = peft.LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS, init_lora_weights="eva")
OPTIONS = {
    "report_to": "none", "use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 2,
    "logging_steps": 1, "learning_rate": 0.1,
}  # fmt: skip


def rows(count=12):
    """Sequences of one length, so that any two batches' masks are alike; labels for the second half."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 97, (count, 14), generator=generator).tolist()
    return [{"input_ids": x, "attention_mask": [1] * 14, "labels": [-100] * 7 + x[7:]} for x in ids]


def trainer_of(model, folder, callbacks=(), **options):
    arguments = TrainingArguments(str(folder), **{**OPTIONS, "save_strategy": "no", "max_steps": 3, **options})
    return Trainer(model, arguments, train_dataset=Dataset.from_list(rows()), callbacks=[*callbacks])


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def generators():
    return torch.get_rng_state(), random.getstate()[1], np.random.get_state()[1]  # noqa: NPY002 - the global one


def require_planned(model, eva_plan):
    assert len(set(eva_plan.ranks.values())) > 1
    found = lora_a_of(model)
    for name, rank in eva_plan.ranks.items():
        assert len(found[name]) == rank if rank else name not in found
        assert not rank or torch.equal(found[name], eva_plan.lora_a[name].to(found[name].dtype))


def test_a_trainers_model_is_initialised_from_the_batches_that_it_trains_on(tmp_path):
    class Counting(Trainer):
        count = 0

        def compute_loss(self, model, inputs, **options):
            self.count += 1
            return super().compute_loss(model, inputs, **options)

    made = trainer_of(lora(tiny_llama()), tmp_path)
    trainer = Counting(made.model, made.args, train_dataset=made.train_dataset)
    seen = []
    before = generators()
    report = eva_initialize_trainer(trainer, CONFIG, row_mask_fn=lambda call: seen.append(dict(call)))
    assert all(map(np.array_equal, before, generators()))
    assert trainer.count == 0  # what it has noted meanwhile is put back
    assert report.num_batches == len(seen) == 4
    ids = {tuple(entry["input_ids"]) for entry in rows()}
    assert {tuple(x) for call in seen for x in call["input_ids"].tolist()} <= ids
    require_planned(
        trainer.model, plan(collect(lora(tiny_llama()), iter(seen), CONFIG, progress=False, row_mask_fn=lambda _: None))
    )
    assert all(module.training for module in trainer.model.modules())
    assert trainer.model.get_base_model().lm_head.weight.grad is None


def test_training_afterwards_sees_the_batches_it_would_have_seen(tmp_path):
    """With ranks and A put in beforehand by a plan, a training is the same as one that begins with EVA."""
    first = trainer_of(lora(tiny_llama()), tmp_path / "a")
    eva_initialize_trainer(first, CONFIG)
    second = trainer_of(copy.deepcopy(first.model), tmp_path / "b")
    for trainer in (first, second):
        torch.manual_seed(1)
        trainer.train()
    assert losses(first) == losses(second)
    assert len(losses(first)) == 3


def test_a_trainer_that_has_an_optimizer_or_makes_its_model_later_is_refused(tmp_path):
    trained = trainer_of(lora(tiny_llama()), tmp_path)
    trained.train()
    later = Trainer(
        args=TrainingArguments(str(tmp_path), **OPTIONS), model_init=lambda: lora(tiny_llama()),
        train_dataset=Dataset.from_list(rows()),
    )  # fmt: skip
    for trainer, message in ((trained, "it has an optimizer already"), (later, "made anew in train")):
        with pytest.raises(ValueError, match=message):
            eva_initialize_trainer(trainer, CONFIG)
    with pytest.raises(TypeError, match=r"trainer: expected a transformers\.Trainer, got transformers.*Llama"):
        eva_initialize_trainer(tiny_llama())


@pytest.mark.parametrize("by", ["call", pytest.param("callback", marks=pytest.mark.slow)])
def test_a_run_that_is_resumed_runs_no_forward_for_eva_and_goes_on(by, tmp_path):
    calls = []

    def run(model, folder, resume=None, **options):
        callback = EvaCallback(CONFIG)
        trainer = trainer_of(model, folder, [callback] if by == "callback" else [], save_steps=2, **options)
        if by == "call":
            eva_initialize_trainer(trainer, CONFIG, resume_from_checkpoint=resume)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, callback

    options = {"lr_scheduler_type": "constant"}
    run(get_eva(), tmp_path / "cut", max_steps=2, save_strategy="steps", **options)
    again = get_eva()
    again.get_base_model().register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    resumed, callback = run(again, tmp_path / "cut", tmp_path / "cut" / "checkpoint-2", max_steps=4, **options)
    assert calls == [True] * 2  # those of the two steps that were left
    assert callback.report is None
    straight, _ = run(get_eva(), tmp_path / "straight", max_steps=4, **options)
    assert losses(resumed) == losses(straight)
    ours, theirs = (peft.get_peft_model_state_dict(trainer.model) for trainer in (resumed, straight))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert len(set(map(len, lora_a_of(resumed.model).values()))) > 1


def get_eva():
    return peft.get_peft_model(tiny_llama(), EVA)


def test_a_run_that_left_no_plan_cannot_be_resumed(tmp_path):
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: there is no .*eva_plan\.safetensors"):
        eva_initialize_trainer(trainer_of(get_eva(), tmp_path), resume_from_checkpoint="checkpoint-2")


def test_a_callback_has_train_begin_with_eva_once(tmp_path):
    callback = EvaCallback(CONFIG)
    trainer = trainer_of(get_eva(), tmp_path, [callback])
    assert callback.report is None
    trainer.train()
    report = callback.report
    assert sum(report.ranks.values()) <= report.budget
    assert losses(trainer)
    trainer.train()
    assert callback.report is report


# TRL


def texts():
    return Dataset.from_list([{"text": words(i, 6 + i % 5)} for i in range(12)])


def pairs():
    entries = [
        {"prompt": words(i, 4), "chosen": " " + words(50 + i, 5), "rejected": " " + words(90 + i, 3)} for i in range(12)
    ]
    return Dataset.from_list(entries)


def unpaired():
    entries = [
        {"prompt": words(i, 4), "completion": " " + words(50 + i, 3 + i % 4), "label": i % 2 == 0} for i in range(12)
    ]
    return Dataset.from_list(entries)


def prompts():
    return Dataset.from_list([{"prompt": words(i, 4)} for i in range(12)])


def classifier():
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(0)
    config = copy.deepcopy(tiny_llama().config)
    config.num_labels, config.pad_token_id = 1, 0
    return LlamaForSequenceClassification(config)


TRL = {  # name of trainer -> its config's name, data, model, further options
    "SFT": (texts, causal, {}),
    "DPO": (pairs, causal, {}),
    "KTO": (unpaired, causal, {}),
    "Reward": (pairs, classifier, {}),
    "GRPO": (prompts, causal, {"num_generations": 2, "max_completion_length": 4}),
    "ORPO": (pairs, causal, {"max_length": 32}),
    "RLOO": (prompts, causal, {"num_generations": 2, "max_completion_length": 4}),
}


def trl_trainer(name, folder, callbacks=(), **options):
    trl = pytest.importorskip("trl.experimental.orpo" if name == "ORPO" else "trl")
    data, model, more = TRL[name]
    arguments = getattr(trl, f"{name}Config")(
        str(folder), **{**OPTIONS, "save_strategy": "no", "max_steps": 2, "bf16": False, **more, **options}
    )
    reward = (
        {"reward_funcs": lambda completions, **_: [float(len(c)) for c in completions]}
        if "num_generations" in more
        else {}
    )
    return getattr(trl, f"{name}Trainer")(
        model(), args=arguments, train_dataset=data(), processing_class=tokenizer(), peft_config=copy.deepcopy(EVA),
        callbacks=[*callbacks], **reward,
    )  # fmt: skip


class OnTrainBegin(TrainerCallback):
    def __init__(self, call):
        self.call = call

    def on_train_begin(self, *_, **__):
        self.call()


QUICK = {"SFT", "DPO", "GRPO"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in TRL])
def test_trls_trainers_begin_with_eva_and_train(name, tmp_path):
    callback = EvaCallback(EvaConfig(max_batches=3))
    trainer = trl_trainer(name, tmp_path, [callback])
    logged = {}
    trainer.add_callback(OnTrainBegin(lambda: logged.update(copy.deepcopy(getattr(trainer, "_metrics", {})))))
    trainer.train()
    assert not any(any(values) for values in logged.values())  # nothing of EVA's forwards
    report = callback.report
    assert len(set(report.ranks.values())) > 1
    assert trainer.state.global_step == 2
    rules = {entry["rows"] for entry in report.statistic.values()}
    assert all("fit no mask" not in rule for rule in rules)


# Forwards of trainers that are watched


def test_a_trainers_evaluation_may_be_watched(tmp_path):
    trainer = trainer_of(lora(tiny_llama()), tmp_path)
    trainer.eval_dataset = trainer.train_dataset
    expected = collect(lora(tiny_llama()), iter(trainer.get_eval_dataloader()), progress=False)
    plain = trainer.evaluate()
    evaluation, _ = (b.code for b in blocks("docs/free.md") if "trainer" in b.code and b.language == "python")
    names = {"model": trainer.model, "trainer": trainer, "watching": watching, "eva_initialize": eva_initialize}
    beside = []
    trainer.evaluate, evaluate = lambda: beside.append(evaluate()), trainer.evaluate
    exec(compile(evaluation, "free.md", "exec"), names)
    assert beside[0]["eval_loss"] == plain["eval_loss"]
    assert fingerprint_of(names["watch"].statistics()) == fingerprint_of(expected)
    trainer.train()
    assert len(losses(trainer)) == 3


def test_trls_reference_pass_may_be_watched_while_the_trainer_is_made(tmp_path):
    trl = pytest.importorskip("trl")
    model = peft.get_peft_model(causal(), copy.deepcopy(EVA))

    _, reference = (b.code for b in blocks("docs/free.md") if "trainer" in b.code and b.language == "python")
    names = {
        "model": model, "watching": watching, "eva_initialize": eva_initialize, "DPOTrainer": trl.DPOTrainer,
        "DPOConfig": lambda folder, **given: trl.DPOConfig(str(tmp_path / folder), **given),
        "options": {**OPTIONS, "save_strategy": "no", "max_steps": 2, "bf16": False},
        "data": {"train_dataset": pairs(), "processing_class": tokenizer()},
    }  # fmt: skip
    exec(compile(reference, "free.md", "exec"), names)
    trainer, watch = names["trainer"], names["watch"]
    batches = [*trainer.get_train_dataloader()]
    assert watch.num_rows == sum(int(batch["completion_mask"].sum()) for batch in batches)  # TRL's labels
    assert len(set(map(len, lora_a_of(model).values()))) > 1
    trainer.train()
    assert trainer.state.global_step == 2


# Lightning


def lightning_module(pl):
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.calls = lora(tiny_llama()), []
            self.model.register_forward_pre_hook(lambda *_: self.calls.append(torch.is_grad_enabled()))

        def forward(self, input_ids, attention_mask, labels):
            return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)

        def training_step(self, batch, _):
            return self(**batch).loss

        def train_dataloader(self):
            # Two batches, so that a run is cut off between epochs: Lightning reads an epoch from its start.
            entries = [{name: torch.tensor(value) for name, value in row.items()} for row in rows(4)]
            return torch.utils.data.DataLoader(entries, batch_size=2)

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)

    return Module()


def test_lightning_sets_up_with_eva_and_a_run_that_is_resumed_goes_on(tmp_path):
    pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    from eva_lora.integrations.lightning import EvaCallback as LightningCallback

    def fit(folder, epochs, **resume):
        module, callback = lightning_module(pl), LightningCallback(config=CONFIG, **resume)
        trainer = pl.Trainer(
            max_epochs=epochs, accelerator="cpu", default_root_dir=folder, enable_progress_bar=False, logger=False,
            enable_checkpointing=False, enable_model_summary=False, callbacks=[callback],
        )  # fmt: skip
        trainer.fit(module, **resume)
        return trainer, module, callback.report

    expected = plan(collect(lora(tiny_llama()), lightning_module(pl).train_dataloader(), CONFIG, progress=False))
    trainer, _, report = fit(tmp_path / "cut", 1)
    assert report.ranks == expected.ranks
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    _, resumed, none = fit(tmp_path / "cut", 2, ckpt_path=tmp_path / "cut.ckpt")
    assert none is None
    assert resumed.calls == [True] * 2
    _, straight, _ = fit(tmp_path / "straight", 2)
    ours, theirs = (peft.get_peft_model_state_dict(module.model) for module in (resumed, straight))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_lightning_without_a_loader_is_told_to_give_one(tmp_path):
    pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    from eva_lora.integrations.lightning import EvaCallback as LightningCallback

    module = lightning_module(pl)
    loader = module.train_dataloader()
    del type(module).train_dataloader
    trainer = pl.Trainer(
        max_steps=1, accelerator="cpu", default_root_dir=tmp_path, enable_progress_bar=False, logger=False,
        enable_checkpointing=False, enable_model_summary=False, callbacks=[LightningCallback(config=CONFIG)],
    )  # fmt: skip
    with pytest.raises(ValueError, match="loader: expected one, as neither the module nor a datamodule has"):
        trainer.fit(module, loader)
    trainer.callbacks[0] = LightningCallback(loader, CONFIG)
    trainer.fit(module, loader)
    assert trainer.callbacks[0].report.num_batches == 4


def test_the_page_on_trainers_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where Lightning writes

    def names(name):
        return {
            "base": tiny_llama(), "get_peft_model": peft.get_peft_model, "module": lightning_module(pl),
            "dataset": Dataset.from_list(rows()), "loader": lightning_module(pl).train_dataloader(),
            "arguments": TrainingArguments(str(tmp_path / name), save_strategy="no", max_steps=1, **OPTIONS),
        }  # fmt: skip

    pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    first, callback, resumed, lightning = (b.code for b in blocks("docs/trainers.md") if b.language == "python")
    scope = names("first")
    exec(compile(first, "trainers.md", "exec"), scope)
    for code, name in ((callback, "callback"), (resumed, "resumed"), (lightning, "lightning")):
        exec(compile(code, "trainers.md", "exec"), {**scope, **names(name), "model": get_eva()})
