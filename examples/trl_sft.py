"""EVA before TRL's SFTTrainer. The model and the data stand for yours.

``SFTTrainer(peft_config=LoraConfig(init_lora_weights="eva"))`` never runs EVA: pass it the initialised model instead,
and no ``peft_config``.
"""

import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from eva_lora import EvaConfig, eva_initialize

torch.manual_seed(0)
words = ["[PAD]", "[EOS]", "[UNK]", *["the", "cat", "dog", "sat", "ran", "on", "under", "a", "mat", "tree"]]
tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]")
base = LlamaForCausalLM(
    LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
)
text = ["the cat sat on the mat", "a dog ran under a tree", "the dog sat on a mat", "a cat ran under the tree"] * 4
data = Dataset.from_dict({"text": text})

model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
loader = DataLoader(text, batch_size=4, collate_fn=lambda batch: tokenizer(batch, padding=True, return_tensors="pt"))
report = eva_initialize(model, loader, EvaConfig(max_batches=4), progress=False)
print(report.ranks)

with tempfile.TemporaryDirectory() as folder:
    arguments = SFTConfig(folder, max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, bf16=False)
    trainer = SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)
    print(trainer.train().training_loss)
