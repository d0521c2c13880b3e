"""EVA before a litgpt training loop. The model and the data stand for yours."""

import torch
from litgpt.lora import GPT, Config, mark_only_lora_as_trainable

from eva_lora import EvaConfig, eva_initialize

torch.manual_seed(0)
config = Config(
    n_layer=2, n_head=4, n_query_groups=2, n_embd=32, intermediate_size=48, padded_vocab_size=97, block_size=64,
    mlp_class_name="LLaMAMLP", lora_r=4, lora_alpha=8, lora_query=True, lora_value=True, lora_projection=True,
)  # fmt: skip
model = GPT(config)
mark_only_lora_as_trainable(model)
loader = list(torch.randint(0, 97, (4, 4, 24)))

report = eva_initialize(model, loader, EvaConfig(max_batches=4), progress=False)
print(report.ranks)

# Only now the optimizer: a new rank means new parameters.
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for tokens in loader:
    logits = model(tokens[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(float(loss))
