"""A model folder and data files as users have them, made in a moment."""

import json
from pydoc_data.topics import topics

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .models import tiny_llama

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|> "
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }} {% endgeneration %}"
    "{% else %}{{ message['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def paragraphs(count, start=0):
    found = [" ".join(p.split()) for _, page in sorted(topics.items()) for p in page.split("\n\n") if len(p) > 120]
    return found[start : start + count]


def save_tiny_model(folder):
    """A random three-block Llama and a tokenizer trained on real text, with a chat template."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["<unk>", "<pad>", "<eos>", "<|user|>", "<|assistant|>"]
    tokenizer.train_from_iterator(paragraphs(200), trainers.WordLevelTrainer(vocab_size=97, special_tokens=special))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>", chat_template=CHAT_TEMPLATE
    )
    fast.save_pretrained(folder)
    tiny_llama().save_pretrained(folder)
    return folder


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
