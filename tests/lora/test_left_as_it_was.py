"""What eva_initialize leaves as it was: generators, the caller's objects, flags and hooks; everything if it fails."""

import copy
from contextlib import nullcontext

import peft
import pytest
import torch

from eva_kernels._workspace import workspace_of
from eva_lora import EvaConfig, apply, collect, eva_initialize, plan
from support.models import LINEARS, initialise, lora, tiny_llama, token_batches

pytestmark = pytest.mark.filterwarnings("ignore:EVA stopped at")


def test_the_same_run_is_bit_equal_and_the_generators_are_untouched():
    models = [lora(tiny_llama()), lora(tiny_llama())]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    for model in models:
        initialise(model, statistic="subspace")
    assert torch.equal(torch.get_rng_state(), state)
    first, second = (model.state_dict() for model in models)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_callers_objects_are_untouched():
    config = peft.LoraConfig(r=4, target_modules=LINEARS, rank_pattern={"q_proj": 6})
    model = peft.get_peft_model(tiny_llama(), config)
    handed_in = model.peft_config["default"]
    described = copy.deepcopy(vars(handed_in))
    batches = token_batches()
    kept = copy.deepcopy(batches)
    initialise(model, batches)
    assert vars(handed_in) == described
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, kept, strict=True))


@pytest.mark.parametrize("fails", [False, True])
def test_the_scratch_memory_of_kernels_is_let_go(fails):
    def forward(inner, batch):
        inner(**batch)
        kept.append(workspace_of(torch.device("cpu"), 0))
        if fails:
            raise KeyboardInterrupt

    kept = []
    with pytest.raises(KeyboardInterrupt) if fails else nullcontext():
        eva_initialize(lora(tiny_llama()), token_batches(), progress=False, forward_fn=forward)
    assert all(workspace is kept[0] for workspace in kept)  # kept from batch to batch
    assert workspace_of(torch.device("cpu"), 0) is not kept[0]


def test_flags_hooks_and_switches_are_restored_after_success_and_failure():
    model = lora(tiny_llama(), lora_dropout=0.1)
    model.train()
    frozen_a = next(p for n, p in model.named_parameters() if "lora_A" in n)
    frozen_a.requires_grad_(False)
    model.base_model.model.model.layers[1].eval()

    def state():
        return (
            {n: m.training for n, m in model.named_modules()},
            {n: p.requires_grad for n, p in model.named_parameters()},
            {n: len(m._forward_pre_hooks) for n, m in model.named_modules()},
            {n: m.disable_adapters for n, m in model.named_modules() if hasattr(m, "disable_adapters")},
        )

    def failing(inner, batch):
        inner(**batch)
        raise KeyboardInterrupt

    before, weights = state(), copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        eva_initialize(model, token_batches(), progress=False, forward_fn=failing)
    assert state() == before
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    initialise(model, rho=1.0)
    assert state() == before


def test_a_failing_apply_changes_nothing(monkeypatch):
    model = lora(tiny_llama(), use_dora=True)
    eva_plan = plan(collect(model, token_batches(), EvaConfig(max_batches=2), progress=False), budget=20)
    weights = copy.deepcopy(model.state_dict())
    parameters = {n: id(p) for n, p in model.named_parameters()}
    config = copy.deepcopy(model.peft_config["default"])
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]
    calls = iter(range(100))
    original = type(layers[0]).update_layer

    def sometimes(self, *args, **options):
        if next(calls) == 7:
            raise MemoryError("out of memory")
        return original(self, *args, **options)

    monkeypatch.setattr(type(layers[0]), "update_layer", sometimes)
    with pytest.raises(MemoryError):
        apply(model, eva_plan)
    assert {n: id(p) for n, p in model.named_parameters()} == parameters
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert vars(model.peft_config["default"]) == vars(config)
    assert {m.r["default"] for m in layers} == {4}
