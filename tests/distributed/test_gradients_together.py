"""Several processes take the gradients of their own batches, and start alike, as one process would from all of them."""

import copy

import pytest
import torch

from eva_lora import initialize
from support.models import lora, tiny_llama, token_batches
from support.peft_kinds import EXPERTS, STACKED_EXPERTS, mixtral
from support.ranks import Raised, on_ranks
from support.versions import needs


@pytest.fixture(scope="module")
def base():
    return tiny_llama()


def labelled(count):
    return [dict(batch, labels=batch["input_ids"]) for batch in token_batches(count)]


def started(base, method, batches):
    model = lora(copy.deepcopy(base))
    report = initialize(model, batches, method)
    return report.ranks, report.losses, {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}


@pytest.mark.parametrize("method", ["lora-one", "gora"])
def test_ranks_start_alike_from_the_batches_of_all(base, method):
    batches = labelled(3)  # two of one rank, one of the other
    one = started(base, method, batches)
    first, second = on_ranks(2, lambda rank: started(base, method, batches[:2] if rank == 0 else batches[2:]))
    for mine, its in zip(first[:2], second[:2], strict=True):
        assert mine == its
    assert all(torch.equal(value, second[2][name]) for name, value in first[2].items())
    assert first[0] == one[0]
    assert first[1] == pytest.approx(one[1], rel=1e-5)
    for name in first[2]:
        if "lora_A" in name:
            b = name.replace("lora_A", "lora_B")
            mine, its = (x[b].double() @ x[name].double() for x in (first[2], one[2]))
            # Sums of float32 in another order, and the directions that they leave apart by more than their gaps.
            assert (mine - its).norm() <= 1e-3 * its.norm(), name


@needs(STACKED_EXPERTS)
def test_experts_too():
    base, batches = mixtral(), labelled(3)

    def run(mine):
        model = lora(copy.deepcopy(base), target_modules=["q_proj"], target_parameters=EXPERTS)
        report = initialize(model, mine, "gora")
        return report.ranks, report.losses, {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}

    one = run(batches)
    first, second = on_ranks(2, lambda rank: run(batches[:2] if rank == 0 else batches[2:]))
    assert first[:2] == second[:2]
    assert first[0] == one[0]
    assert first[1] == pytest.approx(one[1], rel=1e-5)
    for name, value in first[2].items():
        assert torch.equal(value, second[2][name])
        # A is drawn; what B is of G Aᵀ is sums of float32 in another order.
        assert (value - one[2][name]).norm() <= 1e-5 * one[2][name].norm(), name


def test_what_one_rank_fails_with_all_raise(base):
    def run(rank):
        return started(base, "lora-one", labelled(1) if rank else token_batches(1))

    first, second = on_ranks(2, run, may_raise=True)
    assert isinstance(first, Raised)
    assert isinstance(second, Raised)
    assert "the model returns no loss for batch 1" in first.message
    assert "rank 0 failed" in second.message
