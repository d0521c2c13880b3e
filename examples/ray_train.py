"""EVA in Ray Train: every worker streams its own part of the data, and all get the same ranks and the same A."""

import tempfile

import ray
import torch
from peft import LoraConfig, get_peft_model
from ray.train import Checkpoint, RunConfig, ScalingConfig, get_context, report
from ray.train.torch import TorchTrainer, prepare_model
from transformers import LlamaConfig, LlamaForCausalLM

from eva_lora import EvaConfig, eva_initialize


def train() -> None:
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    )
    rank, workers = get_context().get_world_rank(), get_context().get_world_size()
    loader = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 97, (4 * workers, 4, 24))[rank::workers]]

    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    eva = eva_initialize(model, loader, EvaConfig(max_batches=4), progress=False)

    # Only now what wraps the model or holds its parameters: a new rank means new ones.
    wrapped = prepare_model(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for batch in loader:
        loss = wrapped(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    metrics = {"loss": float(loss), "rows": eva.num_rows, "ranks": list(eva.ranks.values())}
    with tempfile.TemporaryDirectory() as folder:
        if rank == 0:
            model.save_pretrained(folder)
        report(metrics, checkpoint=Checkpoint.from_directory(folder) if rank == 0 else None)


if __name__ == "__main__":
    ray.init(num_cpus=3)
    with tempfile.TemporaryDirectory() as folder:
        trainer = TorchTrainer(
            train, scaling_config=ScalingConfig(num_workers=2), run_config=RunConfig(storage_path=folder)
        )
        print(trainer.fit().metrics)
