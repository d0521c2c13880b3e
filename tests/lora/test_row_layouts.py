"""How a layer's rows lie beside the tokens that a mask is of, and what they are made of: seen, or said not to be."""

from functools import partial

import peft
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from eva_lora import EvaConfig, collect, eva_initialize
from eva_lora.collecting import forwards
from eva_lora.collecting.origins import OF_ENCODER, OF_OTHERS, Origins
from eva_lora.collecting.rows import FITS_NO_MASK, IN_NO_KNOWN_ORDER, UNSEEN, RowMask, RowMemory
from support.models import rows_to_rows
from support.plain_calls import EXACT, initialised, recorded, require_directions_of
from support.versions import needs
from support.wrappers import FIXED

pytestmark = pytest.mark.filterwarnings("ignore:EVA stopped at")

CONFIG = EvaConfig(max_batches=4, tau=1.0)


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
    model = rows_to_rows()
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


OF_LOOKING = ["vision", "vision_head", "key", "query", "text"]
NAMED = r"^the inputs of 3 layers, the first is vision, have rows that fit no mask"


def looking():
    return peft.get_peft_model(Looking(), peft.LoraConfig(r=3, target_modules=OF_LOOKING))


def image_batches(lengths):
    """Of seven image rows, and so many tokens, in each of three samples."""
    generator, batches = torch.Generator().manual_seed(0), []
    for length in lengths:
        ids = torch.randint(0, 40, (3, length), generator=generator)
        keep = torch.arange(length) < torch.tensor([length, 3, 4])[:, None]
        pixels = torch.randn(3, 7, 12, generator=generator)
        batches.append({"input_ids": ids, "pixel_values": pixels, "attention_mask": keep})
    return batches


@pytest.mark.parametrize("lengths", [(7, 7, 7), (7, 5, 7), (5, 7, 7)], ids=str)
def test_as_many_image_rows_as_tokens_do_not_take_the_texts_mask(lengths):
    model, batches = looking(), image_batches(lengths)
    calls = recorded(model, batches)
    with pytest.warns(UserWarning, match=NAMED):
        report = initialised(model, batches)
    for name in OF_LOOKING:
        of_text = name in ("query", "text")
        assert report.statistic[name]["rows"] == ("attention_mask" if of_text else FITS_NO_MASK), name
    masks = [batch["attention_mask"] for batch in batches]
    require_directions_of(model, calls, lambda name, number, x: masks[number] if name in ("query", "text") else None)


@pytest.fixture
def alone(tmp_path):
    """A process group of one rank, as wrappers need it."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch._dynamo.reset()


@pytest.mark.usefixtures("alone")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(partial(torch.compile, backend="aot_eager"), id="torch.compile"),
        pytest.param(FIXED["module.compile"], id="module.compile"),
        pytest.param(DistributedDataParallel, id="DistributedDataParallel"),
        pytest.param(partial(FullyShardedDataParallel, use_orig_params=True, device_id=torch.device("cpu")), id="FSDP"),
        pytest.param(fully_shard, id="fully_shard", marks=needs("torch>=2.7")),
        pytest.param(FIXED["DeepSpeedEngine"], id="DeepSpeedEngine"),
    ],
)
def test_image_rows_do_not_take_the_texts_mask_in_a_wrapper_either(wrap):
    plain = collect(looking(), image_batches([7, 7, 7]), CONFIG, progress=False)
    with pytest.warns(UserWarning, match=NAMED):
        statistics = collect(wrap(looking()), image_batches([7, 7, 7]), CONFIG, progress=False)
    assert [site.rows for site in statistics.sites] == [site.rows for site in plain.sites]
    assert [i.num_rows for i in statistics.inputs] == [i.num_rows for i in plain.inputs]


def test_rows_that_could_be_an_images_are_named_where_it_is_not_seen_what_they_are_made_of(monkeypatch):
    monkeypatch.setattr(forwards, "is_partitioned", lambda parameter: True)  # no look into its forward
    says = r"^the inputs of 5 layers, the first is vision, have as many rows as the batch has tokens and were masked"
    with pytest.warns(UserWarning, match=says):
        report = initialised(looking(), image_batches([7, 7, 7]))
    assert {state["rows"] for state in report.statistic.values()} == {"attention_mask" + UNSEEN}
    with pytest.warns(UserWarning, match=r"^the inputs of 2 layers, the first is query, have as many rows as"):
        report = initialised(looking(), image_batches([5, 6, 8]))
    assert report.statistic["vision"]["rows"] == FITS_NO_MASK


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
