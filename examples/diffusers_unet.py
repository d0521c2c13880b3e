"""EVA before a diffusers training loop. The model and the data stand for yours."""

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig, get_peft_model

from eva_lora import EvaConfig, eva_initialize

torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=8, block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=16, norm_num_groups=8,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    attention_head_dim=8,
)  # fmt: skip
scheduler = DDPMScheduler()
data = [(torch.randn(2, 4, 8, 8), torch.randn(2, 6, 16)) for _ in range(4)]  # latents, and what the prompts became


def noisy(latents):
    """The inputs that training has: latents with the noise of a random step."""
    noise, steps = torch.randn_like(latents), torch.randint(0, 1000, (len(latents),))
    return scheduler.add_noise(latents, noise, steps), steps, noise


def forward(model, batch):
    latents, prompts = batch
    sample, steps, _ = noisy(latents)
    return model(sample, steps, encoder_hidden_states=prompts)


model = get_peft_model(unet, LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
report = eva_initialize(model, data, EvaConfig(max_batches=4), forward_fn=forward, progress=False)
print(report.ranks)

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
model.train()
for latents, prompts in data:
    sample, steps, noise = noisy(latents)
    loss = torch.nn.functional.mse_loss(model(sample, steps, encoder_hidden_states=prompts).sample, noise)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(float(loss))
