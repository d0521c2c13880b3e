"""Which rows count, for every way in which a batch, a model or a caller may say so: read right, or refused by name."""

import math

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BartConfig,
    BartModel,
    T5Config,
    T5ForConditionalGeneration,
)

from eva_lora import EvaConfig, collect, eva_initialize
from eva_lora.collecting.masks import row_mask
from eva_lora.collecting.origins import OF_ENCODER, OF_OTHERS, Origins
from eva_lora.collecting.reader import fingerprint
from eva_lora.collecting.rows import FITS_NO_MASK, IN_NO_KNOWN_ORDER, RowMask, RowMemory, sides_of
from support.models import lora, tiny_llama, token_batches
from support.plain_calls import EXACT, initialised, recorded, require_directions_of
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


class Net(nn.Module):
    """Rows to rows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x, **_):
        return self.b(torch.tanh(self.a(x)))


def net():
    return peft.get_peft_model(Net(), peft.LoraConfig(r=3, target_modules=["a", "b"]))


def ragged(count, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(3, 0.2, width)
    return [[torch.randn(n, width, generator=generator) * spread for n in (5, 1 + i, 7)] for i in range(count)]


def padding_free(layout):
    return [torch.nested.nested_tensor(pieces, layout=layout) for pieces in ragged(4)]


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=["jagged", "strided"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_nested_tensors_bring_the_rows_of_their_sequences(layout):
    batches, model = padding_free(layout), net()
    report = initialised(model, batches)
    assert {state["rows"] for state in report.statistic.values()} == {"all rows: nested tensors hold no padding"}
    rows = [torch.cat(pieces) for pieces in ragged(4)]
    require_directions_of(model, recorded(model, rows, lambda model, batch: model(batch)))
    assert len({fingerprint(batch) for batch in batches}) == 4


def test_nested_labels_leave_rows_out_of_nested_tensors():
    model, pieces = net(), ragged(4)
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

    class Odd(Net):
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


# --- how rows lie

STEPS_OF_ROWS = {
    "linear": lambda x: nn.functional.linear(x, torch.eye(x.shape[1])),
    "biased": lambda x: nn.functional.linear(x, torch.eye(x.shape[1]), torch.zeros(x.shape[1])),
    "product": lambda x: x @ torch.eye(x.shape[1]),
    "pointwise": lambda x: torch.relu(x) + 0 * x,
    "in place": lambda x: x.clone().add_(0.0),
    "heads": lambda x: x.view(len(x), 2, 2).contiguous().view(len(x), 4),
    "halves": lambda x: torch.cat(x.chunk(2, -1), -1),
    "gate": lambda x: x * torch.ones(len(x), 1),
    "narrow": lambda x: x.double().float(),
    "sort": lambda x: x.sort(0, descending=True).values,
    "flip": lambda x: x.flip(0),
    "index": lambda x: x[torch.arange(len(x)).flip(0)],
    "roll": lambda x: x.roll(1, 0),
}


class TimeMajor(nn.Module):
    """Layers that see (tokens, batch, d), and one that sees (batch, tokens, d)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.before, self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, attention_mask):
        x = torch.tanh(self.before(x)).transpose(0, 1)
        return self.b(torch.tanh(self.a(x))[:, :, None].expand(-1, -1, 2, -1))


def time_major(shapes, seed=0):
    """Batches whose padding is unlike their tokens, so that what is taken for what shows."""
    generator, batches = torch.Generator().manual_seed(seed), []
    for count, length in shapes:
        keep = torch.arange(length) < torch.randint(1, length, (count, 1), generator=generator)
        x = torch.randn(count, length, 8, generator=generator) * torch.linspace(3, 0.1, 8)
        x[~keep] = torch.randn(int((~keep).sum()), 8, generator=generator) * torch.linspace(0.1, 9, 8)
        batches.append({"x": x, "attention_mask": keep})
    model = peft.get_peft_model(TimeMajor(), peft.LoraConfig(r=3, target_modules=["before", "a", "b"]))
    return model, batches


def rows_kept(batches):
    def kept(name, number, x):
        mask = batches[number]["attention_mask"]
        return mask if name == "before" else mask.T

    return kept


def test_a_square_batch_is_read_as_earlier_ones_were():
    model, batches = time_major([(3, 7), (6, 6), (6, 6), (6, 6), (5, 5)])
    report = initialised(model, batches)
    assert {state["rows"] for state in report.statistic.values()} == {"attention_mask"}
    require_directions_of(model, recorded(model, batches), rows_kept(batches))


def test_a_pass_that_goes_on_from_a_file_remembers_how_rows_lie(tmp_path):
    model, batches = time_major([(3, 7), (6, 6), (5, 5)])
    options = {"checkpoint": tmp_path / "pass.safetensors", "checkpoint_every": 1, "progress": False}

    def cut_off(model, batch):
        if len(batch["x"]) == 6:
            raise KeyboardInterrupt
        model(**batch)

    with pytest.raises(KeyboardInterrupt):
        eva_initialize(model, batches, EXACT, forward_fn=cut_off, **options)
    eva_initialize(model, batches, EXACT, forward_fn=lambda model, batch: model(**batch), **options)
    require_directions_of(model, recorded(model, batches), rows_kept(batches))


def test_a_batch_that_was_read_the_wrong_way_round_is_not_passed_over():
    model, batches = time_major([(6, 6), (3, 7)])
    with pytest.raises(ValueError, match=r"^layer a: its rows \(7, 3\) lie \(tokens, batch\), those of earlier"):
        initialised(model, batches)
    model, batches = time_major([(6, 6), (5, 5)])
    with pytest.warns(
        UserWarning, match=r"^the masks of 3 layers, the first is before, were read as \(batch, tokens\)"
    ):
        report = initialised(model, batches)
    assert all("as many sequences as tokens" in state["rows"] for state in report.statistic.values())


@pytest.mark.filterwarnings("error:the masks of")
def test_a_square_first_batch_whose_reading_proves_right_is_not_remarked_on():
    batches = time_major([(6, 6), (3, 7)])[1]
    model = net()
    report = initialised(model, batches)
    assert {state["rows"] for state in report.statistic.values()} == {"attention_mask"}
    require_directions_of(model, recorded(model, batches), lambda name, number, x: batches[number]["attention_mask"])


class Flattened(nn.Module):
    """Layers that see (batch·tokens, d), in this order or another; ``down`` sees what no view shows to be flattened."""

    def __init__(self, order):
        super().__init__()
        torch.manual_seed(0)
        self.order = order
        self.router, self.gate, self.up, self.down = nn.Linear(8, 3), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8, elementwise_affine=False)

    def forward(self, x, attention_mask):
        shape = x.shape
        if self.order == "tokens first":
            x = x.transpose(0, 1)
        x = x.reshape(-1, 8)
        scores = self.router(x).argmax(1)
        if self.order == "sorted":
            x = x[scores.argsort(stable=True)]
        x = x + self.down(nn.functional.silu(self.gate(self.norm(x))) * self.up(x))
        return x.view(shape) if self.order != "tokens first" else x.view(shape[1], shape[0], 8)


def flattened(order, shapes):
    targets = ["router", "gate", "up", "down"]
    model = peft.get_peft_model(Flattened(order), peft.LoraConfig(r=3, target_modules=targets))
    return model, time_major(shapes)[1]


@pytest.mark.parametrize("order", ["sequences first", "tokens first"])
@pytest.mark.parametrize("shapes", [[(3, 7), (4, 5)], [(3, 7), (6, 6), (5, 5)]], ids=["", "square ones too"])
@pytest.mark.filterwarnings("error:the inputs of", "error:the masks of")
def test_flattened_rows_are_read_in_the_order_they_lie_in(order, shapes):
    model, batches = flattened(order, shapes)
    calls = recorded(model, batches)
    report = initialised(model, batches)
    assert {state["rows"] for state in report.statistic.values()} == {"attention_mask"}
    masks = [batch["attention_mask"] if order == "sequences first" else batch["attention_mask"].T for batch in batches]
    require_directions_of(model, calls, lambda name, number, x: masks[number].reshape(-1))


def test_a_forward_that_fails_where_it_is_looked_at_runs_without(recwarn):
    class Shy(Flattened):
        def forward(self, x, attention_mask):
            rows = super().forward(x, attention_mask)  # after its layers were called
            if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
                raise NotImplementedError
            return rows

    base, (_, batches) = Shy("sequences first"), flattened("", [(3, 7), (4, 5)])
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=["router", "gate", "down"]))
    calls = recorded(model, batches)
    report = initialised(model, batches)
    assert report.num_rows == sum(int(batch["attention_mask"].sum()) for batch in batches)
    masks = [batch["attention_mask"].reshape(-1) for batch in batches]
    require_directions_of(model, calls, lambda name, number, x: masks[number])


def test_rows_that_are_put_in_another_order_count_whole_and_are_named():
    model, batches = flattened("sorted", [(3, 7), (4, 5)])
    calls = recorded(model, batches)
    with pytest.warns(UserWarning, match=r"^the inputs of 3 layers, the first is gate, have one row per token, in an"):
        report = initialised(model, batches)
    masks = [batch["attention_mask"].reshape(-1) for batch in batches]
    assert report.statistic["down"]["rows"] == IN_NO_KNOWN_ORDER
    require_directions_of(model, calls, lambda name, number, x: masks[number] if name == "router" else None)


def test_flattened_rows_of_square_batches_are_read_sequences_first_until_another_batch_tells():
    model, batches = flattened("sequences first", [(6, 6), (5, 5)])
    with pytest.warns(UserWarning, match=r"^the masks of 4 layers, .* were read as \(batch, tokens\)"):
        initialised(model, batches)
    model, batches = flattened("sequences first", [(6, 6), (3, 7)])
    report = initialised(model, batches)
    assert {state["rows"] for state in report.statistic.values()} == {"attention_mask"}
    model, batches = flattened("tokens first", [(6, 6), (3, 7)])
    with pytest.raises(ValueError, match=r"^layer router: its rows \(21,\) lie \(tokens, batch\), those of earlier"):
        initialised(model, batches)


def test_flattened_rows_of_batches_without_padding_need_no_order():
    model, batches = flattened("sorted", [(3, 7), (6, 6)])
    for batch in batches:
        batch["attention_mask"][:] = True
    report = initialised(model, batches)
    assert {state["rows"] for state in report.statistic.values()} == {"attention_mask"}


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(sorted(STEPS_OF_ROWS)), max_size=6), st.booleans(), st.integers(2, 4), st.integers(5, 6)
)
def test_the_order_of_rows_is_followed_or_not_known(steps, sequences_first, batch, tokens):
    """Each row holds the number of its token, which the steps leave as it is."""
    number = torch.arange(batch * tokens).reshape(batch, tokens, 1)
    x = number.expand(-1, -1, 4).float()
    origins = Origins(shapes=[(batch, tokens)])
    with torch.no_grad(), origins:
        rows = (x if sequences_first else x.transpose(0, 1)).reshape(-1, 4)
        for step in steps:
            rows = STEPS_OF_ROWS[step](rows)
        order = origins.is_batch_first(rows)
    expected = (number if sequences_first else number.transpose(0, 1)).reshape(-1)
    if order is not None:
        assert order == sequences_first
        assert torch.equal(rows[:, 0].round().long(), expected)
    assert (order is None) == bool({"sort", "flip", "index", "roll"} & set(steps))


def test_rows_that_are_no_tokens_are_not_taken_for_them_once_they_are_as_many():
    memory, cpu = RowMemory(), torch.device("cpu")
    first = RowMask(torch.tensor([[True, True, False]] * 2), 4, "attention_mask", memory=memory)
    assert first.of_rows((2, 5), cpu, "patches") == (None, 10)
    later = RowMask(torch.tensor([[True] * 4 + [False]] * 2), 8, "attention_mask", memory=memory)
    assert later.of_rows((2, 5), cpu, "patches") == (None, 10)
    assert later.of_rows((2, 5), cpu, "patches") == (None, 10)
    assert later.rules == {"patches": {FITS_NO_MASK}}
    assert later.of_rows((2, 5), cpu, "tokens")[1] == 8


def test_a_layer_that_sees_tokens_and_others_masks_its_tokens():
    memory, cpu = RowMemory(), torch.device("cpu")
    for _ in range(2):
        mask = RowMask(torch.tensor([[True, True, False]] * 2), 4, "attention_mask", memory=memory)
        assert mask.of_rows((2, 5), cpu, "both") == (None, 10)
        assert mask.of_rows((2, 3), cpu, "both")[1] == 4


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 5), st.data(),
    st.sampled_from(["tokens", "flat", "transposed", "heads", "sequences", "other"]),
)  # fmt: skip
def test_an_input_of_any_shape_gets_the_mask_of_its_rows(batch, tokens, data, layout):
    bits = data.draw(st.lists(st.booleans(), min_size=batch * tokens, max_size=batch * tokens))
    mask = torch.tensor(bits).reshape(batch, tokens)
    labelled = torch.arange(batch * tokens).reshape(batch, tokens)  # every row holds the number of its token
    rows = labelled[..., None].float()
    shapes = {
        "tokens": rows,
        "flat": rows.view(-1, 1),
        "transposed": rows.transpose(0, 1),
        "heads": rows[:, :, None].expand(batch, tokens, 3, 1),
        "sequences": rows[:, 0],
        "other": torch.zeros(batch + 6, 2, tokens + 7, 1),
    }
    x = shapes[layout]
    own = RowMask(mask, int(mask.sum()), "given")
    got, count = own.of(x, "layer")
    kept = (x[..., 0] if got is None else x[..., 0][got]).flatten()
    assert count == kept.numel()
    if layout == "other":
        assert own.rules == {"layer": {FITS_NO_MASK}}
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


def written_into(buffer, x):
    buffer[1] = x
    return buffer


WAYS = {
    "pointwise": lambda x: torch.tanh(x) + 1,
    "a view": lambda x: x.transpose(0, 1)[:2],
    "a product": lambda x: torch.ones(5, 3) @ x,
    "in place": lambda x: torch.zeros(3, 4).add_(x),
    "written into": lambda x: written_into(torch.zeros(2, 3, 4), x),
    "written through a view": lambda x: written_into(torch.zeros(4, 3, 4)[::2], x)._base,
    "out": lambda x: torch.add(x, 1, out=torch.zeros(3, 4)),
    "scattered": lambda x: torch.zeros(3, 4).masked_scatter(torch.ones(3, 4).bool(), x),
    "put": lambda x: torch.zeros(3, 4).index_put((torch.arange(3),), x),
    "looked up": lambda x: nn.functional.embedding((x > 0).long(), torch.ones(2, 3)),
    "attention": lambda x: nn.functional.scaled_dot_product_attention(*[x[None]] * 3),
    "vmap": lambda x: torch.vmap(lambda row: row * 2)(x),
    "one of two branches": lambda x: torch.cond(x.sum() > 9, lambda x: x + 1, lambda x: x - 1, (x,)),
    "in a list": lambda x: torch._foreach_mul([x, x], 2)[1],
}


SEES_CONTROL_FLOW = pytest.mark.skipif(
    not hasattr(TorchDispatchMode, "supports_higher_order_operators"), reason="no mode of this torch sees control flow"
)


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=SEES_CONTROL_FLOW) if way == "one of two branches" else way for way in WAYS]
)
def test_what_a_tensor_is_made_of_is_seen(way):
    tokens, image = torch.randn(3, 4), torch.randn(3, 4)
    origins = Origins([tokens], (), [image])
    with torch.no_grad(), origins:
        assert origins.of(WAYS[way](tokens)) == OF_ENCODER
        assert origins.of(WAYS[way](image)) == OF_OTHERS
        assert origins.of(WAYS[way](image * 2 + tokens)) == OF_ENCODER | OF_OTHERS
        assert origins.of(WAYS[way](torch.randn(3, 4))) == 0
    assert origins.of(tokens) == OF_ENCODER


class Looking(nn.Module):
    """Layers of images, of text, and of both; images and texts have as many rows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.patch = nn.Embedding(40, 8), nn.Linear(12, 8)
        self.vision, self.vision_head = nn.Linear(8, 8), nn.Linear(8, 8)
        self.key, self.query, self.text = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, input_ids, pixel_values, attention_mask):
        seen = torch.tanh(self.vision(self.patch(pixel_values)))
        seen = self.vision_head(seen)
        words = self.embed(input_ids)
        words = words + torch.softmax(self.query(words) @ self.key(seen).mT, -1) @ seen
        return self.text(words)


@pytest.mark.parametrize("lengths", [(7, 7, 7), (7, 5, 7), (5, 7, 7)], ids=str)
def test_as_many_image_rows_as_tokens_do_not_take_the_texts_mask(lengths):
    targets = ["vision", "vision_head", "key", "query", "text"]
    model = peft.get_peft_model(Looking(), peft.LoraConfig(r=3, target_modules=targets))
    generator, batches = torch.Generator().manual_seed(0), []
    for length in lengths:
        ids = torch.randint(0, 40, (3, length), generator=generator)
        keep = torch.arange(length) < torch.tensor([length, 3, 4])[:, None]
        pixels = torch.randn(3, 7, 12, generator=generator)
        batches.append({"input_ids": ids, "pixel_values": pixels, "attention_mask": keep})
    calls = recorded(model, batches)
    with pytest.warns(UserWarning, match=r"^the inputs of 3 layers, the first is vision, have rows that fit no mask"):
        report = initialised(model, batches)
    for name in targets:
        of_text = name in ("query", "text")
        assert report.statistic[name]["rows"] == ("attention_mask" if of_text else FITS_NO_MASK), name
    masks = [batch["attention_mask"] for batch in batches]
    require_directions_of(model, calls, lambda name, number, x: masks[number] if name in ("query", "text") else None)


def test_a_layer_of_texts_and_images_masks_its_texts_alone():
    class Shared(Looking):
        def forward(self, input_ids, pixel_values, attention_mask):
            return self.text(torch.tanh(self.text(self.patch(pixel_values))) + self.text(self.embed(input_ids)))

    model = peft.get_peft_model(Shared(), peft.LoraConfig(r=3, target_modules=["text"]))
    generator, batches = torch.Generator().manual_seed(0), []
    for _ in range(4):
        keep = torch.arange(7) < torch.tensor([7, 3, 4])[:, None]
        ids = torch.randint(0, 40, (3, 7), generator=generator)
        batches.append({"input_ids": ids, "pixel_values": torch.randn(3, 7, 12, generator=generator),
                        "attention_mask": keep})  # fmt: skip
    calls = recorded(model, batches)  # of images, of text, of both
    with pytest.warns(UserWarning, match=r"have rows that fit no mask"):
        initialised(model, batches)
    number_of = {id(x): i % 3 for i, (_, x) in enumerate(calls["text"])}
    keep = batches[0]["attention_mask"]
    require_directions_of(model, calls, lambda name, number, x: None if number_of[id(x)] == 0 else keep)


# --- an encoder and a decoder


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


def test_encoder_and_decoder_that_cannot_be_told_apart_are_refused_by_name():
    compiled = t5()
    compiled.base_model.model = torch.compile(compiled.base_model.model, backend="eager")  # no look into its forward
    with pytest.raises(ValueError, match=r"^layer decoder\.block\.0\..*q: its input has rows \(3, 6\), and so have"):
        run(seq2seq_batches([(6, 6)]), compiled)


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
    assert not sides_of(net().modules(), []).two


def test_fields_of_a_decoder_show_that_there_is_one():
    mask = torch.ones(2, 5).bool()
    found = row_mask({"x": torch.zeros(2, 7), "decoder_attention_mask": mask.tril()}, CONFIG, None)
    assert torch.equal(found.decoder.mask, mask.tril())
    assert found.mask is None


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
