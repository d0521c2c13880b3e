"""What eva_initialize promises of any model, shown on small random ones."""

import copy
import warnings
from dataclasses import dataclass

import peft
import pytest
import torch

from eva_lora import EvaConfig, EvaPlan, EvaStatistics, apply, collect, eva_initialize, plan
from support.models import (
    LINEARS,
    captured_share,
    layer_inputs,
    lora,
    lora_a_of,
    scatter,
    tiny_gpt2,
    tiny_llama,
    token_batches,
)

pytestmark = pytest.mark.filterwarnings("ignore:EVA stopped at")


def initialise(model, batches=None, **options):
    options = {"max_batches": 6, **options}
    return eva_initialize(model, batches or token_batches(), EvaConfig(**options), progress=False)


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
        # Random networks have flat spectra, the hardest for a streaming subspace; real ones are tested elsewhere.
        assert captured_share(a, scatter(rows[name])) >= (0.9999 if statistic == "gram" else 0.995)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva"])
def test_logits_are_those_of_the_base_and_training_runs(init, use_dora):
    base = tiny_llama()
    batch = token_batches(1)[0]
    expected = logits(base, batch)
    model = lora(base, init_lora_weights=init, use_dora=use_dora)
    report = initialise(model)
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
            assert scaling == pytest.approx(expected if adjust else unadjusted, rel=1e-12)
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
        sigma = torch.linalg.svdvals(rows[name] - rows[name].mean(0))[: len(a)]
        expected = a.double() / sigma.sqrt()[:, None]
        torch.testing.assert_close(lora_a_of(white)[name].double(), expected, rtol=1e-4, atol=1e-6)


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


def padded(fill, mask_padding=True):
    """The same unmasked tokens with different content in the padding."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 97, (3, 4, 20), generator=generator)
    keep = torch.arange(20).expand(4, 20) < torch.tensor([20, 11, 5, 16])[:, None]
    ids = torch.where(keep, ids, fill)
    return [{"input_ids": batch, "attention_mask": keep.long()} for batch in ids]


def test_padding_never_changes_the_result():
    models = [lora(tiny_llama()) for _ in range(2)]
    for model, fill in zip(models, (0, 50), strict=True):
        initialise(model, padded(fill))
    first, second = (lora_a_of(model) for model in models)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-5)


def test_nan_in_padding_never_changes_the_result():
    """Padded positions are made NaN at the embedding of a network that mixes no positions."""

    class Rowwise(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = torch.nn.Linear(12, 12), torch.nn.Linear(12, 12)

        def forward(self, x, attention_mask):
            return self.second(torch.tanh(self.first(x)))

    x = torch.randn(2, 5, 9, 12, generator=torch.Generator().manual_seed(0))
    keep = torch.rand(5, 9, generator=torch.Generator().manual_seed(1)) < 0.6
    results = []
    for fill in (0.0, float("nan")):
        model = peft.get_peft_model(Rowwise(), peft.LoraConfig(r=3, target_modules=["first", "second"]))
        filled = torch.where(keep[..., None], x, fill)
        initialise(model, [{"x": batch, "attention_mask": keep} for batch in filled])
        results.append(lora_a_of(model))
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name])


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, lambda batch: batch["attention_mask"].bool() & (batch["labels"] != -100)),
        ({"label_mask_value": 7}, lambda batch: batch["attention_mask"].bool() & (batch["labels"] != 7)),
        ({"use_label_mask": False}, lambda batch: batch["attention_mask"].bool()),
    ],
    ids=["labels", "custom value", "attention only"],
)
def test_masked_labels_leave_rows_out(options, kept):
    batches = padded(0)
    for batch in batches:
        labels = batch["input_ids"].clone()
        labels[:, :6] = options.get("label_mask_value", -100)
        batch["labels"] = labels
    model = lora(tiny_llama())
    rows = layer_inputs(model, batches, kept)
    report = initialise(model, batches, max_batches=3, **options)
    assert report.num_rows == sum(int(kept(batch).sum()) for batch in batches)
    for name, a in lora_a_of(model).items():
        assert captured_share(a, scatter(rows[name])) >= 0.9999


def test_a_row_mask_fn_decides_alone():
    batches = token_batches(3)
    model = lora(tiny_llama())

    def first_half(batch):
        return (torch.arange(24) < 12).expand(4, 24)

    rows = layer_inputs(model, batches, first_half)
    report = eva_initialize(model, batches, EvaConfig(max_batches=3), row_mask_fn=first_half, progress=False)
    assert report.num_rows == 3 * 48
    for name, a in lora_a_of(model).items():
        assert captured_share(a, scatter(rows[name])) >= 0.9999


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


def test_layers_that_are_merely_close_are_not_merged():
    class Close(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (torch.nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            return self.a(x) + self.b(x) + self.c(x + 0)  # equal values, another tensor

    model = peft.get_peft_model(Close(), peft.LoraConfig(r=2, target_modules=["a", "b", "c"]))
    report = initialise(model, [torch.randn(30, 8) for _ in range(2)])
    assert report.shared_inputs == [["a", "b"]]
    assert report.ranks.keys() == {"a", "b", "c"}


@dataclass
class DataclassBatch:
    input_ids: torch.Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        lambda batches: batches,
        lambda batches: iter(batches),
        lambda batches: (batch for batch in batches),
        lambda batches: [(batch["input_ids"],) for batch in batches],
        lambda batches: [[batch["input_ids"]] for batch in batches],
        lambda batches: [batch["input_ids"] for batch in batches],
        lambda batches: [DataclassBatch(**batch) for batch in batches],
        lambda batches: torch.utils.data.DataLoader([{"input_ids": r} for b in batches for r in b["input_ids"]], 4),
    ],
    ids=["list", "iterator", "generator", "tuples", "lists", "tensors", "dataclasses", "DataLoader"],
)
def test_any_loader_of_any_batches(wrap):
    expected, model = lora(tiny_llama()), lora(tiny_llama())
    initialise(expected)
    initialise(model, wrap(token_batches()))
    for name, a in lora_a_of(expected).items():
        torch.testing.assert_close(lora_a_of(model)[name], a)


def test_a_forward_fn_replaces_the_call():
    seen = []

    def forward(model, batch):
        seen.append(batch)
        return model(input_ids=batch["text"])

    model = lora(tiny_llama())
    batches = [{"text": batch["input_ids"]} for batch in token_batches(3)]
    report = eva_initialize(model, batches, EvaConfig(max_batches=3), forward_fn=forward, progress=False)
    assert len(seen) == report.num_batches == 3


def test_a_loader_that_ends_ends_the_pass_with_a_warning():
    model = lora(tiny_llama())
    with pytest.warns(UserWarning, match=r"end of the data, after 2 batches .* 21 of 21 layers not converged"):
        report = eva_initialize(model, iter(token_batches(2)), EvaConfig(tau=1.0), progress=False)
    assert (report.num_batches, report.stop_reason) == (2, "end of the data")
    assert not any(report.converged.values())


@pytest.mark.parametrize(("options", "batches"), [({"max_batches": 4}, 4), ({"max_rows": 200}, 3)])
def test_bounds_end_the_pass(options, batches):
    report = initialise(lora(tiny_llama()), tau=1.0, **{"max_batches": 9, **options})
    assert report.num_batches == batches


def test_without_bounds_the_pass_still_ends(monkeypatch):
    monkeypatch.setattr("eva_lora.running.DEFAULT_MAX_BATCHES", 11)
    report = initialise(lora(tiny_llama()), token_batches(2), tau=1.0, max_batches=None)
    assert (report.num_batches, report.stop_reason) == (11, "max_batches (11)")


def test_tau_zero_stops_at_the_second_update():
    report = initialise(lora(tiny_llama()), tau=0.0)
    assert (report.num_batches, report.stop_reason) == (2, "all layers converged")
    assert all(report.converged.values())


@pytest.mark.parametrize("criterion", ["component", "subspace"])
def test_repeating_the_data_converges(criterion):
    report = initialise(lora(tiny_llama()), convergence=criterion, max_batches=None, tau=0.9)
    assert all(report.converged.values())
    assert report.history[-1] == 21
    for name, rank in report.ranks.items():
        assert criterion == "subspace" or report.components_converged[name] >= rank


def test_small_batches_are_accumulated():
    batches = token_batches(60, (1, 3))
    model = lora(tiny_llama())
    rows = layer_inputs(model, batches)
    report = initialise(model, batches, max_batches=60)
    assert report.num_rows == 180
    for name, a in lora_a_of(model).items():
        assert captured_share(a, scatter(rows[name])) >= 0.9999


def test_forwards_stop_at_the_last_layer_wanted():
    heads = []
    counts = {}
    for early_stop in (True, False):
        model = lora(tiny_llama())
        model.base_model.model.lm_head.register_forward_hook(lambda *_, key=early_stop: heads.append(key))
        initialise(model, early_stop=early_stop)
        counts[early_stop] = heads.count(early_stop)
    assert counts == {True: 0, False: 6}


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
    statistics = collect(model, token_batches(), EvaConfig(max_batches=3), progress=False)
    assert sum(plan(statistics, budget=50).ranks.values()) == 50
    assert sum(plan(statistics, EvaConfig(rho=1.5)).ranks.values()) == 84
    with pytest.raises(ValueError, match=r"^rho: 7.0 asks for 28 components of .*, but the statistics hold 24"):
        plan(statistics, EvaConfig(rho=7.0))


def test_peft_config_is_accepted_and_honoured():
    model = lora(tiny_llama(), init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0, tau=0.0))
    report = eva_initialize(model, token_batches(), progress=False)
    assert report.config["rho"] == 1.0
    assert report.num_batches == 2
    report = eva_initialize(lora(tiny_llama()), token_batches(), peft.EvaConfig(rho=1.5, tau=0.0), progress=False)
    assert report.config["rho"] == 1.5


def test_decoders_are_spared_cache_logits_and_loss():
    seen = []

    class Recorder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(4, 4)

        def forward(self, x, labels=None, use_cache=True, logits_to_keep=0):
            seen.append((labels, use_cache, logits_to_keep))
            return self.inner(x)

    model = peft.get_peft_model(Recorder(), peft.LoraConfig(r=2, target_modules=["inner"]))
    labels = torch.ones(3, 10, dtype=torch.long)
    initialise(model, [{"x": torch.randn(3, 10, 4), "labels": labels}], max_batches=1)
    assert seen == [(None, False, 1)]
    seen.clear()
    asked = {"x": torch.randn(3, 10, 4), "labels": labels, "use_cache": True, "logits_to_keep": 5}
    initialise(model, [asked], max_batches=1)
    assert seen == [(labels, True, 5)]  # what the caller asks for is left as it is
