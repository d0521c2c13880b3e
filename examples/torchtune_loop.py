"""EVA before a torchtune training loop. The model and the data stand for yours."""

import torch
from torchtune.models.llama3 import lora_llama3
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from eva_lora import EvaConfig, eva_initialize

torch.manual_seed(0)
model = lora_llama3(
    lora_attn_modules=["q_proj", "output_proj"], apply_lora_to_mlp=True, vocab_size=97, num_layers=2, num_heads=4,
    num_kv_heads=2, embed_dim=32, intermediate_dim=48, max_seq_len=64, lora_rank=4, lora_alpha=8,
)  # fmt: skip
loader = list(torch.randint(0, 97, (4, 4, 24)))

report = eva_initialize(model, loader, EvaConfig(max_batches=4), progress=False)
print(report.ranks)

# Only now the optimizer: a new rank means new parameters. A model that is to load what is saved here is built anew
# and given the plan first: eva_lora.apply(model, plan).
adapter = get_adapter_params(model)
set_trainable_params(model, adapter)
optimizer = torch.optim.AdamW(adapter.values(), lr=1e-2)
for tokens in loader:
    logits = model(tokens[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(float(loss))
