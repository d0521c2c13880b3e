"""EVA before transformers.Trainer. The model and the data stand for yours."""

import tempfile

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator

from eva_lora import EvaConfig, eva_initialize

torch.manual_seed(0)
base = LlamaForCausalLM(
    LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
)
data = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in torch.randint(0, 97, (16, 24))]

model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
loader = DataLoader(data, batch_size=4, collate_fn=default_data_collator)  # what the Trainer will do with the data
report = eva_initialize(model, loader, EvaConfig(max_batches=4), progress=False)
print(report.ranks)

# Only now the Trainer: it makes the optimizer and wraps the model.
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(folder, max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True)
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=default_data_collator)
    print(trainer.train().training_loss)
