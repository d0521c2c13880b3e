"""Language generation: SmolLM2-135M learns to write like the Reuters newswire of 1987.

The text is lower case without punctuation or numbers, so the model cannot have seen it in this form; docs/evidence.md
shows that it has not memorised it.
"""

import copy
from functools import cached_property

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from eva_lora.cli.demo import load_smollm2

from .data import reuters_r8
from .task import Batch, Task, compare, seeded_order


class LanguageGeneration(Task):
    """bfloat16 base, float32 LoRA on all linear layers; 128 tokens a step."""

    name = "language_generation"
    metric = "test loss, nats per token"
    higher_is_better = False
    targets = "all-linear"
    learning_rates = (5e-4, 1.5e-3, 4.5e-3)
    steps = 16
    sequences, tokens = 1, 128

    def __init__(self, *, short: bool = False) -> None:
        super().__init__(short=short)
        if short:
            self.sequences, self.tokens = 2, 16

    @cached_property
    def pretrained(self) -> tuple[nn.Module, object]:
        if self.short:
            torch.manual_seed(0)
            config = LlamaConfig(
                vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                bos_token_id=None, eos_token_id=0,
            )  # fmt: skip
            return LlamaForCausalLM(config), lambda text: {"input_ids": list(text.encode())}
        model, tokenizer = load_smollm2()
        return model.to(torch.bfloat16), tokenizer

    def base(self, seed: int) -> nn.Module:
        return copy.deepcopy(self.pretrained[0])

    def packed(self, split: str, count: int, seed: int) -> list[Batch]:
        """``count`` batches (sequences, tokens) of whole documents one after another, without padding."""
        documents, ids = reuters_r8(split), []
        size = self.sequences * self.tokens
        end = self.pretrained[0].config.eos_token_id
        for i in seeded_order(len(documents), seed):
            ids += [*self.pretrained[1](documents[i][0])["input_ids"], end]
            if len(ids) >= count * size:
                break
        rows = torch.tensor(ids[: count * size]).reshape(count, self.sequences, self.tokens)
        return [{"input_ids": batch, "labels": batch} for batch in rows]

    def training(self, seed: int) -> list[Batch]:
        return self.packed("train", self.steps, seed)

    @cached_property
    def held_out(self) -> list[Batch]:
        """Of Reuters' own test split: 4 batches for validation, 8 for the score."""
        return self.packed("test", 12, seed=0)

    @cached_property
    def validation(self) -> list[Batch]:
        return self.held_out[:4]

    def score(self, model: nn.Module) -> float:
        with torch.no_grad():
            return sum(float(self.loss(model, batch)) for batch in self.held_out[4:]) / 8


if __name__ == "__main__":
    compare(LanguageGeneration())
