"""Trainers of several processes, each with its share of the batches: EVA before DDP, and in runs that are resumed."""

import os

import peft
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from eva_lora import EvaConfig, collect, plan
from eva_lora.integrations.transformers import EvaCallback, eva_initialize_trainer
from eva_lora.planning import merged
from support.models import LINEARS, lora_a_of, tiny_llama
from support.ranks import on_ranks

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own

CONFIG = EvaConfig(max_batches=3)
EVA = peft.LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS, init_lora_weights="eva")


def adapted():
    return peft.get_peft_model(tiny_llama(), EVA)


def rows():
    ids = torch.randint(3, 97, (16, 14), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": x, "attention_mask": [1] * 14, "labels": x} for x in ids]


def trainer_of(folder, steps, callbacks=()):
    os.environ["MASTER_ADDR"] = "localhost"  # accelerate asks for it, though there is a group
    AcceleratorState._reset_state(reset_partial_state=True)  # which the process may have from before it was forked
    arguments = TrainingArguments(
        str(folder), report_to="none", use_cpu=True, disable_tqdm=True, per_device_train_batch_size=2, logging_steps=1,
        learning_rate=0.1, lr_scheduler_type="constant", ddp_backend="gloo", max_steps=steps, save_steps=2,
    )  # fmt: skip
    return Trainer(adapted(), arguments, train_dataset=Dataset.from_list(rows()), callbacks=[*callbacks])


def found(trainer):
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    state = {name: value.clone() for name, value in peft.get_peft_model_state_dict(trainer.model).items()}
    return losses, state


def test_processes_begin_with_what_all_their_batches_show_and_train_alike(tmp_path):
    def check(rank):
        calls = []
        trainer = trainer_of(tmp_path, 1)
        assert trainer.args.world_size == 2
        report = eva_initialize_trainer(trainer, CONFIG, row_mask_fn=lambda call: calls.append(dict(call)))
        begun = {name: a.detach().clone() for name, a in lora_a_of(trainer.model).items()}
        trainer.train()
        wrapped = type(trainer.model_wrapped).__name__
        return calls, report.ranks, report.num_rows, begun, found(trainer), wrapped

    results = on_ranks(2, check)
    seen = [[call["input_ids"] for call in calls] for calls, *_ in results]
    assert not torch.equal(torch.cat(seen[0]), torch.cat(seen[1]))
    parts = [
        collect(adapted(), iter(calls), CONFIG, progress=False, row_mask_fn=lambda _: None) for calls, *_ in results
    ]
    expected = plan(merged(parts))
    for _, ranks, num_rows, begun, (losses, state), wrapped in results:
        assert wrapped == "DistributedDataParallel"
        assert num_rows == 2 * 3 * 2 * 14
        assert ranks == expected.ranks
        assert len(set(ranks.values())) > 1
        assert all(torch.equal(begun[name], expected.lora_a[name]) for name, rank in ranks.items() if rank)
        assert losses == results[0][4][0]
        assert all(torch.equal(value, results[0][4][1][name]) for name, value in state.items())


@pytest.mark.slow
def test_processes_that_resume_go_on_as_if_they_had_not_stopped(tmp_path):
    def run(folder, steps, resumed=None):
        def check(rank):
            callback = EvaCallback(CONFIG)
            trainer = trainer_of(folder, steps, [callback])
            trainer.train(resume_from_checkpoint=resumed)
            return callback.report is None, found(trainer)

        return on_ranks(2, check)

    run(tmp_path / "cut", 2)
    resumed = run(tmp_path / "cut", 4, str(tmp_path / "cut" / "checkpoint-2"))
    straight = run(tmp_path / "straight", 4)
    for (none, (losses, state)), (_, (their_losses, theirs)) in zip(resumed, straight, strict=True):
        assert none
        assert losses == their_losses
        assert state.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in state.items())
