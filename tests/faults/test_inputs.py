"""Any loader, any batch, any mask; and what happens to rows that cannot be used."""

import collections
from dataclasses import dataclass

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    BatchEncoding,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from eva_lora import EvaConfig, collect, eva_initialize
from eva_lora.collecting.batches import FITS_NO_MASK, RowMask, row_mask, to_device
from eva_lora.collecting.reader import BatchReader, fingerprint
from support.models import token_batches
from support.tiny import tiny_batches, tiny_model
from support.versions import needs

pytestmark = pytest.mark.filterwarnings("ignore:EVA stopped at")

CONFIG = EvaConfig(max_batches=4, tau=1.0)


def run(loader, model=None, config=CONFIG, **options):
    return collect(model or tiny_model(), loader, config, progress=False, **options)


# --- batches


Pair = collections.namedtuple("Pair", ["first", "second"])


@dataclass
class Batch:
    x: object
    note: str = "kept"


leaves = st.one_of(
    st.builds(lambda n: torch.arange(float(n)), st.integers(0, 3)),
    st.none(),
    st.text(max_size=3),
    st.integers(),
    st.floats(),
)
batches = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.builds(Pair, inner, inner),
        st.dictionaries(st.text(max_size=2), inner, max_size=3),
        st.dictionaries(st.text(max_size=2), inner, max_size=3).map(collections.UserDict),
        st.builds(Batch, inner),
    ),
    max_leaves=8,
)


def flattened(value):
    """(path, leaf) of a nested batch; containers by their type, mappings all alike."""
    if isinstance(value, Batch):
        return [("Batch", *rest) for rest in flattened([value.x, value.note])]
    if isinstance(value, collections.abc.Mapping):
        return [("mapping", k, *rest) for k, v in value.items() for rest in flattened(v)] or [("mapping",)]
    if isinstance(value, (list, tuple)):
        kind = type(value).__name__
        return [(kind, i, *rest) for i, v in enumerate(value) for rest in flattened(v)] or [(kind,)]
    if isinstance(value, torch.Tensor):
        return [("tensor", value.device.type, tuple(value.shape))]
    return [("other", repr(value))]


@settings(max_examples=60, deadline=None)
@given(batches)
def test_every_tensor_of_any_structure_is_moved_and_nothing_else_changes(batch):
    moved = to_device(batch, torch.device("meta"))
    on_meta = [
        (*row[:-2], "meta", row[-1]) if len(row) > 2 and row[-3] == "tensor" else row for row in flattened(batch)
    ]
    assert flattened(moved) == on_meta
    assert "meta" not in str(flattened(batch))


@settings(max_examples=60, deadline=None)
@given(batches, batches)
def test_fingerprints_tell_batches_apart(one, other):
    same = [str(row) for row in flattened(one)] == [str(row) for row in flattened(other)]
    assert fingerprint(one) == fingerprint(one)
    if not same:
        alike = {"list": "sequence", "tuple": "sequence", "Pair": "sequence", "Batch": "mapping"}
        looser = [[[alike.get(part, part) for part in row] for row in flattened(value)] for value in (one, other)]
        assert fingerprint(one) != fingerprint(other) or str(looser[0]) == str(looser[1])


def test_fingerprints_see_one_bit_the_dtype_and_the_shape():
    x = torch.arange(6.0)
    others = [x.nextafter(torch.tensor(9.0)), x.half(), x.view(2, 3), x.view(3, 2), -x, x.numpy(), {"x": x}, [x, None]]
    assert len({fingerprint(value) for value in [x, *others]}) == 9
    assert fingerprint(x.view(2, 3).T) == fingerprint(x.view(2, 3).T.contiguous())
    assert fingerprint(torch.tensor(float("nan"))) == fingerprint(torch.tensor(float("nan")))


class OneShot(torch.utils.data.IterableDataset):
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda batches: (batch for batch in batches),
        lambda batches: torch.utils.data.DataLoader(OneShot(batches), batch_size=None),
        lambda batches: torch.utils.data.DataLoader(batches, batch_size=None, num_workers=1),
        lambda batches: [BatchEncoding(batch) for batch in batches],
        lambda batches: [collections.OrderedDict(batch) for batch in batches],
        lambda batches: [(batch["x"], batch["attention_mask"]) for batch in batches],
    ],
    ids=["generator", "IterableDataset", "workers", "BatchEncoding", "OrderedDict", "tuple"],
)
def test_loaders_and_batches_of_every_kind_give_the_same(wrap):
    expected = run(tiny_batches(4))
    by_position = isinstance(next(iter(wrap(tiny_batches(1)))), tuple)
    options = {"row_mask_fn": lambda batch: batch[1]} if by_position else {}
    found = run(wrap(tiny_batches(4)), **options)
    assert torch.equal(found.inputs[3].components, expected.inputs[3].components)
    assert found.num_rows == expected.num_rows


def test_a_loader_that_runs_dry_in_a_later_round_ends_the_pass():
    class Drying:
        rounds = 0

        def __iter__(self):
            self.rounds += 1
            return iter(tiny_batches(2) if self.rounds == 1 else [])

    assert run(Drying()).stop_reason == "end of the data"


@pytest.mark.parametrize("loader", [list, iter], ids=["list", "stream"])
@pytest.mark.parametrize("place", [1, 3])
def test_none_in_the_place_of_a_batch_is_named(loader, place, tmp_path):
    batches = tiny_batches(6)
    batches.insert(place - 1, None)
    for more in ({}, {"checkpoint": tmp_path / "pass.safetensors"}):
        with pytest.raises(ValueError, match=rf"^loader: expected batches, batch {place} is None; "):
            run(loader(batches), **more)


def test_none_is_a_batch_to_a_forward_of_ones_own():
    made = tiny_batches(4)
    statistics = run([None] * 4, forward_fn=lambda model, _: model(**made[0]))
    assert statistics.num_batches == 4


def test_a_stream_takes_no_batch_before_it_is_asked():
    taken = []
    stream = BatchReader(taken.append(i) or i for i in range(5))
    assert taken == [0]  # the first, to know that there is one
    assert (next(stream), taken) == (0, [0])


# --- masks


def test_masks_of_every_layout_mean_the_same():
    keep = torch.arange(24).expand(4, 24) < torch.tensor([24, 11, 5, 16])[:, None]
    causal = torch.ones(24, 24).tril().bool() & keep[:, None, None, :]
    additive = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)
    layouts = [keep, keep.long(), keep.float(), keep.long() * 3, causal, causal.int(), additive, causal[:, 0],
               {"full_attention": causal, "sliding_attention": None}, causal.expand(4, 2, 24, 24)]  # fmt: skip
    for mask in layouts:
        found = row_mask({**token_batches(1)[0], "attention_mask": mask}, CONFIG, None)
        assert torch.equal(found.mask, keep)
        assert (found.num_rows, found.rule) == (int(keep.sum()), "attention_mask")


def test_a_mask_for_all_sequences_and_keys_of_earlier_tokens():
    tokens = token_batches(1, (3, 5))[0]
    found = row_mask(
        {**tokens, "attention_mask": torch.tensor([1, 1, 1, 0, 0]).diag()[None, None].bool()}, CONFIG, None
    )
    assert found.mask.tolist() == [[True, True, True, False, False]] * 3
    cached = torch.ones(3, 1, 5, 9, dtype=torch.bool)
    assert row_mask({**tokens, "attention_mask": cached}, CONFIG, None).mask is None


def test_packed_sequences_with_position_ids_count_whole():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3, 4]])
    found = row_mask({"input_ids": torch.ones_like(positions), "position_ids": positions}, CONFIG, None)
    assert (found.mask, found.rule) == (None, "all rows")


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(4, 24, 3, 2), r"^attention_mask: expected shape"),
        (torch.ones(4, 1, 24, 24), r"^attention_mask: expected an additive mask, .* values above 0"),
        ("all", r"^attention_mask: .* got str"),
    ],
)
def test_masks_that_mean_nothing_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        row_mask({"attention_mask": mask}, CONFIG, None)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 5), st.data(),
    st.sampled_from(["tokens", "flat", "transposed", "heads", "sequences", "other"]),
)  # fmt: skip
def test_an_input_of_any_shape_gets_the_mask_of_its_rows(batch, tokens, data, layout):
    bits = data.draw(st.lists(st.booleans(), min_size=batch * tokens, max_size=batch * tokens))
    mask = torch.tensor(bits).reshape(batch, tokens)
    labelled = torch.arange(batch * tokens).reshape(batch, tokens)  # every row holds the number of its token
    shapes = {
        "tokens": labelled,
        "flat": labelled.reshape(-1),
        "transposed": labelled.T,
        "heads": labelled[:, :, None].expand(batch, tokens, 3),
        "sequences": labelled[:, 0],
        "other": torch.zeros(batch + 6, 2, tokens + 7),
    }
    x = shapes[layout][..., None].float()
    own = RowMask(mask, int(mask.sum()), "given")
    got, count = own.of(x, "layer")
    kept = (x[..., 0] if got is None else x[..., 0][got]).flatten()
    assert count == kept.numel()
    if layout == "other":
        assert own.rules == {"layer": FITS_NO_MASK}
        assert got is None
    elif layout == "sequences":
        if tokens > 1:  # else a row is as well a token's
            assert set(kept.tolist()) == set(labelled[mask.any(1), 0].tolist())
    elif batch != tokens or layout != "transposed":  # a square one cannot be told from the mask itself
        assert sorted(kept.tolist()) == sorted(labelled[mask].repeat_interleave(3 if layout == "heads" else 1).tolist())


def test_layers_whose_rows_fit_no_mask_count_whole_and_are_named():
    class Seeing(nn.Module):
        def __init__(self):
            super().__init__()
            self.vision, self.text = nn.Linear(5, 6), nn.Linear(6, 6)

        def forward(self, pixels, tokens, attention_mask):
            return self.text(tokens) + self.vision(pixels).mean(1, keepdim=True)

    model = peft.get_peft_model(Seeing(), peft.LoraConfig(r=2, target_modules=["vision", "text"]))
    generator = torch.Generator().manual_seed(0)
    keep = torch.arange(8).expand(2, 8) < torch.tensor([8, 3])[:, None]
    loader = [
        {"pixels": torch.randn(2, 11, 5, generator=generator), "tokens": torch.randn(2, 8, 6, generator=generator),
         "attention_mask": keep} for _ in range(4)
    ]  # fmt: skip
    with pytest.warns(UserWarning, match=r"^the inputs of 1 layers, the first is vision, have rows that fit no mask"):
        report = eva_initialize(model, loader, CONFIG, progress=False)
    assert report.statistic["vision"]["rows"] == "all rows: they fit no mask of the batch"
    assert report.statistic["text"]["rows"] == "attention_mask"
    assert "all rows: they fit no mask of the batch; attention_mask" in str(report)


@needs("transformers>=4.52")  # its parts have other names before
def test_a_vision_language_model_masks_its_text_and_names_its_images():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=16, patch_size=8, **sizes), image_token_id=59,
        text_config=LlamaConfig(vocab_size=60, num_key_value_heads=2, **sizes),
        vision_feature_layer=-1, vision_feature_select_strategy="default",
    )  # fmt: skip
    model = peft.get_peft_model(
        LlavaForConditionalGeneration(config), peft.LoraConfig(r=2, target_modules="all-linear")
    )
    generator, loader = torch.Generator().manual_seed(0), []
    for _ in range(4):
        ids = torch.randint(0, 58, (3, 12), generator=generator)
        ids[:, 1:5] = 59
        keep = torch.arange(12).expand(3, 12) < torch.tensor([12, 9, 7])[:, None]
        pixels = torch.randn(3, 3, 16, 16, generator=generator)
        loader.append({"input_ids": ids, "attention_mask": keep.long(), "pixel_values": pixels})
    with pytest.warns(UserWarning, match=r"^the inputs of 14 layers, the first is model\.vision_tower\."):
        statistics = run(loader, model)
    for site in statistics.sites:
        rows = statistics.inputs[site.input].num_rows
        if site.name.startswith("model.language_model"):
            assert (site.rows, rows) == ("attention_mask", 4 * (12 + 9 + 7))
        else:
            assert site.rows == FITS_NO_MASK
            assert rows == 4 * 3 * (4 if "projector" in site.name else 5)  # patches, and a class token in the tower


def t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    targets = ["q", "k", "v", "o", "wi", "wo"]
    return peft.get_peft_model(T5ForConditionalGeneration(config), peft.LoraConfig(r=2, target_modules=targets))


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


def test_encoder_and_decoder_that_cannot_be_told_apart_are_refused_by_name():
    with pytest.raises(ValueError, match=r"^layer encoder\.block\.0\..*q: its input has rows \(3, 6\), and so have"):
        run(seq2seq_batches([(6, 6)]), t5())
