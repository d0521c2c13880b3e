"""DeepSpeed ZeRO-3: weights that nobody holds whole but while a layer runs."""

import pytest
import torch

from eva_lora import EvaConfig, eva_initialize
from support.agreement import require_outputs_of_the_base, rounding_of_scatters
from support.bounds import require_same_directions
from support.models import layer_inputs, lora, lora_a_of, scatter, tiny_llama, token_batches
from support.ranks import on_ranks

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:EVA stopped at")]

BATCHES = token_batches(count=3, shape=(4, 24))
UNIFORM = EvaConfig(statistic="gram", rho=1.0, max_batches=3)
ZERO_3 = {"stage": 3, "stage3_param_persistence_threshold": 0}  # every weight is partitioned, however small


@pytest.fixture
def deepspeed(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    module = pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    # Where it has kernels of its own for a CPU's collectives it compiles them first; without, gloo's are used.
    monkeypatch.setitem(module.ops.__compatible_ops__, "deepspeed_shm_comm", False)
    return module


def partitioned(deepspeed, whole_engine, make_optimizer=lambda parameters: None):
    model = lora(tiny_llama())
    config = {
        "train_micro_batch_size_per_gpu": 2, "zero_optimization": ZERO_3, "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
    return engine if whole_engine else engine.module


@pytest.mark.parametrize("whole_engine", [False, True], ids=["module", "engine"])
@pytest.mark.parametrize("uneven", [False, True], ids=["halves", "all on one rank"])
def test_a_partitioned_model_gets_the_a_of_a_whole_one(deepspeed, whole_engine, uneven):
    plain = lora(tiny_llama())
    scatters = {name: scatter(rows) for name, rows in layer_inputs(plain, BATCHES).items()}
    rounding = rounding_of_scatters(lambda: lora(tiny_llama()), BATCHES)
    eva_initialize(plain, BATCHES, UNIFORM, progress=False)
    expected = lora_a_of(plain)

    def check(rank):
        model = partitioned(deepspeed, whole_engine)
        assert all(parameter.numel() == 0 for parameter in model.parameters())
        mine = [{"input_ids": batch["input_ids"].chunk(2)[rank]} for batch in BATCHES]
        if uneven:
            mine = [] if rank else BATCHES
        eva_initialize(model, mine, UNIFORM, progress=False)
        assert all(parameter.numel() == 0 for parameter in model.parameters())
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            module = model.module if whole_engine else model
            matrices = {name: a.clone() for name, a in lora_a_of(module).items()}
        with torch.no_grad():
            return matrices, model(**BATCHES[0]).logits

    (first, outputs), (second, _) = on_ranks(2, check)
    assert first.keys() == second.keys() == expected.keys()
    for name, a in expected.items():
        assert torch.equal(first[name], second[name])
        exact = scatters[name]
        require_same_directions(first[name], a, torch.linalg.eigvalsh(exact).flip(0), rounding * exact.trace())
    require_outputs_of_the_base(outputs, tiny_llama, BATCHES[0])


def test_a_rank_that_changes_after_partitioning_is_refused(deepspeed):
    def check(rank):
        with pytest.raises(ValueError, match=r"model: it is partitioned by DeepSpeed ZeRO-3, .*planned_config"):
            eva_initialize(partitioned(deepspeed, False), BATCHES, EvaConfig(max_batches=3), progress=False)

    on_ranks(2, check)


def test_a_model_whose_weights_deepspeeds_optimizer_has_copied_is_refused(deepspeed):
    def check(rank):
        model = partitioned(deepspeed, False, lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        with pytest.raises(ValueError, match="model: DeepSpeed's optimizer already holds a copy of its weights"):
            eva_initialize(model, BATCHES, UNIFORM, progress=False)

    on_ranks(2, check)
