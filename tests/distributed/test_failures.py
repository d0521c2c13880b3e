"""A rank that fails, in every phase of a pass: all ranks end, soon, and with what it said."""

import os
import time

import pytest
import torch

from eva_lora import EvaConfig, eva_initialize
from support.models import lora, lora_a_of, tiny_llama, token_batches
from support.ranks import GROUP_TIMEOUT, Raised, on_ranks

BATCHES = token_batches(count=4, shape=(2, 24))


class Broken(Exception):
    """No error that others know."""


def failing_loader(error, after):
    yield from BATCHES[:after]
    raise error


def at_batch(number, action):
    """A forward that acts on a batch of that number."""
    seen = 0

    def forward(model, batch):
        nonlocal seen
        seen += 1
        if seen == number:
            action()
        return model(**batch)

    return forward


def leave():
    os._exit(1)


def fail(error):
    def action():
        raise error

    return action


def run(rank, loader=BATCHES, **options):
    model = lora(tiny_llama())
    before = {name: a.clone() for name, a in lora_a_of(model).items()}
    config = options.pop("config", None) or EvaConfig(max_batches=4)
    try:
        eva_initialize(model, loader, config, progress=False, **options)
    finally:
        unchanged = all(torch.equal(a, before[name]) for name, a in lora_a_of(model).items())
        assert unchanged
        assert model.training
    return "came through"


def on_two(of_bad_rank, size=2, bad=1):
    """Run on ranks of which one gets other arguments; returns what each raised, and checks the time it took."""
    start = time.monotonic()
    results = on_ranks(size, lambda rank: run(rank, **(of_bad_rank if rank == bad else {})), may_raise=True)
    assert time.monotonic() - start < GROUP_TIMEOUT / 2
    return results


@pytest.mark.parametrize("after", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_loader_that_raises_ends_all_ranks_with_its_error(after):
    good, bad = on_two({"loader": failing_loader(ValueError("no such shard"), after)})
    assert (bad.kind, bad.message) == ("ValueError", "no such shard")
    assert (good.kind, good.message) == ("ValueError", "rank 1 failed: no such shard")


def test_a_forward_that_raises_ends_all_ranks_and_unknown_errors_keep_their_name():
    results = on_two({"forward_fn": at_batch(3, fail(Broken("lost a fan")))}, size=4, bad=2)
    assert (results[2].kind, results[2].message) == ("Broken", "lost a fan")
    for rank in (0, 1, 3):
        assert (results[rank].kind, results[rank].message) == ("RuntimeError", "rank 2 failed: Broken: lost a fan")


@pytest.mark.parametrize("number", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_nan_on_one_rank_is_told_with_layer_and_batch_by_all(number):
    def forward(model, batch):
        forward.seen += 1
        embeddings = model.get_input_embeddings()(batch["input_ids"])
        if forward.seen >= number:  # NaN in the batch and in the second look at it
            embeddings[0, 3] = torch.nan
        return model(inputs_embeds=embeddings)

    forward.seen = 0
    good, bad = on_two({"forward_fn": forward})
    assert bad.kind == "ValueError"
    assert "NaN or Inf reached the input of model.layers.0.self_attn.q_proj" in bad.message
    assert good.message == f"rank 1 failed: {bad.message}"


@pytest.mark.slow
def test_a_rank_that_is_told_something_else_to_do_ends_all_before_work_starts():
    good, bad = on_two({"loader": 3})
    assert bad.kind == good.kind == "TypeError"
    assert good.message == "rank 1 failed: loader: expected an iterable of batches, got int"


def test_a_rank_that_dies_without_a_word_ends_the_others():
    good, bad = on_two({"forward_fn": at_batch(2, leave)})
    assert bad is None
    assert isinstance(good, Raised)
    assert good.kind == "RuntimeError"
    assert "another rank of the process group is gone" in good.message


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_others_when_the_group_says_so():
    results = on_ranks(
        2,
        lambda rank: run(rank, forward_fn=at_batch(2, lambda: time.sleep(8)) if rank else None),
        group_timeout=2.0, may_raise=True,
    )  # fmt: skip
    assert results[0].kind == "RuntimeError"
    assert "did not answer within 0:00:04" in results[0].message


@pytest.mark.slow
def test_data_on_no_rank_and_groups_that_are_none_are_refused_by_all():
    empty = on_ranks(2, lambda rank: run(rank, loader=[]), may_raise=True)
    assert {r.message for r in empty} == {"loader: expected at least one batch, it is empty on every rank"}
    wrong = on_ranks(2, lambda rank: run(rank, process_group=3), may_raise=True)
    assert {r.kind for r in wrong} == {"TypeError"}
