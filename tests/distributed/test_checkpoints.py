"""A pass of several ranks that was cut off: to the bit with as many ranks, and from where it was with others."""

import pytest
import torch

from eva_lora import EvaConfig, collect
from support.models import lora, tiny_llama, token_batches
from support.ranks import on_ranks

pytestmark = pytest.mark.filterwarnings("ignore:EVA stopped at")

BATCHES = token_batches(count=7, shape=(4, 24))
SHARDS = {2: [BATCHES[:4], BATCHES[4:]], 4: [BATCHES[:2], BATCHES[2:4], BATCHES[4:6], BATCHES[6:]]}


class Cut(Exception):
    pass


def counted(forwards):
    """A forward that gives up after so many."""
    left = forwards

    def forward(model, batch):
        nonlocal left
        left -= 1
        if left < 0:
            raise Cut
        return model(**batch)

    return forward


def a_pass(loader, path, *, statistic="subspace", every=2, forward_fn=None):
    config = EvaConfig(statistic=statistic, tau=1.0, max_batches=12)
    return collect(
        lora(tiny_llama()), loader, config, forward_fn=forward_fn or counted(10**6), progress=False, checkpoint=path,
        checkpoint_every=every,
    )  # fmt: skip


def cut_off(rank, path, **options):
    """A pass that ends in the middle of a round, after a checkpoint, with rows since the last refresh."""
    with pytest.raises((Cut, RuntimeError)):
        a_pass(SHARDS[2][rank], path, forward_fn=counted(8) if rank == 0 else None, **options)


@pytest.mark.parametrize("statistic", [pytest.param("gram", marks=pytest.mark.slow), "subspace"])
def test_with_as_many_ranks_it_goes_on_to_the_bit(tmp_path, statistic):
    def check(rank):
        whole = a_pass(SHARDS[2][rank], tmp_path / "whole", statistic=statistic)
        cut_off(rank, tmp_path / "cut", statistic=statistic)
        again = a_pass(SHARDS[2][rank], tmp_path / "cut", statistic=statistic)
        return whole, again

    for whole, again in on_ranks(2, check):
        assert (again.num_batches, again.num_rows, again.history) == (12, whole.num_rows, whole.history)
        for a, b in zip(whole.inputs, again.inputs, strict=True):
            assert torch.equal(a.components, b.components)
            assert torch.equal(a.eigenvalues, b.eigenvalues)
            assert (a.num_rows, a.total_scatter) == (b.num_rows, b.total_scatter)


@pytest.mark.parametrize("size", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_with_other_ranks_statistics_go_on_and_the_loader_is_the_callers(tmp_path, size):
    on_ranks(2, lambda rank: cut_off(rank, tmp_path / "cut"))
    seen = 7 + 2 * 2  # batches of ranks up to the last checkpoint: the first round, and twice two of the second
    new = 3 * 7 if size == 4 else 6  # in the six steps from there to the twelfth

    def go_on(rank=0):
        return a_pass(SHARDS[4][rank] if size == 4 else BATCHES, tmp_path / "cut")

    results = on_ranks(4, go_on) if size == 4 else [go_on()]
    for result in results:
        assert (result.num_batches, result.num_rows) == (12, (seen + new) * 4 * 24)
        assert [i.num_rows for i in result.inputs] == [result.num_rows] * len(result.inputs)
    for a, b in zip(results[0].inputs, results[-1].inputs, strict=True):
        assert torch.equal(a.components, b.components)


@pytest.mark.slow
def test_a_loader_that_does_not_replay_and_a_file_not_all_can_see_are_refused_by_all(tmp_path):
    on_ranks(2, lambda rank: cut_off(rank, tmp_path / "cut"))
    other = on_ranks(2, lambda rank: a_pass(SHARDS[2][0], tmp_path / "cut"), may_raise=True)
    assert [r.kind for r in other] == ["ValueError"] * 2
    assert "differs from the one that the checkpoint has seen" in other[1].message
    assert other[0].message == f"rank 1 failed: {other[1].message}"
    apart = on_ranks(2, lambda rank: a_pass(SHARDS[2][rank], tmp_path / ("cut", "new")[rank]), may_raise=True)
    assert all("not every rank sees the same file" in r.message for r in apart)
