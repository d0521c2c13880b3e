"""Models whose weights no rank holds whole, or holds only while a layer runs."""

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from eva_lora import EvaConfig, apply, collect, eva_initialize, plan
from eva_lora.adapters import find_adapter
from eva_lora.collecting.run import Run
from eva_lora.peft import planned_config
from support.agreement import require_outputs_of_the_base, rounding_of_scatters
from support.bounds import require_same_directions
from support.models import LINEARS, layer_inputs, lora, lora_a_of, scatter, tiny_llama, token_batches
from support.ranks import on_ranks

pytestmark = pytest.mark.filterwarnings("ignore:EVA stopped at")

BATCHES = token_batches(count=3, shape=(4, 24))
UNIFORM = EvaConfig(statistic="gram", rho=1.0, max_batches=3)
CONFIG = LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS)


def halves(rank, batches=BATCHES):
    return [{"input_ids": batch["input_ids"].chunk(2)[rank]} for batch in batches]


def uneven(rank):
    """All three batches on rank 0 as they are, and none on the other."""
    return BATCHES if rank == 0 else []


def fsdp2(model):
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp1(model):
    return FullyShardedDataParallel(
        model, auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer}), use_orig_params=True,
        device_id=torch.device("cpu"),
    )  # fmt: skip


def ddp(model):
    return DistributedDataParallel(model)


def whole(model):
    """A's as they would be saved: by the layers' own names, gathered."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            return whole(model.module)
    names = {name: value for name, value in model.state_dict().items() if ".lora_A." in name}
    plain = {name.replace("module.", "").replace("_fsdp_wrapped_module.", ""): v for name, v in names.items()}
    return {
        name.split("base_model.model.")[1].split(".lora_A.")[0]: v.full_tensor()
        if isinstance(v, DTensor)
        else v.clone()
        for name, v in plain.items()
    }


def require_directions_of(found, plain):
    matrices, scatters, rounding = plain
    assert found.keys() == matrices.keys()
    for name, a in matrices.items():
        exact = scatters[name]
        require_same_directions(found[name], a, torch.linalg.eigvalsh(exact).flip(0), rounding * exact.trace())


@pytest.fixture(scope="module")
def plain():
    """What one process finds, fed the whole batches, of which scatters, and what these may be off by."""
    model = lora(tiny_llama())
    scatters = {name: scatter(rows) for name, rows in layer_inputs(model, BATCHES).items()}
    eva_initialize(model, BATCHES, UNIFORM, progress=False)
    return lora_a_of(model), scatters, rounding_of_scatters(lambda: lora(tiny_llama()), BATCHES)


@pytest.mark.parametrize(
    "wrap", [fsdp2, pytest.param(fsdp1, marks=pytest.mark.slow), pytest.param(ddp, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("loader", [halves, pytest.param(uneven, marks=pytest.mark.slow)])
def test_a_sharded_model_gets_the_a_of_a_whole_one(plain, wrap, loader):
    def check(rank):
        model = wrap(lora(tiny_llama()))
        eva_initialize(model, loader(rank), UNIFORM, progress=False)
        matrices = whole(model)  # a collective: before the ranks part
        with torch.no_grad():
            outputs = model(**BATCHES[0]).logits
        return matrices, outputs

    (first, outputs), (second, _) = on_ranks(2, check)
    assert all(torch.equal(first[name], second[name]) for name in first)
    require_directions_of(first, plain)
    require_outputs_of_the_base(outputs, tiny_llama, BATCHES[0])


def test_a_rank_that_changes_after_sharding_is_refused_and_the_remedy_works():
    whole_model = get_peft_model(tiny_llama(), CONFIG)
    eva_plan = plan(collect(whole_model, BATCHES, EvaConfig(max_batches=3, min_rank=0), progress=False))
    apply(whole_model, eva_plan)
    expected, alphas = lora_a_of(whole_model), scalings(whole_model)
    assert len(set(eva_plan.ranks.values())) > 1

    def check(rank):
        sharded = fsdp2(get_peft_model(tiny_llama(), CONFIG))
        with pytest.raises(ValueError, match=r"sharded by fully_shard, .* build the model .*planned_config"):
            eva_initialize(sharded, halves(rank), progress=False)
        built = get_peft_model(tiny_llama(), planned_config(CONFIG, eva_plan))
        found = scalings(built)
        built = fsdp2(built)
        apply(built, eva_plan)
        return whole(built), found

    for matrices, found in on_ranks(2, check):
        assert found == alphas
        assert matrices.keys() == expected.keys()
        assert all(torch.equal(matrices[name], a) for name, a in expected.items())


def scalings(model):
    base = model.get_base_model()
    return {
        name: pytest.approx(m.scaling["default"]) for name, m in base.named_modules() if hasattr(m, "lora_A")
    }  # fmt: skip


def test_layers_without_a_rank_are_not_built():
    statistics = collect(get_peft_model(tiny_llama(), CONFIG), BATCHES, EvaConfig(max_batches=3), progress=False)
    eva_plan = plan(statistics, budget=12)
    gone = [name for name, rank in eva_plan.ranks.items() if rank == 0]
    assert gone
    built = get_peft_model(tiny_llama(), planned_config(CONFIG, eva_plan))
    apply(built, eva_plan)
    matrices = lora_a_of(built)
    assert {name: len(a) for name, a in matrices.items()} == {n: r for n, r in eva_plan.ranks.items() if r}


@pytest.mark.slow
def test_a_rank_that_fails_in_a_sharded_forward_ends_all_within_the_groups_time():
    def check(rank):
        model = fsdp2(lora(tiny_llama()))
        if rank:
            layer = model.base_model.model.model.layers[1]
            layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ValueError("a broken layer")))
        eva_initialize(model, halves(rank), UNIFORM, progress=False)

    good, bad = on_ranks(2, check, group_timeout=3.0, may_raise=True)
    assert (bad.kind, bad.message) == ("ValueError", "a broken layer")
    assert (good.kind, good.message) == ("ValueError", "rank 1 failed: a broken layer")


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_layers_are_read_as_they_run_and_their_adapters_are_there_to_be_trained(plain, where, tmp_path):
    base = tiny_llama()
    if where == "cpu":
        base = cpu_offload(base, execution_device="cpu")
    else:
        here = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"]
        device_map = {**dict.fromkeys(here, "cpu"), "model.layers.1": "disk", "model.layers.2": "disk"}
        base = dispatch_model(base, device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    model = lora(base)
    assert base.model.layers[2].mlp.down_proj.base_layer.weight.device.type == "meta"
    eva_initialize(model, BATCHES, UNIFORM, progress=False)
    require_directions_of(lora_a_of(model), plain)
    model(**BATCHES[0], labels=BATCHES[0]["input_ids"]).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".lora_B." in name)


def test_a_statistic_is_kept_where_its_layer_computes():
    model = lora(tiny_llama())
    there = model.base_model.model.model.layers[1].mlp.down_proj.base_layer
    add_hook_to_module(there, AlignDevicesHook(execution_device="meta"))
    run = Run(find_adapter(model), EvaConfig())
    devices = {site.name: run.maker.empty(i, "subspace", 8).basis.device.type for i, site in enumerate(run.sites)}
    assert {name for name, device in devices.items() if device == "meta"} == {"model.layers.1.mlp.down_proj"}
