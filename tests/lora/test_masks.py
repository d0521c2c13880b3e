"""Which rows count, for every way in which a batch, a model or a caller may say so: read right, or refused by name."""

import math

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from eva_lora import EvaConfig, collect, eva_initialize
from eva_lora.collecting.masks import row_mask
from eva_lora.collecting.reader import fingerprint
from eva_lora.collecting.rows import FITS_NO_MASK, RowMask, RowMemory
from support.models import RowsToRows, lora, rows_to_rows, tiny_llama, token_batches
from support.plain_calls import initialised, recorded, require_directions_of
from support.versions import needs

pytestmark = pytest.mark.filterwarnings("ignore:EVA stopped at")

CONFIG = EvaConfig(max_batches=4, tau=1.0)


def run(loader, model, config=CONFIG, **options):
    return collect(model, loader, config, progress=False, **options)


# --- what the values of a mask say

KEEP = torch.arange(24).expand(4, 24) < torch.tensor([24, 11, 5, 16])[:, None]
CAUSAL = torch.ones(24, 24).tril().bool() & KEEP[:, None, None, :]


def additive(kept, dtype=torch.float32, low=None):
    return torch.zeros(kept.shape, dtype=dtype).masked_fill(~kept, torch.finfo(dtype).min if low is None else low)


FORMS = {
    "bool": KEEP,
    "integers": KEEP.long(),
    "bytes": KEEP.to(torch.uint8),
    "numbers of packed sequences": KEEP.long() * torch.arange(1, 25),
    "floats": KEEP.float(),
    "float numbers of packed sequences": KEEP.half() * 3,
    "additive": additive(KEEP),
    "additive bfloat16": additive(KEEP, torch.bfloat16),
    "additive with -1e4": additive(KEEP, low=-1e4),
    "additive with infinity": additive(KEEP, low=-math.inf),
    "keys, bool": KEEP[:, None, None, :],
    "keys, additive": additive(KEEP[:, None, None, :]),
    "keys without heads, additive": additive(KEEP[:, None, :]),
    "queries and keys, bool": CAUSAL[:, 0],
    "queries and keys, integers": CAUSAL[:, 0].int(),
    "queries and keys, additive": additive(CAUSAL[:, 0]),
    "heads, bool": CAUSAL,
    "heads, integers": CAUSAL.int(),
    "heads, additive": additive(CAUSAL),
    "heads, additive float16 with infinity": additive(CAUSAL, torch.float16, -math.inf),
    "several heads": CAUSAL.expand(4, 2, 24, 24),
    "with earlier keys": torch.cat([torch.ones(4, 1, 24, 6, dtype=torch.bool), CAUSAL], -1),
    "by kind of attention": {"full_attention": CAUSAL, "sliding_attention": None},
}


@pytest.mark.parametrize("mask", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("tokens", ["input_ids", "inputs_embeds", "x"])
def test_masks_of_every_form_mean_the_same(mask, tokens):
    batch = {tokens: token_batches(1)[0]["input_ids"] if tokens == "input_ids" else torch.randn(4, 24, 3)}
    found = row_mask({**batch, "attention_mask": mask}, CONFIG, None)
    assert torch.equal(found.mask, KEEP)
    assert (found.num_rows, found.rule) == (int(KEEP.sum()), "attention_mask")


@pytest.mark.parametrize("form", ["bool", "integers", "floats", "additive", "heads, bool", "heads, additive"])
def test_a_mask_that_keeps_all_keeps_all(form):
    kept = torch.ones_like(KEEP)
    mask = CAUSAL | torch.eye(24, dtype=torch.bool) if "heads" in form else kept
    mask = additive(mask) if "additive" in form else mask.to(
        {"integers": torch.int64, "floats": torch.float32}.get(form, torch.bool)
    )  # fmt: skip
    found = row_mask({**token_batches(1)[0], "attention_mask": mask}, CONFIG, None)
    assert (found.mask, found.num_rows, found.shape) == (None, kept.numel(), (4, 24))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(4, 24, 3, 2), r"^attention_mask: expected shape"),
        (torch.ones(24), r"^attention_mask: expected shape"),
        ("all", r"^attention_mask: .* got str"),
        (torch.ones(4, 1, 24, 24), r"^attention_mask: expected an additive mask, "),
        (KEEP.float() - 1, r"^attention_mask: expected 0 and 1, or an additive mask"),  # a mask, or a bias of −1?
        (KEEP.float() / 2, r"^attention_mask: expected 0 and 1, or an additive mask"),
        (torch.where(KEEP, 1.0, -1e4), r"^attention_mask: expected 0 and 1, or an additive mask"),
        (torch.where(KEEP, 1.0, torch.nan), r"^attention_mask: expected 0 and 1, or an additive mask"),
        (additive(KEEP).masked_fill(~KEEP, -100.0)[:, None, None, :], r"^attention_mask: expected an additive mask"),
        (additive(KEEP, low=-1e4).long(), r"^attention_mask: expected integers of at least 0"),
    ],
)
def test_masks_whose_meaning_is_not_certain_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        row_mask({**token_batches(1)[0], "attention_mask": mask}, CONFIG, None)


QUERIES_AND_KEYS = {
    "causal": torch.ones(6, 6).tril(),
    "causal window": torch.ones(6, 6).tril().triu(-2),
    "packed": torch.block_diag(torch.ones(2, 2), torch.ones(4, 4)),
    "packed and causal": torch.block_diag(torch.ones(2, 2), torch.ones(4, 4)).tril(),
    "true where it may not": torch.ones(6, 6).triu(1),
    "packed, true where it may not": 1 - torch.block_diag(torch.ones(2, 2), torch.ones(4, 4)),
}


@pytest.mark.parametrize("kind", QUERIES_AND_KEYS)
@pytest.mark.parametrize("form", ["bool", "long", "float", "additive"])
def test_a_mask_of_queries_and_keys_is_not_taken_for_one_of_tokens(kind, form):
    kept = QUERIES_AND_KEYS[kind].bool()
    mask = additive(kept) if form == "additive" else getattr(kept, form)()
    with pytest.raises(ValueError, match=r"^attention_mask: expected \(batch, tokens\), got what may be \(que"):
        row_mask({"input_ids": torch.ones(6, 6).long(), "attention_mask": mask}, CONFIG, None)
    if "not" not in kind:  # of so many tokens it is clear what it is
        found = row_mask(
            {"input_ids": torch.ones(4, 6).long(), "attention_mask": mask if form != "float" else kept}, CONFIG, None
        )
        assert (found.mask, found.shape, found.num_rows) == (None, (4, 6), 24)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=6, max_size=6), st.booleans())
def test_masks_of_as_many_padded_sequences_as_tokens_are_read(lengths, left):
    kept = torch.arange(6) < torch.tensor(lengths)[:, None]
    batch = {"input_ids": torch.ones(6, 6).long(), "attention_mask": (kept.flip(1) if left else kept).long()}
    if sorted(lengths) == [*range(1, 7)] and lengths in ([*range(1, 7)], [*range(6, 0, -1)]):
        return  # the two that are a causal mask as well, or its opposite
    assert row_mask(batch, CONFIG, None).num_rows == sum(lengths)


def test_floats_that_are_all_zero_say_what_those_of_earlier_batches_said():
    zeros, memory = {"attention_mask": torch.zeros(4, 24)}, RowMemory()
    assert row_mask({"attention_mask": additive(KEEP)}, CONFIG, None, memory=memory).num_rows == int(KEEP.sum())
    assert row_mask(zeros, CONFIG, None, memory=memory).num_rows == 4 * 24
    memory = RowMemory()
    row_mask({"attention_mask": KEEP.float()}, CONFIG, None, memory=memory)
    assert row_mask(zeros, CONFIG, None, memory=memory).num_rows == 0
    memory = RowMemory()
    assert row_mask(zeros, CONFIG, None, memory=memory).num_rows == 4 * 24  # what an additive mask without padding is
    with pytest.raises(ValueError, match=r"^attention_mask: expected masks of one kind, this batch's is plain, an ear"):
        row_mask({"attention_mask": KEEP.float()}, CONFIG, None, memory=memory)


def test_a_mask_for_all_sequences_and_keys_of_earlier_tokens():
    tokens = token_batches(1, (3, 5))[0]
    found = row_mask(
        {**tokens, "attention_mask": torch.tensor([1, 1, 1, 0, 0]).diag()[None, None].bool()}, CONFIG, None
    )
    assert found.mask.tolist() == [[True, True, True, False, False]] * 3
    cached = torch.ones(3, 1, 5, 9, dtype=torch.bool)
    assert row_mask({**tokens, "attention_mask": cached}, CONFIG, None).mask is None


def test_masks_of_several_choices_are_those_of_so_many_sequences():
    mask = torch.rand(2, 3, 7, generator=torch.Generator().manual_seed(0)) < 0.5
    found = row_mask({"input_ids": torch.ones(2, 3, 7).long(), "attention_mask": mask.long()}, CONFIG, None)
    assert torch.equal(found.mask, mask.reshape(6, 7))


# --- labels, and other fields


@pytest.mark.parametrize("name", EvaConfig().label_names)
def test_labels_have_several_names(name):
    labels = torch.arange(12).reshape(2, 6).masked_fill(torch.arange(12).reshape(2, 6) % 3 == 0, -100)
    found = row_mask({"input_ids": torch.ones_like(labels), name: labels}, CONFIG, None)
    assert torch.equal(found.mask, labels != -100)
    assert found.rule == name
    assert row_mask({"input_ids": torch.ones_like(labels), name: labels[:, 0]}, CONFIG, None).mask is None


def test_labels_of_a_name_of_ones_own():
    labels = torch.tensor([[1, -100, 3]])
    batch = {"inputs_embeds": torch.randn(1, 3, 2), "wanted": labels}
    assert row_mask(batch, CONFIG, None).mask is None
    for names in ("wanted", ["wanted"]):
        assert row_mask(batch, EvaConfig(label_names=names), None).mask.tolist() == [[True, False, True]]
    assert EvaConfig.from_dict(EvaConfig(label_names=["wanted"]).to_dict()) == EvaConfig(label_names=("wanted",))
    with pytest.raises(TypeError, match=r"^label_names: expected a list of names, got \[3\]"):
        EvaConfig(label_names=[3])


def test_labels_of_no_tokens_that_the_batch_tells_of_leave_nothing_out_and_are_named():
    found = row_mask({"x": torch.randn(2, 3, 4), "labels": torch.tensor([[1, -100, 2]] * 2)}, CONFIG, None)
    assert (found.mask, found.rule) == (None, "all rows: there is no mask beside labels")
    assert row_mask({"x": torch.randn(2, 4), "labels": torch.tensor([0, 1])}, CONFIG, None).rule == "all rows"


@pytest.mark.parametrize("name", ["token_type_ids", "mm_token_type_ids", "special_tokens_mask"])
def test_token_types_leave_nothing_out(name):
    tokens = token_batches(1)[0]
    found = row_mask({**tokens, name: torch.zeros_like(tokens["input_ids"])}, CONFIG, None)
    assert (found.mask, found.rule) == (None, "all rows")


@pytest.mark.parametrize("name", ["padding_mask", "src_key_padding_mask", "loss_mask"])
def test_a_mask_of_an_unknown_name_is_named(name):
    class Rowwise(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x, **masks):
            return self.a(x)

    model = peft.get_peft_model(Rowwise(), peft.LoraConfig(r=2, target_modules=["a"]))
    with pytest.warns(UserWarning, match=rf"^all rows counted, padding included: .* meant by {name};"):
        report = eva_initialize(model, [{"x": torch.randn(4, 24, 6), name: ~KEEP}] * 2, CONFIG, progress=False)
    assert report.statistic["a"]["rows"] == f"all rows: it is not known what is meant by {name}"
    assert report.num_rows == report.num_batches * 4 * 24


# --- sequences without padding


@pytest.mark.parametrize("name", ["position_ids", "seq_idx"])
def test_packed_sequences_without_a_mask_count_whole(name):
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3, 4]])
    found = row_mask({"input_ids": torch.ones_like(positions), name: positions}, CONFIG, None)
    assert (found.mask, found.rule) == (None, f"all rows: there is no mask beside {name}")
    labels = torch.where(positions > 0, 1, -100)  # as transformers' collator for packing has them
    found = row_mask({"input_ids": torch.ones_like(positions), name: positions, "labels": labels}, CONFIG, None)
    assert (found.mask.tolist(), found.rule) == ((positions > 0).tolist(), "labels")


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "cu_seqlens"])
@pytest.mark.parametrize("shape", [(1, 10), (10,)])
def test_cumulative_lengths_say_where_the_last_packed_sequence_ends(name, shape):
    tokens = {"input_ids": torch.ones(shape, dtype=torch.int64)}
    found = row_mask({**tokens, name: torch.tensor([0, 3, 10])}, CONFIG, None)
    assert (found.mask, found.num_rows, found.rule) == (None, 10, name)
    found = row_mask({**tokens, name: torch.tensor([0, 3, 8])}, CONFIG, None)
    assert found.mask.reshape(-1).tolist() == [True] * 8 + [False] * 2
    with pytest.raises(ValueError, match=rf"^{name}: expected cumulative lengths of at most the batch's 10 tokens"):
        row_mask({**tokens, name: torch.tensor([0, 11])}, CONFIG, None)


def ragged(count, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(3, 0.2, width)
    return [[torch.randn(n, width, generator=generator) * spread for n in (5, 1 + i, 7)] for i in range(count)]


def padding_free(layout):
    return [torch.nested.nested_tensor(pieces, layout=layout) for pieces in ragged(4)]


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=["jagged", "strided"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_nested_tensors_bring_the_rows_of_their_sequences(layout):
    batches, model = padding_free(layout), rows_to_rows()
    report = initialised(model, batches)
    assert {state["rows"] for state in report.statistic.values()} == {"all rows: nested tensors hold no padding"}
    rows = [torch.cat(pieces) for pieces in ragged(4)]
    require_directions_of(model, recorded(model, rows, lambda model, batch: model(batch)))
    assert len({fingerprint(batch) for batch in batches}) == 4


def test_nested_labels_leave_rows_out_of_nested_tensors():
    model, pieces = rows_to_rows(), ragged(4)
    labels = [[torch.arange(len(piece)) for piece in batch] for batch in pieces]
    labels = [[torch.where(row % 2 == 0, -100, row) for row in batch] for batch in labels]
    nested = lambda batch: torch.nested.nested_tensor(batch, layout=torch.jagged)  # noqa: E731
    ones = [[torch.ones_like(row) for row in batch] for batch in labels]
    batches = [
        {"x": nested(x), "attention_mask": nested(mask), "labels": nested(y)}
        for x, mask, y in zip(pieces, ones, labels, strict=True)
    ]
    report = initialised(model, batches)
    assert {state["rows"] for state in report.statistic.values()} == {"attention_mask and labels"}
    flat = [torch.cat(batch) for batch in pieces]
    keep = [torch.cat(batch) != -100 for batch in labels]
    calls = recorded(model, flat, lambda model, batch: model(batch))
    require_directions_of(model, calls, lambda name, number, x: keep[number])


def test_a_mask_of_padded_rows_fits_no_nested_tensor():
    mask = RowMask(KEEP, int(KEEP.sum()), "attention_mask")
    for count in (int(KEEP.sum()), KEEP.numel(), len(KEEP)):
        assert mask.of_rows((count,), torch.device("cpu"), "layer", nested=True) == (None, count)
        assert mask.rules == {"layer": {FITS_NO_MASK}}


def test_a_nested_tensor_of_widths_that_vary_is_refused_by_name():
    batch = torch.nested.nested_tensor([torch.randn(8, n) for n in (3, 5)], layout=torch.jagged)

    class Odd(RowsToRows):
        def forward(self, x):
            return self.a(x)

    model = peft.get_peft_model(Odd(), peft.LoraConfig(r=3, target_modules=["a"]))
    with pytest.raises(ValueError, match=r"^layer a: expected a nested tensor whose rows have one width"):
        run([batch], model)


@pytest.mark.parametrize(
    "wrap", [lambda p: p, lambda p: (p,), lambda p: {"packed": p}], ids=["alone", "tuple", "field"]
)
def test_a_packed_sequence_is_one_argument(wrap):
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.lstm, self.b = nn.Linear(8, 6), nn.LSTM(6, 6), nn.Linear(6, 8)

        def forward(self, packed):
            hidden, _ = self.lstm(PackedSequence(torch.tanh(self.a(packed.data)), *packed[1:]))
            return self.b(hidden.data)

    torch.manual_seed(0)
    model = peft.get_peft_model(Tagger(), peft.LoraConfig(r=3, target_modules=["a", "b"]))
    packed = [pack_sequence(pieces, enforce_sorted=False) for pieces in ragged(4)]
    report = initialised(model, map(wrap, packed))
    require_directions_of(model, recorded(model, packed, lambda model, batch: model(batch)))
    if wrap(packed[0]) is packed[0]:
        assert report.statistic["a"]["rows"] == "all rows: a PackedSequence holds no padding"


# --- activated LoRA


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=7, max_size=7), min_size=1, max_size=4), st.integers(1, 3))
def test_rows_of_an_activated_lora_are_those_that_it_acts_on(tokens, length):
    ids, invocation = torch.tensor(tokens), [1, 2, 1][:length]
    config = peft.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=invocation)
    offsets = peft.tuners.lora.variants.calculate_alora_offsets({"default": config}, "default", ids)
    expected = torch.arange(7) >= 7 - torch.tensor([offset or 0 for offset in offsets])[:, None]
    found = row_mask({"input_ids": ids}, CONFIG, None, invocation=invocation)
    assert torch.equal(torch.ones(ids.shape).bool() if found.mask is None else found.mask, expected)
    assert found.rule == "alora_invocation_tokens"


def activated():
    model = lora(tiny_llama(), alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM", target_modules=["q_proj"])
    generator, batches = torch.Generator().manual_seed(0), []
    for _ in range(3):
        ids = torch.randint(40, 97, (4, 24), generator=generator)
        ids[:, 14:16] = torch.tensor([5, 6])
        ids[:, 16:] = torch.randint(10, 20, (4, 8), generator=generator)
        keep = torch.arange(24) < torch.tensor([24, 20, 18, 22])[:, None]
        batches.append({"input_ids": ids, "attention_mask": keep.long()})
    return model, batches


@needs("transformers>=4.52.1")  # PEFT asks for it
def test_an_activated_lora_gets_the_directions_of_the_rows_that_it_acts_on():
    model, batches = activated()
    calls = recorded(model, batches)
    report = initialised(model, batches)
    rule = "attention_mask and alora_invocation_tokens"
    assert {state["rows"] for state in report.statistic.values()} == {rule}
    after = torch.arange(24) >= 14
    require_directions_of(model, calls, lambda name, number, x: batches[number]["attention_mask"].bool() & after)


def test_an_activated_lora_without_tokens_to_look_at_is_refused():
    model, batches = activated()
    embeddings = model.get_input_embeddings()
    embedded = [
        {"inputs_embeds": embeddings(batch["input_ids"]).detach(), "attention_mask": batch["attention_mask"]}
        for batch in batches
    ]
    with pytest.raises(ValueError, match=r"^alora_invocation_tokens: expected input_ids"):
        initialised(model, embedded)
    report = initialised(model, embedded, row_mask_fn=lambda batch: batch["attention_mask"].bool())
    assert {state["rows"] for state in report.statistic.values()} == {"row_mask_fn"}
    with pytest.raises(ValueError, match=r"^model: expected a decoder alone with alora_invocation_tokens"):
        row_mask(batches[0], CONFIG, None, encoder_decoder=True, invocation=[5, 6])
