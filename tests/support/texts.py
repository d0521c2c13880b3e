"""Words of a made-up language, the tokenizer that knows them, and models that fit it: what trainers ask for."""

import random

from transformers import PreTrainedTokenizerFast

from .models import tiny_llama


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(94))])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def words(seed, count):
    return " ".join(f"w{i}" for i in random.Random(seed).choices(range(94), k=count))


def causal():
    model = tiny_llama()
    model.config.pad_token_id = 0
    return model
