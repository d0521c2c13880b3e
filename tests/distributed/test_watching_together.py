"""Several ranks that each watch calls of their own, on models that are wrapped and sharded: one answer of all rows."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from eva_lora import EvaConfig, collect, eva_initialize, plan, watching
from eva_lora.collecting import collect_calls
from eva_lora.planning import merged
from support.agreement import require_captured_as_well, require_equal, rounding_of_scatters
from support.bounds import require_same_directions
from support.models import layer_inputs, lora, scatter, tiny_llama, token_batches
from support.ranks import on_ranks
from support.tiny import fingerprint_of

pytestmark = pytest.mark.filterwarnings("ignore:EVA stopped at")

BATCHES = token_batches(count=3, shape=(4, 24))
GRAM = EvaConfig(statistic="gram", rho=1.0)


def fsdp2(model):
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(make=lambda: lora(tiny_llama())):
    return collect(make(), iter(BATCHES), GRAM, progress=False)


@pytest.mark.parametrize("wrap", [fsdp2, DistributedDataParallel], ids=["fully_shard", "DDP"])
def test_ranks_that_watch_their_own_calls_find_what_one_does_of_all_rows(wrap):
    def check(rank):
        model = wrap(lora(tiny_llama()))
        with watching(model, GRAM) as watch:
            for batch in BATCHES:
                model(input_ids=batch["input_ids"].chunk(2)[rank]).logits.mean().backward()
        converged = watch.converged
        found = watch.statistics()
        eva_initialize(model, found)
        return found, converged

    (first, converged), (second, _) = on_ranks(2, check)
    one = whole()
    rounding = rounding_of_scatters(lambda: lora(tiny_llama()), BATCHES)
    assert fingerprint_of(first) == fingerprint_of(second)
    assert (first.num_batches, first.num_rows, converged) == (3, one.num_rows, False)
    require_equal(first, one, rounding)
    scatters = {name: scatter(rows) for name, rows in layer_inputs(lora(tiny_llama()), BATCHES).items()}
    ours = plan(first).lora_a
    for name, a in plan(one).lora_a.items():
        values = torch.linalg.eigvalsh(scatters[name]).flip(0)
        require_same_directions(ours[name], a, values, rounding * values.sum())


def test_a_rank_that_is_refused_ends_all():
    def check(rank):
        model = lora(tiny_llama())
        with watching(torch.compile(model) if rank else model):
            pass

    good, bad = on_ranks(2, check, group_timeout=3.0, may_raise=True)
    assert bad.message.startswith("model: it is compiled by torch.compile, where its calls cannot be watched")
    assert good.message == f"rank 1 failed: {bad.message}"


def test_statistics_of_parts_of_the_rows_are_those_of_all_of_them():
    def half(i):
        batches = [{"input_ids": batch["input_ids"].chunk(2)[i]} for batch in BATCHES]
        return collect(lora(tiny_llama()), iter(batches), GRAM, progress=False)

    halves = [half(0), half(1)]
    together, one = merged(halves), whole()
    rounding = rounding_of_scatters(lambda: lora(tiny_llama()), BATCHES)
    require_equal(together, one, rounding)
    for mine, its in zip(together.inputs, one.inputs, strict=True):
        mine.check(0)
        # Means of numbers of one size, in float32: off by a rounding of each.
        assert torch.allclose(mine.mean, its.mean, rtol=0, atol=2 * rounding * float(its.mean.abs().max() + 1))
    scatters = {name: scatter(rows) for name, rows in layer_inputs(lora(tiny_llama()), BATCHES).items()}
    require_captured_as_well(together, one, scatters, rounding)
    assert {site.rows for site in together.sites} == {"all rows"}
    assert fingerprint_of(merged(halves[:1])) == fingerprint_of(halves[0])


def test_statistics_of_other_layers_or_options_are_not_put_together():
    other = collect(lora(tiny_llama(), target_modules=["q_proj"]), iter(BATCHES), GRAM, progress=False)
    with pytest.raises(ValueError, match="process_group: its ranks watch different layers"):
        merged([whole(), other])


def test_a_pass_by_calls_ends_a_round_where_the_first_rank_does():
    def check(rank):
        model, seen = lora(tiny_llama()), []
        mine = [{"input_ids": batch["input_ids"].chunk(2)[rank]} for batch in BATCHES][: 3 - rank]

        def forward(batch):
            seen.append(batch)
            model(**batch)

        found = collect_calls(model, mine, forward, EvaConfig(statistic="gram", max_batches=5, tau=1.0))
        return found, len(seen)

    (first, calls), (second, others) = on_ranks(2, check)
    assert fingerprint_of(first) == fingerprint_of(second)
    assert calls == others == 5  # two rounds of two, and one of the next
    assert first.num_rows == 5 * 4 * 24
