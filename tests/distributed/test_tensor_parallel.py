"""Layers that are split over ranks: what one process with the whole layers would have found."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from eva_kernels import SubspaceStatistic
from eva_lora import EvaConfig, collect, eva_initialize, plan
from support.agreement import (
    require_captured_as_well,
    require_equal,
    require_ranks_equal_but_for_ties,
    require_same_rows,
    rounding_of_scatters,
)
from support.bounds import gamma
from support.models import layer_inputs, load_minilm, lora, minilm_text_batches, scatter, tiny_llama, token_batches
from support.ranks import on_ranks

pytestmark = pytest.mark.filterwarnings("ignore:EVA stopped at")

BATCHES = token_batches(count=4, shape=(4, 24))
COLUMNS, ROWS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], ["o_proj", "down_proj"]


def split(model, mesh, *, adapters=False):
    """The base layers of a tiny Llama, column- and row-parallel; with ``adapters`` A's rank is split as well."""
    for layer in model.base_model.model.model.layers:
        for name, linear in list(layer.named_modules()):
            kind = name.rpartition(".")[2]
            if kind in COLUMNS + ROWS:
                parallelize_module(linear.base_layer, mesh, ColwiseParallel() if kind in COLUMNS else RowwiseParallel())
                if adapters and kind in COLUMNS:
                    parallelize_module(linear.lora_A["default"], mesh, ColwiseParallel())
    return model


def pieces(batches, index, count):
    return [{name: value.chunk(count)[index] for name, value in batch.items()} for batch in batches]


@pytest.fixture(scope="module")
def rounding():
    return rounding_of_scatters(lambda: lora(tiny_llama()), BATCHES)


def move_samples(monkeypatch):
    """From now on every entry of every sample becomes one of its neighbours in bfloat16: a sample that is as good. Sums
    in another order change the basis by a rounding, and so move a few entries of the sample that it is rounded to.
    """
    generator = torch.Generator().manual_seed(0)

    def moved(original):
        def call(self, *args, **options):
            original(self, *args, **options)
            bits = self._sample.bfloat16().view(torch.int16)
            step = 2 * torch.randint(0, 2, bits.shape, generator=generator, dtype=torch.int16) - 1
            neighbours = torch.where(bits & 0x7FFF == 0, bits, bits + step)
            self._sample = neighbours.view(torch.bfloat16).float()

        return call

    for name in ("start_", "adopt_"):
        monkeypatch.setattr(SubspaceStatistic, name, moved(getattr(SubspaceStatistic, name)))


def require_as_good_a_plan(results, one, rows, rounding):
    """The same on all ranks, and as good as what one process finds."""
    for found in results:
        require_ranks_equal_but_for_ties(one, found)
        require_captured_as_well(found, one, {name: scatter(x) for name, x in rows.items()}, rounding)
    theirs, others = (plan(statistics).lora_a for statistics in results)
    assert all(torch.equal(a, others[name]) for name, a in theirs.items())


OPTIONS = {"max_batches": 4, "impl": "reference"}  # whose products do not round rows to bfloat16


@pytest.mark.parametrize("criterion", ["subspace", pytest.param("captured", marks=pytest.mark.slow)])
def test_inputs_that_are_whole_count_once_and_blocks_of_features_make_one_input(criterion, rounding, monkeypatch):
    config = EvaConfig(statistic="subspace", convergence=criterion, **OPTIONS)
    one = collect(lora(tiny_llama()), BATCHES, config, progress=False)

    def check(rank):
        model = split(lora(tiny_llama()), init_device_mesh("cpu", (2,)))
        assert model.base_model.model.model.layers[0].mlp.down_proj.base_layer.weight.to_local().shape == (32, 24)
        return collect(model, BATCHES, config, progress=False)

    results = on_ranks(2, check)
    move_samples(monkeypatch)
    require_equal(results[0], one, rounding, collect(lora(tiny_llama()), BATCHES, config, progress=False))
    require_as_good_a_plan(results, one, layer_inputs(lora(tiny_llama()), BATCHES), rounding)


@pytest.mark.slow
def test_a_real_encoder_with_its_heads_split_is_on_real_text_what_one_rank_finds():
    batches = [{name: value[:8] for name, value in batch.items()} for batch in minilm_text_batches()[:3]]
    config = EvaConfig(statistic="subspace", impl="reference", max_batches=3)
    targets = {"target_modules": ["query", "key", "value", "attention.output.dense"], "r": 8}
    model = lora(load_minilm(), **targets)
    rounding = rounding_of_scatters(lambda: lora(load_minilm(), **targets), batches)
    one = collect(model, batches, config, progress=False)
    rows = layer_inputs(model, batches)
    assert len(one.sites) == 24

    def check(rank):
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.base_model.model.encoder.layer:
            for linear in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value):
                parallelize_module(linear.base_layer, mesh, ColwiseParallel())
            parallelize_module(layer.attention.output.dense.base_layer, mesh, RowwiseParallel())
        assert linear.base_layer.weight.to_local().shape == (192, 384)
        return collect(model, batches, config, progress=False)

    results = on_ranks(2, check)
    require_same_rows(results[0], one)
    require_as_good_a_plan(results, one, rows, rounding)


@pytest.mark.parametrize(
    ("statistic", "sharded"),
    [("gram", False), pytest.param("subspace", False, marks=pytest.mark.slow),
     pytest.param("gram", True, marks=pytest.mark.slow)],
)  # fmt: skip
def test_it_goes_together_with_data_parallel_ranks_and_with_sharded_weights(statistic, sharded, rounding, monkeypatch):
    config = EvaConfig(statistic=statistic, **OPTIONS)
    one = collect(lora(tiny_llama()), BATCHES, config, progress=False)

    def check(rank):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        model = split(lora(tiny_llama()), mesh["tp"])
        if sharded:
            for layer in model.base_model.model.model.layers:
                fully_shard(layer, mesh=mesh["dp"])
            fully_shard(model, mesh=mesh["dp"])
        return collect(model, pieces(BATCHES, rank // 2, 2), config, progress=False)

    results = on_ranks(4, check)
    move_samples(monkeypatch)
    moved = collect(lora(tiny_llama()), BATCHES, config, progress=False) if statistic == "subspace" else None
    for found in results:
        require_equal(found, one, rounding, moved)


class Sequences(nn.Module):
    """A layer that is given its part of every sequence, as an ordinary tensor or as a DTensor."""

    def __init__(self, layout):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.layout = nn.Linear(16, 8), layout

    def forward(self, hidden, attention_mask=None):
        if self.layout is None:
            return self.up(hidden)
        mesh = self.up.base_layer.weight.device_mesh if hasattr(self.up, "base_layer") else self.up.weight.device_mesh
        kind, as_local = self.layout
        placed = distribute_tensor(hidden, mesh, [kind])
        return self.up(placed.to_local() if as_local else placed)


@pytest.mark.parametrize(
    "layout", [(Shard(1), True), pytest.param((Shard(1), False), marks=pytest.mark.slow),
               pytest.param((Replicate(), False), marks=pytest.mark.slow)]
)  # fmt: skip
def test_parts_of_a_sequence_are_summed_and_masked_as_they_lie(layout):
    generator, lengths = torch.Generator().manual_seed(1), torch.tensor([[6], [9]])
    batches = [
        {"hidden": torch.randn(2, 10, 16, generator=generator), "attention_mask": torch.arange(10) < lengths}
        for _ in range(3)
    ]
    options = LoraConfig(r=2, target_modules=["up"])
    config = EvaConfig(statistic="gram", max_batches=3)
    one = collect(get_peft_model(Sequences(None), options), batches, config, progress=False)
    assert one.num_rows == 45

    def check(rank):
        mesh = init_device_mesh("cpu", (2,))
        model = get_peft_model(Sequences(layout), options)
        base = model.base_model.model.up.base_layer
        parallelize_module(base, mesh, ColwiseParallel(input_layouts=layout[0], use_local_output=True))
        return collect(model, batches, config, progress=False)

    for found in on_ranks(2, check):
        require_equal(found, one, gamma(one.num_rows + 16))
        assert found.num_rows == one.num_rows


def test_ranks_are_multiples_of_the_ranks_that_a_is_split_over_and_cannot_change_afterwards():
    def check(rank):
        model = split(lora(tiny_llama()), init_device_mesh("cpu", (2,)), adapters=True)
        statistics = collect(model, BATCHES, EvaConfig(max_batches=4), progress=False)
        with pytest.raises(ValueError, match="is sharded and would have to be made anew"):
            eva_initialize(model, BATCHES, EvaConfig(max_batches=4), progress=False)
        with pytest.raises(ValueError, match="split over ranks, which have to make one pass together"):
            collect(model, BATCHES, progress=False, process_group="off")
        return plan(statistics), {site.name: site.rank_multiple for site in statistics.sites}

    for eva_plan, multiples in on_ranks(2, check):
        assert {multiples[name] for name in multiples if name.rpartition(".")[2] in COLUMNS} == {2}
        assert {multiples[name] for name in multiples if name.rpartition(".")[2] in ROWS} == {1}
        assert all(rank % multiples[name] == 0 for name, rank in eva_plan.ranks.items())
