"""Which rows of a layer's input count, and which layers they count for together."""

import peft
import pytest
import torch

from eva_lora import EvaConfig, eva_initialize
from support.bounds import EXACT_CAPTURES
from support.models import captured_share, initialise, layer_inputs, lora, lora_a_of, scatter, tiny_llama, token_batches

pytestmark = pytest.mark.filterwarnings("ignore:EVA stopped at")


def padded(fill, mask_padding=True):
    """The same unmasked tokens with different content in the padding."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 97, (3, 4, 20), generator=generator)
    keep = torch.arange(20).expand(4, 20) < torch.tensor([20, 11, 5, 16])[:, None]
    ids = torch.where(keep, ids, fill)
    return [{"input_ids": batch, "attention_mask": keep.long()} for batch in ids]


def test_padding_never_changes_the_result():
    models = [lora(tiny_llama()) for _ in range(2)]
    for model, fill in zip(models, (0, 50), strict=True):
        initialise(model, padded(fill))
    first, second = (lora_a_of(model) for model in models)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name])


def test_nan_in_padding_never_changes_the_result():
    """Padded positions are made NaN at the embedding of a network that mixes no positions."""

    class Rowwise(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = torch.nn.Linear(12, 12), torch.nn.Linear(12, 12)

        def forward(self, x, attention_mask):
            return self.second(torch.tanh(self.first(x)))

    x = torch.randn(2, 5, 9, 12, generator=torch.Generator().manual_seed(0))
    keep = torch.rand(5, 9, generator=torch.Generator().manual_seed(1)) < 0.6
    results = []
    for fill in (0.0, float("nan")):
        model = peft.get_peft_model(Rowwise(), peft.LoraConfig(r=3, target_modules=["first", "second"]))
        filled = torch.where(keep[..., None], x, fill)
        initialise(model, [{"x": batch, "attention_mask": keep} for batch in filled])
        results.append(lora_a_of(model))
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name])


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, lambda batch: batch["attention_mask"].bool() & (batch["labels"] != -100)),
        ({"label_mask_value": 7}, lambda batch: batch["attention_mask"].bool() & (batch["labels"] != 7)),
        ({"use_label_mask": False}, lambda batch: batch["attention_mask"].bool()),
    ],
    ids=["labels", "custom value", "attention only"],
)
def test_masked_labels_leave_rows_out(options, kept):
    batches = padded(0)
    for batch in batches:
        labels = batch["input_ids"].clone()
        labels[:, :6] = options.get("label_mask_value", -100)
        batch["labels"] = labels
    model = lora(tiny_llama())
    rows = layer_inputs(model, batches, kept)
    report = initialise(model, batches, max_batches=3, **options)
    assert report.num_rows == sum(int(kept(batch).sum()) for batch in batches)
    for name, a in lora_a_of(model).items():
        assert captured_share(a, scatter(rows[name])) >= EXACT_CAPTURES


def test_a_row_mask_fn_decides_alone():
    batches = token_batches(3)
    model = lora(tiny_llama())

    def first_half(batch):
        return (torch.arange(24) < 12).expand(4, 24)

    rows = layer_inputs(model, batches, first_half)
    report = eva_initialize(model, batches, EvaConfig(max_batches=3), row_mask_fn=first_half, progress=False)
    assert report.num_rows == 3 * 48
    for name, a in lora_a_of(model).items():
        assert captured_share(a, scatter(rows[name])) >= EXACT_CAPTURES


def test_layers_that_are_merely_close_are_not_merged():
    class Close(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (torch.nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            return self.a(x) + self.b(x) + self.c(x + 0)  # equal values, another tensor

    model = peft.get_peft_model(Close(), peft.LoraConfig(r=2, target_modules=["a", "b", "c"]))
    report = initialise(model, [torch.randn(30, 8) for _ in range(2)])
    assert report.shared_inputs == [["a", "b"]]
    assert report.ranks.keys() == {"a", "b", "c"}


def test_small_batches_are_accumulated():
    batches = token_batches(60, (1, 3))
    model = lora(tiny_llama())
    rows = layer_inputs(model, batches)
    report = initialise(model, batches, max_batches=60)
    assert report.num_rows == 180
    for name, a in lora_a_of(model).items():
        assert captured_share(a, scatter(rows[name])) >= EXACT_CAPTURES
