"""EVA before a loop with accelerate, on as many processes as it was launched with:

    accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py

Every process streams its own part of the data, and all get the same ranks and the same A.
"""

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from eva_lora import EvaConfig, eva_initialize

accelerator = Accelerator(cpu=True)
torch.manual_seed(0)
base = LlamaForCausalLM(
    LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
)
records = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 97, (16, 24))]
loader = accelerator.prepare(DataLoader(records, batch_size=4 // accelerator.num_processes))

model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
report = eva_initialize(model, loader, EvaConfig(max_batches=4), progress=False)
accelerator.print(report.ranks)

# Only now what wraps the model or holds its parameters: a new rank means new ones.
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
wrapped, optimizer = accelerator.prepare(model, optimizer)
wrapped.train()
for batch in loader:
    loss = wrapped(**batch).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.print(float(loss))
