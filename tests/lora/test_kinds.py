"""What EVA promises of every kind of LoRA layer, one suite for all."""

import pytest
import torch

from eva_lora import EvaConfig, apply, collect, eva_initialize, plan
from support.bounds import EXACT_CAPTURES, SUMMARY_CAPTURES, deviation, orthonormality
from support.kinds import call
from support.models import captured_share, scatter
from support.other_kinds import OTHER_KINDS
from support.peft_kinds import KINDS

pytestmark = [
    pytest.mark.filterwarnings("ignore:EVA stopped at"),
    pytest.mark.parametrize("kind", [*(kind.parameter() for kind in KINDS), *OTHER_KINDS]),
]


def initialise(kind, model):
    batches = kind.batches()
    return eva_initialize(model, batches, EvaConfig(max_batches=len(batches), tau=1.0, **kind.config), progress=False)


def outputs(model, batch):
    model.eval()
    with torch.no_grad():
        return call(model, batch)


def test_every_layer_is_captured(kind):
    expected = kind.record(kind.base(), kind.batches())
    model = kind.model()
    report = initialise(kind, model)
    matrices = kind.matrices(model)
    assert set(report.ranks) == set(expected)
    assert {name for name, rank in report.ranks.items() if rank} == set(matrices)
    seen = 0
    for name, parts in matrices.items():
        assert len(parts) == len(expected[name])
        for part, (a, rows) in enumerate(zip(parts, expected[name], strict=True)):
            assert a.shape[0] == report.ranks[name]
            assert deviation(a.T).abs().max() <= orthonormality(a.shape[1], len(a))
            if len(rows) > len(a):
                exact = report.statistic[name]["kind"] == "gram"
                bar = EXACT_CAPTURES if exact else SUMMARY_CAPTURES
                assert captured_share(a, scatter(rows)) >= bar, (name, part)
                seen += 1
    assert seen


def test_outputs_are_those_of_the_base(kind):
    batch = kind.batches()[0]
    model = kind.model()
    expected = outputs(kind.base() if kind.computes_its_base else model, batch)
    initialise(kind, model)
    assert torch.equal(outputs(model, batch), expected)


def test_ranks_move_and_training_runs(kind):
    model, batch = kind.model(), kind.batches()[0]
    statistics = collect(model, kind.batches(), EvaConfig(max_batches=2, **kind.config), progress=False)
    budget = sum(site.rank for site in statistics.sites) - kind.step
    eva_plan = plan(statistics, budget=budget)
    apply(model, eva_plan)
    assert sum(eva_plan.ranks.values()) == budget
    matrices = kind.matrices(model)
    assert all(len(a) == eva_plan.ranks[name] for name, parts in matrices.items() for a in parts)
    before = outputs(model, batch)
    model.train()
    optimizer = torch.optim.SGD(kind.trained(model), lr=1.0)
    call(model, batch).float().square().mean().backward()
    assert all(p.grad is not None for p in kind.second(model))
    optimizer.step()
    assert not torch.equal(outputs(model, batch), before)


@pytest.mark.parametrize("some_removed", [False, True], ids=["", "ranks of 0 too"])
def test_adapters_save_and_load(tmp_path, kind, some_removed):
    model, batch = kind.model(), kind.batches()[0]
    statistics = collect(model, kind.batches(), EvaConfig(max_batches=2, **kind.config), progress=False)
    if some_removed and not kind.removable:
        with pytest.raises(ValueError, match=r"^budget: "):
            plan(statistics, budget=len(statistics.sites) - 1)
        return
    eva_plan = plan(statistics, budget=len(statistics.sites) - 1 if some_removed else None)
    assert (0 in eva_plan.ranks.values()) >= some_removed
    apply(model, eva_plan)
    for parameter in kind.trained(model):
        parameter.data.normal_(std=0.1)
    kind.save(model, eva_plan, tmp_path)
    reloaded = kind.reload(tmp_path)
    ours, theirs = kind.matrices(model), kind.matrices(reloaded)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(a, b) for name in ours for a, b in zip(ours[name], theirs[name], strict=True))
    assert torch.equal(outputs(model, batch), outputs(reloaded, batch))
