"""What eva_initialize makes of any model: A, B, ranks, scaling, adapters that load; shown on small random ones."""

import warnings

import peft
import pytest
import torch
from peft.utils.incremental_pca import IncrementalPCA

from eva_lora import EvaConfig, EvaPlan, EvaStatistics, apply, collect, eva_initialize, plan
from support.bounds import EXACT_CAPTURES, gamma, product_rounding
from support.models import (
    LINEARS,
    captured_share,
    initialise,
    layer_inputs,
    lora,
    lora_a_of,
    scatter,
    tiny_gpt2,
    tiny_llama,
    token_batches,
)

pytestmark = pytest.mark.filterwarnings("ignore:EVA stopped at")


def logits(model, batch):
    model.eval()
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("statistic", ["gram", "subspace"])
@pytest.mark.parametrize("base", [tiny_llama, tiny_gpt2])
def test_every_layer_is_captured(base, statistic):
    targets = LINEARS if base is tiny_llama else ["c_attn", "c_proj", "c_fc"]
    model = lora(base(), target_modules=targets, fan_in_fan_out=base is tiny_gpt2)
    rows = layer_inputs(model, token_batches())
    report = initialise(model, statistic=statistic)
    assert set(report.ranks) == set(rows)
    for name, a in lora_a_of(model).items():
        exact = scatter(rows[name])
        if statistic == "gram":
            assert captured_share(a, exact) >= EXACT_CAPTURES
        else:  # random networks have flat spectra, the hardest for a summary: at most twice what PEFT's misses
            pca = IncrementalPCA(n_components=8)
            for batch in rows[name].float().chunk(6):
                pca.partial_fit(batch)
            missed, theirs = (1 - captured_share(basis, exact) for basis in (a, pca.components_[: len(a)]))
            assert missed <= 2 * theirs


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva"])
def test_logits_are_those_of_the_base_and_training_runs(init, use_dora):
    base = tiny_llama()
    batch = token_batches(1)[0]
    expected = logits(base, batch)
    model = lora(base, init_lora_weights=init, use_dora=use_dora)
    report = initialise(model, overwrite=init is False)  # random numbers in B look like training
    assert len(set(report.ranks.values())) > 1
    assert torch.equal(logits(model, batch), expected)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    assert not torch.equal(logits(model, batch), expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(q_proj|down_proj)"},
        {"rank_pattern": {"q_proj": 7, r"layers\.1\..*_proj": 3}, "alpha_pattern": {"down_proj": 5}},
        {"use_rslora": True},
        {"use_dora": True},
        {"layers_to_transform": [0, 2]},
        {"lora_bias": True, "target_modules": ["c_attn", "c_proj"]},
        {"init_lora_weights": "orthogonal"},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
@pytest.mark.parametrize("keep", [None, 3], ids=["some ranks", "ranks of 0 too"])
def test_adapters_save_and_load_bit_exactly(tmp_path, options, keep):
    make = tiny_gpt2 if options.get("lora_bias") else tiny_llama
    model = lora(make(), **options)
    statistics = collect(model, token_batches(), EvaConfig(max_batches=3), progress=False)
    apply(model, plan(statistics, budget=keep))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)  # of patterns that name no layer
        reloaded = peft.PeftModel.from_pretrained(make(), tmp_path)
    batch = token_batches(1)[0]
    assert torch.equal(logits(model, batch), logits(reloaded, batch))
    ours, theirs = peft.get_peft_model_state_dict(model), peft.get_peft_model_state_dict(reloaded)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    for name, layer in reloaded.base_model.model.named_modules():
        if hasattr(layer, "lora_A"):
            assert layer.scaling == model.base_model.model.get_submodule(name).scaling


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("adjust", [True, False])
def test_scaling_stays_when_adjusted(use_rslora, adjust):
    model = lora(tiny_llama(), r=4, lora_alpha=10, use_rslora=use_rslora)
    report = initialise(model, adjust_scaling_factors=adjust)
    expected = 10 / (2 if use_rslora else 4)
    changed = 0
    for name, rank in report.ranks.items():
        if rank:
            scaling = model.base_model.model.get_submodule(name).scaling["default"]
            unadjusted = 10 / (rank**0.5 if use_rslora else rank)
            assert scaling == pytest.approx(expected if adjust else unadjusted, rel=gamma(4, torch.float64))
            changed += rank != 4
    assert changed


def test_rank_zero_keeps_other_adapters():
    model = lora(tiny_llama())
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    other = {n: p.clone() for n, p in model.named_parameters() if ".other." in n}
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    batch = token_batches(1)[0]
    model.set_adapter("other")
    expected = logits(model, batch)
    model.set_adapter("default")
    apply(model, plan(collect(model, token_batches(), EvaConfig(max_batches=2), progress=False), budget=4))
    assert {n for n, p in model.named_parameters() if p.requires_grad} <= trainable
    base = model.get_base_model()
    emptied = [n for n, m in base.named_modules() if hasattr(m, "lora_A") and "default" not in m.lora_A]
    assert emptied
    assert torch.equal(logits(model, batch), logits(tiny_llama(), batch))
    model.set_adapter("other")
    assert torch.equal(logits(model, batch), expected)
    assert {n: p for n, p in model.named_parameters() if ".other." in n}.keys() == other.keys()
    assert all(torch.equal(p, other[n]) for n, p in model.named_parameters() if ".other." in n)


@pytest.mark.parametrize("autocast", [True, False])
def test_adapter_dtype_stays_what_it_was(autocast):
    base = tiny_llama().to(torch.bfloat16)
    config = peft.LoraConfig(r=4, target_modules=LINEARS, use_dora=True)
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=autocast)
    before = {p.dtype for n, p in model.named_parameters() if "lora_" in n}
    initialise(model)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == before
    assert before == {torch.float32 if autocast else torch.bfloat16}


def test_whitening_divides_once_by_the_root_of_the_singular_value():
    plain, white = lora(tiny_llama()), lora(tiny_llama())
    initialise(plain)
    initialise(white, whiten=True)
    rows = layer_inputs(plain, token_batches())
    for name, a in lora_a_of(plain).items():
        values = torch.linalg.svdvals(rows[name] - rows[name].mean(0)).square()
        expected = a.double() / values[: len(a), None] ** 0.25
        # The fourth root of an eigenvalue is off by less than half as much, relatively; and the result is rounded.
        off = product_rounding("reference", *rows[name].shape) * values.sum() / values[: len(a), None] / 2 + gamma(3)
        assert ((lora_a_of(white)[name].double() - expected).abs() <= off * expected.abs()).all()


@pytest.mark.parametrize("rho", [1.0, 1.2, 2.0, 3.0])
@pytest.mark.parametrize("pattern", [{}, {"q_proj": 7, "up_proj": 2}])
def test_ranks_sum_to_the_budget_and_keep_their_bounds(rho, pattern):
    model = lora(tiny_llama(), rank_pattern=pattern)
    configured = {name: a.shape[0] for name, a in lora_a_of(model).items()}
    report = initialise(model, rho=rho)
    assert sum(report.ranks.values()) == sum(configured.values())
    groups = {name: names for names in report.shared_inputs for name in names}
    for name, rank in report.ranks.items():
        assert rank <= max(round(configured[member] * rho) for member in groups.get(name, [name]))
    if rho == 1.0 and not pattern:
        assert report.ranks == configured


def test_rank_bounds_and_multiples_are_kept():
    model = lora(tiny_llama())
    report = initialise(model, min_rank=2, max_rank=6, rank_multiple=2)
    assert set(report.ranks.values()) <= {2, 4, 6}
    assert sum(report.ranks.values()) == 21 * 4


def test_three_steps_equal_the_one_call(tmp_path):
    config = EvaConfig(max_batches=4)
    whole, stepwise = lora(tiny_llama()), lora(tiny_llama())
    report = eva_initialize(whole, token_batches(), config, progress=False)
    statistics = collect(stepwise, token_batches(), config, progress=False)
    loaded = EvaStatistics.load(statistics.save(tmp_path / "statistics.safetensors"))
    eva_plan = EvaPlan.load(plan(loaded).save(tmp_path / "plan.safetensors"))
    apply(stepwise, eva_plan)
    assert eva_plan.ranks == report.ranks
    ours, theirs = whole.state_dict(), stepwise.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert vars(whole.peft_config["default"]) == vars(stepwise.peft_config["default"])


def test_another_budget_needs_no_forward():
    model = lora(tiny_llama())
    statistics = collect(model, token_batches(), EvaConfig(max_batches=3, oversampling=2.5), progress=False)
    assert sum(plan(statistics, budget=50).ranks.values()) == 50
    beyond = plan(statistics, EvaConfig(rho=1.5), budget=5000)
    assert f"{sum(beyond.ranks.values())} of 5,000 ranks are given: candidates and bounds allow no more" in beyond.notes
    assert sum(plan(statistics, EvaConfig(rho=1.5)).ranks.values()) == 84
    with pytest.raises(ValueError, match=r"^rho: 7.0 asks for 28 components of .*, but the statistics hold 20"):
        plan(statistics, EvaConfig(rho=7.0))


def test_peft_config_is_accepted_and_honoured():
    model = lora(tiny_llama(), init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0, tau=0.0))
    report = eva_initialize(model, token_batches(), progress=False)
    assert report.config["rho"] == 1.0
    assert report.num_batches == 2
    report = eva_initialize(lora(tiny_llama()), token_batches(), peft.EvaConfig(rho=1.5, tau=0.0), progress=False)
    assert report.config["rho"] == 1.5
