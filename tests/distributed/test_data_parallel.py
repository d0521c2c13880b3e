"""Several ranks, each with its own shard: what one rank fed all of it would have found."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from eva_lora import EvaConfig, collect, eva_initialize
from eva_lora.collecting import rerunning
from support.agreement import (
    require_captured_as_well,
    require_equal,
    require_ranks_equal_but_for_ties,
    rounding_of_scatters,
)
from support.bounds import product_rounding
from support.models import (
    layer_inputs,
    load_minilm,
    lora,
    lora_a_of,
    minilm_text_batches,
    scatter,
    tiny_llama,
    token_batches,
)
from support.ranks import on_ranks
from support.stateful import Counter
from support.tiny import tiny_batches

MINILM = {"target_modules": ["query", "intermediate.dense"], "layers_to_transform": [0, 3], "r": 8}


pytestmark = pytest.mark.filterwarnings("ignore:EVA stopped at")


def shard(batch, rank, size):
    """The part of a batch that a rank has; all ranks' parts, one after the other, are the batch."""
    pieces = {name: value.tensor_split(size) for name, value in batch.items()}
    return {name: parts[rank] for name, parts in pieces.items()}


def collected(model, batches, **options):
    return collect(model, batches, EvaConfig(**options), progress=False)


def require_same_bits(results):
    for other in results[1:]:
        assert [i.num_rows for i in other.inputs] == [i.num_rows for i in results[0].inputs]
        assert [i.total_scatter for i in other.inputs] == [i.total_scatter for i in results[0].inputs]
        for mine, its in zip(results[0].inputs, other.inputs, strict=True):
            assert torch.equal(mine.components, its.components)
            assert torch.equal(mine.eigenvalues, its.eigenvalues)
        assert (other.history, other.stop_reason, other.notes) == (
            results[0].history, results[0].stop_reason, results[0].notes
        )  # fmt: skip


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_exact_statistics_are_those_of_one_rank_to_rounding(size):
    batches = token_batches(count=6, shape=(8, 24))
    options = {"statistic": "gram", "max_batches": 6}
    one = collected(lora(tiny_llama()), batches, **options)
    results = on_ranks(
        size, lambda rank: collected(lora(tiny_llama()), [shard(b, rank, size) for b in batches], **options)
    )
    require_same_bits(results)
    require_equal(results[0], one, rounding_of_scatters(lambda: lora(tiny_llama()), batches))
    require_ranks_equal_but_for_ties(one, results[0])


class Counting(nn.Module):
    """Goes by the number of its calls, which it keeps in a place of its own, and doubles its batch in place."""

    def __init__(self, place):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.place = nn.Linear(12, 12), place
        self.calls, self.plain, self.count = 0, torch.zeros(()), Counter()
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x):
        x.mul_(2)
        self.calls += 1
        calls = {"number": lambda: self.calls, "tensor": lambda: self.plain.add_(1),
                 "buffer": lambda: self.total.add_(1), "object": self.count}  # fmt: skip
        return self.a(x * float(calls[self.place]()))


def counting(place):
    return get_peft_model(Counting(place), LoraConfig(r=2, target_modules=["a"]))


@pytest.mark.parametrize("place", ["number", "tensor", "buffer", "object"])
def test_the_first_batch_which_runs_twice_is_one_call_to_a_model_that_counts(place):
    batches = [{"x": batch["x"]} for batch in tiny_batches(3, (4, 9))]
    options = {"statistic": "gram", "max_batches": 3}
    one = collected(counting(place), copy.deepcopy(batches), **options)
    results = on_ranks(
        2, lambda rank: collected(counting(place), [shard(copy.deepcopy(b), rank, 2) for b in batches], **options)
    )
    require_same_bits(results)
    require_equal(
        results[0], one, product_rounding("reference", 3 * 4 * 9, 12)
    )  # the rows are the same to the last bit


def test_a_first_batch_that_cannot_be_run_twice_is_refused(monkeypatch):
    monkeypatch.setattr(rerunning, "CONTENT_BYTES", 0)

    def fails(rank):
        with pytest.raises(RuntimeError, match=r'batch 1 is run twice .* edits a tensor .* \(process_group="off"\)'):
            collected(counting("buffer"), [{"x": batch["x"]} for batch in tiny_batches(3, (4, 9))])

    on_ranks(2, fails)


def test_a_first_batch_whose_model_cannot_be_put_back_in_between_says_so():
    def speaks():
        model = counting("number")
        model.opaque = iter([])
        with pytest.warns(UserWarning, match=r"^batch 1 is run twice .* holds builtins.list_iterator, which"):
            collected(model, [{"x": batch["x"]} for batch in tiny_batches(3, (4, 9))], max_batches=2)

    on_ranks(2, lambda rank: speaks() if rank == 0 else collected(
        counting("number"), [{"x": batch["x"]} for batch in tiny_batches(3, (4, 9))], max_batches=2)
    )  # fmt: skip


@pytest.fixture(scope="module")
def text():
    """Real paragraphs on MiniLM: batches, every input's scatter, and what that may be off by."""
    batches = [{name: value[:8] for name, value in batch.items()} for batch in minilm_text_batches()[:3]]
    model = lora(load_minilm(), **MINILM)
    scatters = {name: scatter(rows) for name, rows in layer_inputs(model, batches).items()}
    return model, batches, scatters, rounding_of_scatters(lambda: lora(load_minilm(), **MINILM), batches)


@pytest.mark.parametrize("size", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))])  # 3: uneven parts
def test_subspaces_on_real_text_capture_what_those_of_one_rank_do(text, size):
    model, batches, scatters, rounding = text
    options = {"statistic": "subspace", "max_batches": 3}
    one = collected(model, batches, **options)
    results = on_ranks(size, lambda rank: collected(model, [shard(b, rank, size) for b in batches], **options))
    require_same_bits(results)
    assert results[0].num_rows == one.num_rows
    require_ranks_equal_but_for_ties(one, results[0])
    require_captured_as_well(results[0], one, scatters, rounding)


def test_uneven_and_empty_shards_end_cleanly_and_every_row_counts_once_a_round():
    batches = token_batches(count=5, shape=(4, 24))
    shards = {0: batches[:3], 1: [], 2: batches[3:4], 3: batches[4:]}
    together = [  # what every step brings in all, the ranks' batches one after the other
        {"input_ids": torch.cat([shards[rank][step]["input_ids"] for rank in range(4) if step < len(shards[rank])])}
        for step in range(3)
    ]
    options = {"statistic": "gram", "max_batches": 7, "tau": 1.0}
    one = collected(lora(tiny_llama()), together, **options)
    results = on_ranks(4, lambda rank: collected(lora(tiny_llama()), shards[rank], **options))
    require_same_bits(results)
    assert [i.num_rows for i in results[0].inputs] == [i.num_rows for i in one.inputs]
    assert results[0].num_batches == one.num_batches == 7  # two rounds and the first step of a third
    require_equal(results[0], one, rounding_of_scatters(lambda: lora(tiny_llama()), together * 3))


def test_bounds_are_global_and_loaders_that_cannot_start_again_end_the_pass():
    batches = token_batches(count=4, shape=(4, 24))

    def check(rank):
        mine = [shard(b, rank, 2) for b in batches]
        rows = collected(lora(tiny_llama()), mine, max_rows=4 * 24 + 1)
        data = collected(lora(tiny_llama()), iter(mine[: 1 + rank]), tau=1.0)
        return rows.num_batches, rows.num_rows, rows.stop_reason, data.num_batches, data.num_rows, data.stop_reason

    expected = (2, 2 * 4 * 24, f"max_rows ({4 * 24 + 1})", 2, 3 * 2 * 24, "end of the data")
    assert on_ranks(2, check) == [expected] * 2


def test_models_are_equal_on_all_ranks_and_only_one_rank_warns():
    batches = token_batches(count=4, shape=(4, 24))

    def check(rank):
        model = lora(tiny_llama())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = eva_initialize(model, [shard(b, rank, 2) for b in batches], EvaConfig(max_batches=4))
        said = [str(w.message) for w in caught if "EVA stopped" in str(w.message)]
        return lora_a_of(model), report.ranks, report.num_rows, len(said)

    (first, ranks, rows, warned), (second, other_ranks, other_rows, other_warned) = on_ranks(2, check)
    assert (ranks, rows) == (other_ranks, other_rows)
    assert (warned, other_warned) == (1, 0)
    assert all(torch.equal(second[name], a) for name, a in first.items())


@pytest.mark.slow
def test_a_group_can_be_left_out_or_be_a_part_of_the_ranks():
    batches = token_batches(count=2, shape=(4, 24))

    def check(rank):
        pairs = [torch.distributed.new_group(pair) for pair in ([0, 1], [2, 3])]
        mine = [shard(b, rank % 2, 2) for b in batches]
        alone = collect(lora(tiny_llama()), mine, EvaConfig(max_batches=2), progress=False, process_group="off")
        paired = collect(
            lora(tiny_llama()), mine, EvaConfig(max_batches=2), progress=False, process_group=pairs[rank // 2]
        )
        return alone.num_rows, paired.num_rows

    assert on_ranks(4, check) == [(2 * 2 * 24, 2 * 4 * 24)] * 4


@pytest.mark.parametrize("criterion", ["component", pytest.param("captured", marks=pytest.mark.slow)])
def test_every_criterion_decides_as_one_rank_does(criterion):
    batches = token_batches(count=4, shape=(8, 24))
    options = {"convergence": criterion, "statistic": "subspace", "tau": 0.9, "max_batches": 30}
    one = collected(lora(tiny_llama()), batches, **options)
    results = on_ranks(2, lambda rank: collected(lora(tiny_llama()), [shard(b, rank, 2) for b in batches], **options))
    require_same_bits(results)
    assert abs(results[0].num_batches - one.num_batches) <= 1
    assert results[0].stop_reason == one.stop_reason
