"""Every mistake gets a message that names the argument or the layer, before a forward pass where possible."""

import peft
import pytest
import torch
from torch import nn

from eva_lora import (
    EvaConfig,
    EvaPlan,
    EvaStatistics,
    apply,
    collect,
    eva_initialize,
    fit_quantization_error,
    initialize,
    plan,
)
from support.models import lora, tiny_llama, token_batches


class Unreachable:
    """Fails the test if the model is run."""

    def __call__(self, *_):
        pytest.fail("a forward pass ran")


def guarded(model):
    model.register_forward_pre_hook(Unreachable())
    return model


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rho": 0.5}, ValueError, r"^rho: expected a number at least 1\.0, got 0\.5"),
        ({"rho": "two"}, TypeError, r"^rho: expected a number, got 'two'"),
        ({"rho": float("nan")}, ValueError, r"^rho: .* got nan"),
        ({"rho": float("inf")}, ValueError, r"^rho: .* got inf"),
        ({"tau": 1.5}, ValueError, r"^tau: expected a number between 0\.0 and 1\.0, got 1\.5"),
        ({"tau": -0.1}, ValueError, r"^tau: "),
        ({"convergence": "cosine"}, ValueError, r"^convergence: expected one of \('component', .* got 'cosine'"),
        ({"nonfinite": "ignore"}, ValueError, r"^nonfinite: expected one of \('error', 'skip'\), got 'ignore'"),
        ({"uncalled": "skip"}, ValueError, r"^uncalled: expected one of \('error', 'default'\), got 'skip'"),
        ({"impl": "cuda"}, ValueError, r"^impl: expected one of"),
        ({"statistic": "svd"}, ValueError, r"^statistic: expected one of"),
        ({"max_batches": 0}, ValueError, r"^max_batches: expected an integer of at least 1, got 0"),
        ({"max_rows": 1.5}, TypeError, r"^max_rows: expected an integer, got 1\.5"),
        ({"min_rank": 3, "max_rank": 2}, ValueError, r"^max_rank: expected at least min_rank \(3\), got 2"),
        ({"oversampling": 0.5}, ValueError, r"^oversampling: "),
        ({"whiten": 1}, TypeError, r"^whiten: expected True or False, got 1"),
        ({"early_stop": "never"}, ValueError, r"^early_stop: "),
    ],
)
def test_options_are_checked_once_and_named(options, error, message):
    with pytest.raises(error, match=message):
        EvaConfig(**options)


def test_a_config_of_another_kind_is_refused():
    with pytest.raises(TypeError, match=r"^config: expected eva_lora.EvaConfig or peft.EvaConfig, got dict"):
        eva_initialize(guarded(lora(tiny_llama())), token_batches(), {"rho": 2})


@pytest.mark.parametrize(("options", "name"), [({"min_rank": 5}, "budget"), ({"min_rank": 9}, "min_rank")])
def test_rank_bounds_that_cannot_be_met_are_refused_before_any_forward(options, name):
    loader = iter(token_batches(2))
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        eva_initialize(guarded(lora(tiny_llama())), loader, EvaConfig(**options))
    assert len(list(loader)) == 2  # not a batch was taken


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_rank": 9}, "min_rank: expected at most 8, the most that {} may be given with rho 2 and .* of 1, got 9"),
        ({"max_rank": 2, "rank_multiple": 3}, "max_rank: expected at least 3, since {} is given ranks in .*, got 2"),
    ],
)
def test_rank_bounds_that_a_layer_cannot_meet_name_it(options, message):
    """Wherever ranks are given: the kernels behind it know layers by their numbers alone."""
    config, loader = EvaConfig(rho=2.0, **options), token_batches(1)
    statistics = collect(lora(tiny_llama()), loader, EvaConfig(max_batches=1), progress=False)
    calls = {
        "eva_initialize": lambda: eva_initialize(guarded(lora(tiny_llama())), loader, config),
        "collect": lambda: collect(guarded(lora(tiny_llama())), loader, config),
        "plan": lambda: plan(statistics, config),
        "pissa": lambda: initialize(lora(tiny_llama()), method="pissa", config=config, budget=8),
        "corda": lambda: initialize(guarded(lora(tiny_llama())), loader, method="corda", config=config),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match="^" + message.format(r"model\.layers\.0\.self_attn\.\w+")):
            pytest.fail(f"{name}: {call()}")


@pytest.mark.parametrize("empty", [[], iter([]), torch.utils.data.DataLoader([])])
def test_an_empty_loader_is_refused_before_any_forward(empty):
    with pytest.raises(ValueError, match=r"^loader: expected at least one batch, it is empty"):
        eva_initialize(guarded(lora(tiny_llama())), empty)


@pytest.mark.parametrize("loader", [3, "train.jsonl", b"train", token_batches(1)[0]], ids=lambda x: type(x).__name__)
def test_a_loader_must_be_iterable_and_neither_a_path_nor_one_batch(loader):
    model, got = guarded(lora(tiny_llama())), f"got {type(loader).__name__}"
    with pytest.raises(TypeError, match=f"^loader: expected an iterable of batches, {got}"):
        eva_initialize(model, loader)
    with pytest.raises(TypeError, match=f"^loader_or_statistics: expected an iterable of batches or .*, {got}"):
        initialize(model, loader, "corda")
    with pytest.raises(TypeError, match=f"^loader_or_statistics: expected an iterable of batches or .*, {got}"):
        fit_quantization_error(model, loader, tiny_llama())


def test_a_model_without_lora_layers_is_refused_before_any_forward():
    with pytest.raises(ValueError, match=r"^model: found no LoRA layers\. Add them first"):
        eva_initialize(guarded(tiny_llama()), token_batches())
    with pytest.raises(TypeError, match=r"^model: expected a torch.nn.Module with LoRA layers, got str"):
        eva_initialize("llama", token_batches())


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
def test_a_base_that_an_initialisation_changed_is_refused(init):
    model = lora(tiny_llama(), init_lora_weights=init)
    with pytest.raises(ValueError, match=rf"^model: init_lora_weights='{init}' has already changed .*'eva'"):
        eva_initialize(guarded(model), token_batches())


@pytest.mark.parametrize("init", ["corda", "loftq", "lora_ga", "mica"])
def test_other_data_driven_initialisations_are_refused(init):
    model = lora(tiny_llama())
    model.peft_config["default"].init_lora_weights = init  # building these needs data or quantisation
    with pytest.raises(ValueError, match=rf"^model: init_lora_weights='{init}'"):
        eva_initialize(guarded(model), token_batches())


class Kinds(nn.Module):
    """A layer of every kind that EVA leaves alone, and one that it initialises."""

    def __init__(self):
        super().__init__()
        self.words, self.grouped = nn.Embedding(7, 4), nn.Conv1d(4, 4, 3, padding=1, groups=2)
        self.out, self.table = nn.Linear(4, 4), nn.Embedding(7, 4)

    def forward(self, tokens):
        x = self.words(tokens) + self.table(tokens)
        return self.out(self.grouped(x.mT).mT)


def of_several_kinds():
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=2, target_modules=["words", "grouped", "out"], target_parameters=["table.weight"], rank_pattern={"words": 4}
    )
    return peft.get_peft_model(Kinds(), config)


@pytest.mark.parametrize("start", [
    lambda model: initialize(model, method="pissa"),
    lambda model: fit_quantization_error(
        model, float_weights={"out.weight": model.get_parameter("base_model.model.out.base_layer.weight").clone()},
        config=EvaConfig(rho=1), method="loftq",
    ),
], ids=["pissa", "loftq"])  # fmt: skip
def test_methods_without_a_pass_name_them_too(start):
    model = of_several_kinds()
    with pytest.warns(
        UserWarning, match=r"^(pissa|loftq) leaves these layers as they are: words: an emb.*; grouped: wi"
    ):
        report = start(model)
    assert list(report.layers) == ["out"]


def test_layers_that_eva_does_not_apply_to_are_named_once_with_the_reason():
    tokens = torch.randint(0, 7, (8, 10))
    model = of_several_kinds()
    torch.manual_seed(0)
    before = {n: p.clone() for n, p in model.named_parameters() if ".out." not in n}
    with pytest.warns(
        UserWarning, match=r"^EVA leaves these layers as they are: words: an embedding's .*; grouped: wi"
    ):
        report = eva_initialize(model, [tokens], EvaConfig(max_batches=1), progress=False)
    assert list(report.ranks) == ["out"]
    reasons = dict(note.split(" is not initialised by EVA: ") for note in report.notes)
    assert set(reasons) == {"words", "grouped", "table.weight"}
    assert "token numbers" in reasons["words"]
    assert "groups=2" in reasons["grouped"]
    assert "parameter of a Embedding" in reasons["table.weight"]
    assert "words is not initialised" in str(report)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert model.peft_config["default"].rank_pattern == {"words": 4}


def test_a_model_of_nothing_but_such_layers_is_refused():
    model = peft.get_peft_model(Kinds(), peft.LoraConfig(r=2, target_modules=["words"]))
    with pytest.raises(
        ValueError, match=r"^model: EVA applies to none of its LoRA layers: \{'words': \"an embedding's"
    ):
        eva_initialize(guarded(model), [torch.ones(1, 3, dtype=torch.long)])


def test_an_adapter_that_cannot_run_is_refused_by_name():
    base = nn.Sequential(nn.Conv2d(3, 4, 3, dilation=2))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(RuntimeError, match="size of tensor"):  # what PEFT itself does with it
        model(torch.ones(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"^model: PEFT's adapter of 0 cannot run: its A has no dilation, .*\(2, 2\)"):
        eva_initialize(guarded(model), [torch.ones(1, 3, 8, 8)])


def test_versions_of_peft_that_are_too_old_are_refused(monkeypatch):
    model = guarded(lora(tiny_llama()))
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.19.1")
    with pytest.raises(ValueError, match=r"^model: expected layers of PEFT 0\.20 or later, 0\.19\.1 is installed"):
        eva_initialize(model, token_batches())


def test_two_active_adapters_are_refused():
    model = lora(tiny_llama())
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"^model: expected exactly one active LoRA adapter, 2 are: \['default'"):
        eva_initialize(guarded(model), token_batches())


def test_a_merged_adapter_is_refused():
    model = lora(tiny_llama())
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"^model: the adapter of model\.layers\.0\..* is merged"):
        eva_initialize(guarded(model), token_batches())


def test_data_without_an_unmasked_row_is_an_error():
    batches = [{**b, "labels": torch.full_like(b["input_ids"], -100)} for b in token_batches(3)]
    with pytest.raises(ValueError, match=r"^loader: 1000 batches held no unmasked row; check attention_mask"):
        eva_initialize(lora(tiny_llama()), batches, progress=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_activations_name_the_layer_and_the_batch(value):
    model = lora(tiny_llama())
    calls = iter(range(100))

    def poison(module, args, output):
        return output + value if next(calls) == 1 else output

    model.base_model.model.model.layers[1].mlp.register_forward_hook(poison)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(
        ValueError,
        match=r"^batch 2: NaN or Inf reached the input of model\.layers\.2\.self_attn.* \(an unknown number of rows\)",
    ):
        eva_initialize(model, token_batches(), progress=False)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_layers_that_are_not_called_are_named():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    model = peft.get_peft_model(Half(), peft.LoraConfig(r=2, target_modules=["used", "spare"]))
    with pytest.raises(ValueError, match=r"^model: 1 LoRA layers saw no input in the first batch: spare\."):
        eva_initialize(model, [torch.randn(8, 4)], progress=False)


def test_attention_masks_of_other_layouts_are_refused():
    batch = {**token_batches(1)[0], "attention_mask": torch.ones(4, 1, 1, 24, 24)}
    with pytest.raises(ValueError, match=r"^attention_mask: expected shape \(batch, tokens\) or .* got \(4, 1, 1, 24,"):
        eva_initialize(lora(tiny_llama()), [batch], progress=False)


def test_a_row_mask_fn_must_return_a_mask():
    with pytest.raises(TypeError, match=r"^row_mask_fn: expected None or a bool tensor .* got list"):
        eva_initialize(lora(tiny_llama()), token_batches(), row_mask_fn=lambda batch: [1], progress=False)


@pytest.fixture
def statistics():
    with pytest.warns(UserWarning, match="EVA stopped at"):
        return collect(lora(tiny_llama()), token_batches(), EvaConfig(max_batches=2), progress=False)


def test_plans_for_other_models_are_refused(statistics):
    eva_plan = plan(statistics)
    with pytest.raises(ValueError, match=r"^plan: it is for other layers than the model's: .*not in the model \['"):
        apply(lora(tiny_llama(), target_modules=["q_proj"]), eva_plan)
    with pytest.raises(ValueError, match=r"^plan: .* was planned from rank 4 and width 32, the model has rank 5"):
        apply(lora(tiny_llama(), r=5), eva_plan)


def test_impossible_budgets_and_bounds_are_refused(statistics):
    with pytest.raises(ValueError, match=r"^budget: expected at least 1, got 0"):
        plan(statistics, budget=0)
    with pytest.raises(ValueError, match="min_rank"):
        plan(statistics, EvaConfig(min_rank=5))
    with pytest.raises(ValueError, match="max_rank"):
        plan(statistics, EvaConfig(max_rank=3))


@pytest.mark.parametrize("kind", [EvaStatistics, EvaPlan])
def test_files_that_are_missing_or_damaged_are_refused(tmp_path, kind, statistics):
    path = tmp_path / "file.safetensors"
    with pytest.raises(FileNotFoundError, match="there is no file"):
        kind.load(path)
    (statistics if kind is EvaPlan else plan(statistics)).save(path)
    with pytest.raises(ValueError, match=r"^path: expected a (plan|statistics) file, .* holds '(statistics|plan)'"):
        kind.load(path)
    (statistics if kind is EvaStatistics else plan(statistics)).save(path)
    whole = path.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="damaged"):
            kind.load(path)
    with pytest.raises(IsADirectoryError, match="expected a file name"):
        statistics.save(tmp_path)
