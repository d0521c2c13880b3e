"""EVA before a plain PyTorch loop. The model and the data stand for yours."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from eva_lora import EvaConfig, eva_initialize

torch.manual_seed(0)
base = LlamaForCausalLM(
    LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
)
loader = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 97, (4, 4, 24))]

model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
report = eva_initialize(model, loader, EvaConfig(max_batches=4), progress=False)
print(report.ranks)

# Only now the optimizer: a new rank means new parameters.
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
model.train()
for batch in loader:
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(float(loss))
