"""A trained adapter is not thrown away in silence; docs/resuming.md says how to train on, and its code runs."""

import copy
import warnings
from types import SimpleNamespace

import peft
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from eva_lora import EvaConfig, ParameterSite, apply, collect, eva_initialize, plan
from eva_lora.adapters import TrainedLayers, find_adapter
from eva_lora.peft import initialize_lora_eva_weights
from support.models import LINEARS, lora, lora_a_of, tiny_llama, token_batches
from support.other_kinds import OTHER_KINDS
from support.pages import blocks
from support.peft_kinds import KINDS
from support.ranks import on_ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:EVA stopped at"),
    pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'eva'"),
]

BATCHES = token_batches(2)
CONFIG = EvaConfig(max_batches=2)
REFUSED = r"^model: its adapter was trained: B is not zero in {} of \d+ layers, the first is {}\. .*overwrite=True"


def guarded(model):
    """Fails the test if the model is run."""
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass ran"))
    return model


def second_of(model, part="lora_B"):
    return [p for name, p in model.named_parameters() if part in name]


def trained(model, part="lora_B"):
    """One step in one entry of one B."""
    with torch.no_grad():
        second_of(model, part)[-1].view(-1)[0] = 1e-30
    return model


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def require_unchanged(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_every_call_that_writes_asks_before_any_work():
    eva_plan = plan(collect(lora(tiny_llama()), BATCHES, CONFIG, progress=False))
    last = r"model\.layers\.2\.mlp\.down_proj"
    for call in (
        lambda model: eva_initialize(guarded(model), BATCHES, CONFIG, progress=False),
        lambda model: apply(model, eva_plan),
        lambda model: initialize_lora_eva_weights(guarded(model), BATCHES, show_progress_bar=False),
    ):
        model = trained(lora(tiny_llama(), init_lora_weights="eva"))
        before, loader = state(model), iter(BATCHES)
        with pytest.raises(ValueError, match=REFUSED.format(1, last)):
            call(model)
        require_unchanged(model, before)
        assert len(list(loader)) == len(BATCHES)


def test_it_is_overwritten_where_that_is_said():
    fresh, old = lora(tiny_llama()), trained(lora(tiny_llama()))
    eva_initialize(fresh, BATCHES, CONFIG, progress=False)
    eva_initialize(old, BATCHES, CONFIG, overwrite=True, progress=False)
    assert not any(b.any() for b in second_of(old))
    expected = lora_a_of(fresh)
    assert all(torch.equal(a, expected[name]) for name, a in lora_a_of(old).items())
    again = trained(old)
    apply(again, plan(collect(again, BATCHES, CONFIG, progress=False)), overwrite=True)
    assert not any(b.any() for b in second_of(again))


def test_a_second_initialisation_before_training_needs_no_word():
    model = lora(tiny_llama())
    for seed in (1, 2):
        eva_initialize(model, token_batches(2, seed=seed), CONFIG, progress=False)


@pytest.mark.parametrize("kind", [*(kind.parameter() for kind in KINDS), *OTHER_KINDS])
def test_every_kind_of_layer_is_looked_at(kind):
    model = kind.model()
    found = TrainedLayers.of(find_adapter(model))
    found.require_none()
    here = [b for b in kind.second(model) if b.device.type != "meta"]
    assert set(found.names) == ({site.name for site in find_adapter(model).sites} if here else set())
    for b in here:
        with torch.no_grad():
            kept = b.view(-1)[-1].clone()
            b.view(-1)[-1] = 1.0
            with pytest.raises(ValueError, match=r"B is not zero in 1 of"):
                TrainedLayers.of(find_adapter(model)).require_none()
            b.view(-1)[-1] = kept


def test_only_the_adapter_that_is_written_is_looked_at():
    model = lora(tiny_llama())
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    eva_initialize(model, BATCHES, CONFIG, progress=False)
    model.set_adapter("other")
    with pytest.raises(ValueError, match=REFUSED.format(3, r"model\.layers\.0\.self_attn\.q_proj")):
        eva_initialize(model, BATCHES, CONFIG, progress=False)


def test_a_bias_of_b_counts():
    base = nn.Sequential(nn.Linear(8, 8))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"], lora_bias=True))
    eva_initialize(model, [torch.randn(20, 8)], CONFIG, progress=False)
    with torch.no_grad():
        model.base_model.model[0].lora_B["default"].bias[3] = 1.0
    with pytest.raises(ValueError, match=REFUSED.format(1, "0")):
        eva_initialize(model, [torch.randn(20, 8)], CONFIG, progress=False)


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", "eva", False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_what_an_initialisation_brings_is_no_training_but_for_random_numbers(init, dtype, autocast):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, target_modules=LINEARS, init_lora_weights=init)
    model = peft.get_peft_model(tiny_llama().to(dtype), config, autocast_adapter_dtype=autocast)
    found = TrainedLayers.of(find_adapter(model))
    if init is False:
        with pytest.raises(ValueError, match=REFUSED.format(len(set(found.names)), r"model\.layers\.0.*")):
            found.require_none()
        return
    found.require_none()
    with torch.no_grad():  # a step as large as a weight's own size, in one layer
        b = second_of(model)[0]
        b += torch.randn(b.shape, generator=torch.Generator().manual_seed(1)).to(b.dtype) * 0.1
    with pytest.raises(ValueError, match=REFUSED.format(1, r"model\.layers\.0\.self_attn\.q_proj")):
        TrainedLayers.of(find_adapter(model)).require_none()


def test_weights_on_the_meta_device_hold_nothing_to_lose():
    model = peft.get_peft_model(
        tiny_llama(), peft.LoraConfig(r=4, target_modules=LINEARS, init_lora_weights="eva"), low_cpu_mem_usage=True
    )
    assert {b.device.type for b in second_of(model)} == {"meta"}
    initialize_lora_eva_weights(model, BATCHES, show_progress_bar=False)
    assert {b.device.type for b in second_of(model)} == {"cpu"}


def test_shards_that_only_another_process_holds_are_heard_of():
    def check(rank):
        model = lora(tiny_llama())
        mesh = init_device_mesh("cpu", (2,))
        fully_shard(model, mesh=mesh)
        eva_plan = plan(collect(lora(tiny_llama()), BATCHES, EvaConfig(max_batches=2, rho=1.0), progress=False))
        apply(model, eva_plan)
        if rank == 1:
            with torch.no_grad():
                second_of(model)[0].to_local()[-1] = 1.0
        with pytest.raises(ValueError, match=r"B is not zero in 1 of"):
            apply(model, eva_plan)
        with pytest.raises(ValueError, match=r"B is not zero in 1 of"):
            eva_initialize(model, BATCHES, EvaConfig(max_batches=2, rho=1.0), progress=False)
        apply(model, eva_plan, overwrite=True)
        return all(not b.to_local().any() for b in second_of(model))

    assert on_ranks(2, check) == [True, True]


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.layer.A, self.layer.B = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.zeros(8, 2))

    def forward(self, x):
        return self.layer(x) + x @ self.layer.A.T @ self.layer.B.T


def test_sites_of_ones_own_are_looked_at_and_adapters_that_do_not_say_are_not():
    model = Own()
    sites = [ParameterSite.of("layer", model.layer)]
    data = [torch.randn(30, 8) for _ in range(2)]
    eva_initialize(model, data, EvaConfig(max_batches=2, rho=1.0), sites=sites, progress=False)
    with torch.no_grad():
        model.layer.B[0, 0] = 1
    sites = [ParameterSite.of("layer", model.layer)]
    with pytest.raises(ValueError, match=REFUSED.format(1, "layer")):
        eva_initialize(model, data, EvaConfig(max_batches=2, rho=1.0), sites=sites, progress=False)
    eva_initialize(model, data, EvaConfig(max_batches=2, rho=1.0), sites=sites, progress=False, overwrite=True)
    assert not model.layer.B.any()
    TrainedLayers.of(SimpleNamespace(sites=sites)).require_none()


def test_the_page_on_resuming_runs_as_it_stands(tmp_path, monkeypatch):
    """Once to the checkpoint, and once from there: nothing of what was trained is lost, and no batch is run."""
    monkeypatch.chdir(tmp_path)
    first, anew, merged = [block.code for block in blocks("docs/resuming.md") if block.language == "python"]

    def train(model):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        model(**BATCHES[0], labels=BATCHES[0]["input_ids"]).loss.backward()
        optimizer.step()

    names = {"make_base": tiny_llama, "loader": BATCHES, "train": train}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(first, "resuming.md", "exec"), names)
    saved = {name: value.clone() for name, value in peft.get_peft_model_state_dict(names["model"]).items()}
    assert any(value.any() for name, value in saved.items() if "lora_B" in name)

    loaded = []
    again = {"make_base": lambda: guarded(tiny_llama()), "loader": BATCHES, "train": loaded.append}
    exec(compile(first, "resuming.md", "exec"), again)
    assert loaded == [again["model"]]
    found = peft.get_peft_model_state_dict(again["model"])
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], value) for name, value in saved.items())
    assert all(p.requires_grad for p in second_of(again["model"]))

    merged_base = copy.deepcopy(names["model"]).merge_and_unload()
    other = dict(names, model=copy.deepcopy(names["model"]))
    with pytest.raises(ValueError, match="its adapter was trained"):
        eva_initialize(other["model"], BATCHES, progress=False)
    exec(compile(anew, "resuming.md", "exec"), other)
    assert not any(b.any() for b in second_of(other["model"]))
    exec(compile(merged, "resuming.md", "exec"), names)
    assert torch.equal(names["model"].eval()(**BATCHES[0]).logits, merged_base.eval()(**BATCHES[0]).logits)
