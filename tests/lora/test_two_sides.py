"""An encoder and a decoder have rows, and masks, of their own."""

import peft
import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartModel,
    T5Config,
    T5ForConditionalGeneration,
)

from eva_lora import EvaConfig, collect
from eva_lora.collecting import forwards
from eva_lora.collecting.masks import row_mask
from eva_lora.collecting.rows import sides_of
from support.models import rows_to_rows
from support.plain_calls import initialised, recorded, require_directions_of

pytestmark = pytest.mark.filterwarnings("ignore:EVA stopped at")

CONFIG = EvaConfig(max_batches=4, tau=1.0)
KEEP = torch.arange(24).expand(4, 24) < torch.tensor([24, 11, 5, 16])[:, None]


def run(loader, model, config=CONFIG, **options):
    return collect(model, loader, config, progress=False, **options)


T5 = T5Config(
    vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
)
SIZES = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}  # fmt: skip


def t5():
    torch.manual_seed(0)
    targets = ["q", "k", "v", "o", "wi", "wo"]
    return peft.get_peft_model(T5ForConditionalGeneration(T5), peft.LoraConfig(r=2, target_modules=targets))


def seq2seq_batches(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for encoder, decoder in lengths:
        ids = torch.randint(1, 50, (3, encoder), generator=generator)
        mask = torch.arange(encoder).expand(3, encoder) < torch.tensor([encoder, 2, 4])[:, None]
        labels = torch.randint(1, 50, (3, decoder), generator=generator)
        labels[1, 2:] = -100
        batches.append({"input_ids": ids, "attention_mask": mask.long(), "labels": labels})
    return batches


def test_encoder_and_decoder_rows_have_masks_of_their_own():
    model, loader = t5(), seq2seq_batches([(7, 5), (6, 6), (5, 7)])  # the second batch alone could be read either way
    config = EvaConfig(max_batches=3, tau=1.0, statistic="gram")
    statistics = run(loader, model, config)
    rows = {site.name: statistics.inputs[site.input].num_rows for site in statistics.sites}
    encoder = sum(int(batch["attention_mask"].sum()) for batch in loader)
    decoder = sum(int((batch["labels"] != -100).sum()) for batch in loader)
    for name, count in rows.items():
        reads_encoder = name.startswith("encoder") or name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        assert count == (encoder if reads_encoder else decoder), name
    assert {site.rows for site in statistics.sites} == {"attention_mask", "labels"}
    assert statistics.num_rows == encoder


def test_encoder_and_decoder_of_one_length_are_told_apart_by_what_their_rows_are_made_of():
    model, batches = t5(), seq2seq_batches([(6, 6), (6, 6), (5, 5)])
    calls = recorded(model, batches)
    report = initialised(model, batches)
    assert {state["rows"] for state in report.statistic.values()} == {"attention_mask", "labels"}
    require_directions_of(model, calls, t5_rows(batches))


def test_encoder_and_decoder_that_cannot_be_told_apart_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(forwards, "is_partitioned", lambda parameter: True)  # no look into its forward
    with pytest.raises(ValueError, match=r"^layer decoder\.block\.0\..*q: its input has rows \(3, 6\), and so have"):
        run(seq2seq_batches([(6, 6)]), t5())


class Wrapper(nn.Module):
    """What hangs a model one level further down."""

    def __init__(self, model):
        super().__init__()
        self.core = nn.ModuleDict({"model": model})

    def forward(self, **batch):
        return self.core["model"](**batch)


def reads_encoder(name):
    return "encoder." in name.replace("core.model.", "")[:8] or name.endswith(
        ("EncDecAttention.k", "EncDecAttention.v")
    )


def t5_rows(batches):
    def kept(name, number, x):
        batch = batches[number]
        return batch["attention_mask"].bool() if reads_encoder(name) else batch["labels"] != -100

    return kept


def test_an_encoder_decoder_in_a_wrapper_has_two_sides():
    targets = ["q", "k", "v", "o", "wi", "wo"]
    model = peft.get_peft_model(Wrapper(T5ForConditionalGeneration(T5)), peft.LoraConfig(r=2, target_modules=targets))
    batches = seq2seq_batches([(7, 5), (6, 6), (5, 7)])
    calls = recorded(model, batches)
    initialised(model, batches)
    require_directions_of(model, calls, t5_rows(batches))


def test_a_row_mask_fn_has_a_mask_for_each_side():
    batches = seq2seq_batches([(7, 5), (6, 6), (5, 7)])

    def sides(batch):
        return {"encoder": batch["input_ids"] % 2 == 0, "decoder": batch["labels"] % 2 == 0}

    def kept(name, number, x):
        return sides(batches[number])["encoder" if reads_encoder(name) else "decoder"]

    model = t5()
    calls = recorded(model, batches)
    report = initialised(model, batches, row_mask_fn=sides)
    assert {state["rows"] for state in report.statistic.values()} == {"row_mask_fn"}
    require_directions_of(model, calls, kept)
    whole = t5()
    initialised(whole, batches, row_mask_fn=lambda batch: {**sides(batch), "decoder": None})
    require_directions_of(whole, calls, lambda *call: kept(*call) if reads_encoder(call[0]) else None)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"encoder": KEEP, "decoders": KEEP}, r"^row_mask_fn: expected masks of 'encoder' and 'decoder', got"),
        ({}, r"^row_mask_fn: expected masks of 'encoder' and 'decoder', got"),
        (KEEP, r"^row_mask_fn: expected a mask for each side of an encoder-decoder"),
    ],
)
def test_what_a_row_mask_fn_returns_for_two_sides_is_checked(returned, message):
    with pytest.raises(ValueError, match=message):
        run(seq2seq_batches([(7, 5)]), t5(), row_mask_fn=lambda batch: returned)


def test_an_encoder_alone_has_one_side():
    torch.manual_seed(0)
    whole = BartModel(BartConfig(vocab_size=30, **SIZES))
    assert sides_of(whole.modules(), []).two
    assert sides_of(Wrapper(whole).modules(), []).two
    assert not sides_of(Wrapper(whole.encoder).modules(), []).two
    assert not sides_of(rows_to_rows().modules(), []).two


def test_fields_of_a_decoder_show_that_there_is_one():
    mask = torch.ones(2, 5).bool()
    found = row_mask({"x": torch.zeros(2, 7), "decoder_attention_mask": mask.tril()}, CONFIG, None)
    assert torch.equal(found.decoder.mask, mask.tril())
    assert found.mask is None
