"""Image classification: a small ViT reads upright digits, and learns to read them on their side.

No pretrained ViT comes as a package, so one is trained on MNIST first (a minute, kept in the cache).
"""

import copy
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from .data import made_once, mnist_5k
from .task import Batch, Task, compare, seeded_order

# Of the 5,000 images in a fixed order: what the ViT is trained on first, adapted to, and judged by.
FIRST, ADAPTED, VALIDATION, TEST = slice(0, 3000), slice(3000, 4000), slice(4000, 4200), slice(4200, 5000)


def digits(part: slice) -> tuple[Tensor, Tensor]:  # (n, 1, 28, 28), (n,)
    images, labels = mnist_5k()
    chosen = seeded_order(len(images), 0)[part]
    return (images[chosen, None] - 0.13) / 0.31, labels[chosen]


def turned(images: Tensor) -> Tensor:  # (n, 1, 28, 28)
    """A quarter turn."""
    return images.rot90(1, (2, 3))


class ImageClassification(Task):
    """float32; 32 images a step; LoRA on the ViT's linear layers, its head is kept."""

    name = "image_classification"
    metric = "test accuracy"
    higher_is_better = True
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")
    rank = 4
    learning_rates = (3e-3, 1e-2, 3e-2)
    steps, evaluate_every = 60, 5

    @cached_property
    def pretrained(self) -> nn.Module:
        torch.manual_seed(0)
        hidden, layers = (16, 1) if self.short else (64, 4)
        config = ViTConfig(
            image_size=28, patch_size=7, num_channels=1, num_labels=10, hidden_size=hidden, num_hidden_layers=layers,
            num_attention_heads=4, intermediate_size=2 * hidden,
        )  # fmt: skip
        vit = ViTForImageClassification(config).eval()
        if not self.short:
            path = made_once("mnist-vit-1.pt", lambda path: torch.save(trained(vit).state_dict(), path))
            vit.load_state_dict(torch.load(path, weights_only=True))
        return vit

    def base(self, seed: int) -> nn.Module:
        return copy.deepcopy(self.pretrained)

    def training(self, seed: int) -> list[Batch]:
        images, labels = digits(ADAPTED)
        order = torch.tensor([*seeded_order(1000, seed), *seeded_order(1000, 100 + seed)])
        batches = order[: self.steps * 32].split(32)
        return [{"pixel_values": turned(images[chosen]), "labels": labels[chosen]} for chosen in batches]

    @cached_property
    def validation(self) -> list[Batch]:
        images, labels = digits(VALIDATION)
        return [{"pixel_values": turned(images), "labels": labels}]

    def score(self, model: nn.Module) -> float:
        images, labels = digits(TEST)
        with torch.no_grad():
            return float((model(pixel_values=turned(images)).logits.argmax(-1) == labels).float().mean())


def trained(vit: nn.Module, epochs: int = 15) -> nn.Module:
    """On upright digits."""
    images, labels = digits(FIRST)
    optimizer = torch.optim.AdamW(vit.parameters(), lr=1e-3)
    for epoch in range(epochs):
        for chosen in torch.tensor(seeded_order(len(images), epoch)).split(64):
            vit(pixel_values=images[chosen], labels=labels[chosen]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return vit


if __name__ == "__main__":
    compare(ImageClassification())
