"""Any loader, any batch, any mask; and what happens to rows that cannot be used."""

import collections
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BatchEncoding,
)

from eva_lora import EvaConfig, collect
from eva_lora.collecting.batches import to_device
from eva_lora.collecting.reader import BatchReader, fingerprint
from support.tiny import tiny_batches, tiny_model

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
