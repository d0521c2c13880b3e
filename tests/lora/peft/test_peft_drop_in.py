"""``eva_lora.peft`` in the place of PEFT's own functions: the same calls, layouts and types of error."""

import copy
import inspect
import warnings

import peft
import pytest
import torch
from peft.tuners.lora import eva as theirs

from eva_lora import peft as ours
from eva_lora.peft import get_eva_state_dict, initialize_lora_eva_weights
from support.bounds import EXACT_CAPTURES, captured_by, deviation, gamma, orthonormality, product_rounding
from support.models import (
    LINEARS,
    captured_share,
    layer_inputs,
    lora_a_of,
    scatter,
    tiny_gpt2,
    tiny_llama,
    token_batches,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:EVA stopped at"),
    pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'eva'"),
]

PREFIX = "base_model.model."


def config(rho=2.0, tau=0.5, **options):
    eva_config = peft.EvaConfig(rho=rho, tau=tau)
    defaults = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": LINEARS,
        "init_lora_weights": "eva",
        "eva_config": eva_config,
    }
    return peft.LoraConfig(**{**defaults, **options})


def model_of(**options):
    return peft.get_peft_model(tiny_llama(), config(**options))


def loader(count=4, **options):
    return torch.utils.data.DataLoader(
        [{"input_ids": r} for b in token_batches(count, **options) for r in b["input_ids"]], 4
    )


def ranks(model):
    return {name: a.shape[0] for name, a in lora_a_of(model).items()}


@pytest.mark.parametrize("name", ["get_eva_state_dict", "initialize_lora_eva_weights"])
def test_arguments_and_defaults_are_those_of_peft(name):
    mine, original = (inspect.signature(getattr(module, name)).parameters for module in (ours, theirs))
    assert list(mine)[: len(original)] == list(original)
    assert all(mine[key].kind == inspect.Parameter.KEYWORD_ONLY for key in [*mine][len(original) :])
    for key, parameter in original.items():
        default = getattr(parameter.default, "__name__", parameter.default)
        assert getattr(mine[key].default, "__name__", mine[key].default) == default
        assert mine[key].kind == parameter.kind


def test_the_same_seed_gives_the_same_weights_and_another_data_others():
    states = []
    for seed in (1, 1, 2):
        model = model_of()
        initialize_lora_eva_weights(model, loader(seed=seed), show_progress_bar=False)
        states.append(lora_a_of(model))
    assert all(torch.equal(states[0][name], a) for name, a in states[1].items())
    assert any(name not in states[2] or not torch.equal(states[2][name], a) for name, a in states[0].items())


def test_the_state_dict_has_peft_layout_and_its_values_capture_the_same_inputs():
    """Keys, shapes and the budget as PEFT's own function gives them, on the same data; the subspaces as good."""
    model, batches = model_of(rho=1.0), token_batches(1, (8, 32))  # one batch: both see all of it
    mine = get_eva_state_dict(model, batches, show_progress_bar=False)
    original = theirs.get_eva_state_dict(model, batches, show_progress_bar=False)
    assert mine.keys() == original.keys()
    assert {n: v.shape for n, v in mine.items()} == {n: v.shape for n, v in original.items()}
    assert {v.dtype for v in mine.values()} == {torch.float32}
    assert len({v.data_ptr() for v in mine.values()}) == len(mine)
    rows = layer_inputs(model, batches)
    for name, a in mine.items():
        x = rows[name.removeprefix(PREFIX)]
        exact = scatter(x)
        missed, theirs_missed = (1 - captured_share(basis, exact) for basis in (a, original[name]))
        assert missed <= 2 * theirs_missed + 1 - captured_by(exact, len(a), product_rounding("reference", *x.shape))


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], "all-linear", r".*\.o_proj"])
def test_a_bare_model_with_a_config(targets):
    model, batches = tiny_llama(), token_batches(4)
    lora_config = config(target_modules=targets, rank_pattern={"o_proj": 6, "down_proj": 3})
    before = copy.deepcopy(vars(lora_config))
    state = get_eva_state_dict(model, batches, peft_config=lora_config, show_progress_bar=False)
    assert vars(lora_config) == before
    adapted = peft.get_peft_model(
        tiny_llama(), config(target_modules=targets, rank_pattern={"o_proj": 6, "down_proj": 3})
    )
    configured = ranks(adapted)
    assert state.keys() == configured.keys()
    assert sum(len(a) for a in state.values()) == sum(configured.values())
    initialize_lora_eva_weights(adapted, eva_state_dict=state)  # PEFT would load nothing: its names have a prefix
    written = lora_a_of(adapted)
    assert {name: len(a) for name, a in state.items() if len(a)} == ranks(adapted)
    assert all(torch.equal(written[name], a) for name, a in state.items() if len(a))


def test_a_state_dict_is_loaded_and_only_read(tmp_path):
    first, second = model_of(), model_of()
    state = get_eva_state_dict(first, loader(), show_progress_bar=False)
    kept = {name: a.clone() for name, a in state.items()}
    initialize_lora_eva_weights(first, eva_state_dict=state)
    assert state.keys() == kept.keys()
    torch.save(state, tmp_path / "eva.pt")
    initialize_lora_eva_weights(second, eva_state_dict=torch.load(tmp_path / "eva.pt", weights_only=True))
    assert all(torch.equal(state[name], kept[name]) for name in kept)
    assert all(torch.equal(a, lora_a_of(second)[name]) for name, a in lora_a_of(first).items())


def test_a_state_dict_of_peft_loads():
    model, again = model_of(), model_of()
    state = theirs.get_eva_state_dict(model, token_batches(4, (4, 32)), show_progress_bar=False)
    initialize_lora_eva_weights(model, eva_state_dict=state)
    theirs.initialize_lora_eva_weights(again, eva_state_dict=dict(state))
    assert ranks(model) == ranks(again)
    assert all(torch.equal(a, lora_a_of(again)[name]) for name, a in lora_a_of(model).items())


def test_ours_loads_into_peft():
    model = model_of()
    state = get_eva_state_dict(model, token_batches(4), show_progress_bar=False)
    theirs.initialize_lora_eva_weights(model, eva_state_dict=dict(state))
    assert {PREFIX + name: rank for name, rank in ranks(model).items()} == {
        n: len(a) for n, a in state.items() if len(a)
    }


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("adjust", [True, False])
def test_scaling_follows_the_rank(use_rslora, adjust):
    model = model_of(use_rslora=use_rslora, eva_config=peft.EvaConfig(tau=0.0, adjust_scaling_factors=adjust))
    initialize_lora_eva_weights(model, loader(), show_progress_bar=False)
    moved = 0
    for name, a in lora_a_of(model).items():
        layer = model.get_base_model().get_submodule(name)
        rank = len(a)
        unchanged = 8 / (2 if use_rslora else 4)
        expected = unchanged if adjust else 8 / (rank**0.5 if use_rslora else rank)
        assert layer.scaling["default"] == pytest.approx(expected, rel=gamma(4, torch.float64))
        moved += rank != 4
    assert moved


def test_a_zero_rank_removes_the_layer_and_the_adapter_reloads(tmp_path):
    model = model_of()
    state = get_eva_state_dict(model, loader(), show_progress_bar=False)
    gone = PREFIX + "model.layers.1.self_attn.k_proj"
    state[gone] = state[gone][:0]
    initialize_lora_eva_weights(model, eva_state_dict=state)
    assert not hasattr(model.get_submodule(gone), "lora_A")
    model.save_pretrained(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert not hasattr(reloaded.get_submodule(gone), "lora_A")
    assert ranks(reloaded) == ranks(model)
    assert all(torch.equal(a, lora_a_of(reloaded)[name]) for name, a in lora_a_of(model).items())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_missing_layers_keep_a_random_a_and_are_named(low_cpu_mem_usage):
    model = peft.get_peft_model(tiny_llama(), config(), low_cpu_mem_usage=low_cpu_mem_usage)
    donor = model_of()
    state = get_eva_state_dict(donor, loader(), show_progress_bar=False)
    missing = [name for name in state if name.endswith("v_proj")]
    for name in missing:
        del state[name]
    with pytest.warns(UserWarning, match=r"it holds nothing for the layers \['model\.layers\.0\.self_attn\.v_proj'"):
        initialize_lora_eva_weights(model, eva_state_dict=state)
    for name in missing:
        layer = model.get_submodule(name)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert (a.shape[0], a.device.type) == (4, "cpu")
        assert a.std() > 0
        assert not b.any()
    assert not any(p.device.type == "meta" for p in model.parameters())


def labelled(count=4):
    batches = token_batches(count)
    for batch in batches:
        batch["attention_mask"] = (torch.arange(24) < 20).long().expand(4, 24)
        batch["labels"] = torch.where(torch.arange(24) < 6, -100, batch["input_ids"])
    return batches


@pytest.mark.parametrize("use_label_mask", [True, False])
@pytest.mark.parametrize("functions", ["ours", "theirs"])
def test_the_label_mask_leaves_rows_out(use_label_mask, functions):
    eva_config = peft.EvaConfig(rho=1.0, tau=0.0, use_label_mask=use_label_mask)
    model, batches = model_of(eva_config=eva_config), labelled(2)
    module = ours if functions == "ours" else theirs
    state = get_eva_state_dict(
        model,
        batches,
        prepare_model_inputs_fn=module.prepare_model_inputs_fn_language_modeling,
        prepare_layer_inputs_fn=module.prepare_layer_inputs_fn_language_modeling,
        show_progress_bar=False,
    )

    def kept(batch):
        return batch["attention_mask"].bool() & ((batch["labels"] != -100) | (not use_label_mask))

    rows = layer_inputs(model, batches, kept)
    for name, a in state.items():
        assert captured_share(a, scatter(rows[name.removeprefix(PREFIX)])) >= EXACT_CAPTURES


def first_tokens(layer_input, model_input, layer_name):
    return layer_input[0][:, :5].reshape(-1, layer_input[0].shape[-1])


def shares(model, batches, state, kept):
    rows = layer_inputs(model, batches, kept)
    return {n: captured_share(a, scatter(rows[n.removeprefix(PREFIX)])) for n, a in state.items()}


def test_a_function_chooses_the_rows_of_every_layer():
    model, batches = model_of(rho=1.0, tau=0.0), token_batches(2)
    seen = []

    def model_inputs(inputs, peft_config):
        seen.append((inputs["input_ids"].shape, peft_config is model.peft_config["default"]))
        return "made of the inputs"

    def layer_inputs_fn(layer_input, model_input, layer_name):
        assert isinstance(layer_input, tuple)
        assert model_input == "made of the inputs"
        assert layer_name in dict(model.named_modules())
        return first_tokens(layer_input, model_input, layer_name)

    state = get_eva_state_dict(
        model, batches, prepare_model_inputs_fn=model_inputs, prepare_layer_inputs_fn=layer_inputs_fn,
        show_progress_bar=False,
    )  # fmt: skip
    assert set(seen) == {((4, 24), True)}
    early = shares(model, batches, state, lambda batch: (torch.arange(24) < 5).expand(4, 24))
    assert min(early.values()) >= EXACT_CAPTURES


def test_a_mapping_names_functions_for_some_layers_and_the_others_count_every_row():
    model, batches = model_of(rho=1.0, tau=0.0), labelled(2)
    some = {f"{PREFIX}model.layers.{i}.mlp.down_proj": first_tokens for i in range(3)}
    kept = dict(some)
    state = get_eva_state_dict(model, batches, prepare_layer_inputs_fn=some, show_progress_bar=False)
    assert some == kept
    early = shares(model, batches, state, lambda batch: (torch.arange(24) < 5).expand(4, 24))
    all_of_them = shares(model, batches, state, lambda batch: None)
    for name in state:
        assert (early if name in some else all_of_them)[name] >= EXACT_CAPTURES
        assert (all_of_them if name in some else early)[name] < 0.999


def test_without_functions_every_row_counts():
    model, batches = model_of(rho=1.0, tau=0.0), labelled(2)
    state = get_eva_state_dict(
        model, batches, prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None, show_progress_bar=False
    )
    assert min(shares(model, batches, state, lambda batch: None).values()) >= EXACT_CAPTURES


def test_another_forward_function_is_called():
    model, calls = model_of(tau=0.0), []

    def forward(inner, inputs):
        calls.append(inner)
        return inner(input_ids=inputs["text"])

    batches = [{"text": b["input_ids"]} for b in token_batches(2)]
    get_eva_state_dict(
        model, batches, forward_fn=forward, prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )  # fmt: skip
    assert calls == [model] * 2


def test_another_adapter_is_initialised_by_name():
    model = peft.get_peft_model(tiny_gpt2(), peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    model.add_adapter("second", config(target_modules=["c_fc"], fan_in_fan_out=True))
    model.set_adapter("second")
    initialize_lora_eva_weights(model, token_batches(3), adapter_name="second", show_progress_bar=False)
    a = lora_a_of(model, "second")
    assert set(a) == {"transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc"}
    for rows in a.values():
        assert deviation(rows.T).abs().max() <= orthonormality(rows.shape[1], len(rows))


def active_twice():
    model = model_of()
    model.add_adapter("other", config())
    model.base_model.set_adapter(["default", "other"])
    return model


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: get_eva_state_dict(tiny_llama(), token_batches()), ValueError, r"^peft_config: "),
        (lambda: get_eva_state_dict(model_of(), []), ValueError, r"^dataloader: .* it is empty"),
        (
            lambda: get_eva_state_dict(model_of(), torch.utils.data.DataLoader([])),
            ValueError,
            r"^dataloader: .* it is empty",
        ),
        (
            lambda: get_eva_state_dict(model_of(), token_batches(), prepare_layer_inputs_fn={"nowhere": first_tokens}),
            ValueError,
            r"^prepare_layer_inputs_fn: expected names of layers, got \['nowhere'\]",
        ),
        (lambda: get_eva_state_dict(model_of(), [torch.ones(3, 4)]), TypeError, r"^dataloader: .* got Tensor"),
        (
            lambda: initialize_lora_eva_weights(tiny_llama(), token_batches()),
            ValueError,
            r"^model: expected a PeftModel",
        ),
        (lambda: initialize_lora_eva_weights(model_of()), ValueError, r"^dataloader: "),
        (
            lambda: initialize_lora_eva_weights(model_of(init_lora_weights=True, eva_config=None), token_batches()),
            ValueError,
            r"^model: .* made with init_lora_weights='eva'",
        ),
        (
            lambda: initialize_lora_eva_weights(active_twice(), token_batches()),
            ValueError,
            r"^model: expected a single",
        ),
        (
            lambda: initialize_lora_eva_weights(model_of(), eva_state_dict={"nowhere": torch.ones(2, 3)}),
            ValueError,
            r"^eva_state_dict: none of its layers",
        ),
        (
            lambda: initialize_lora_eva_weights(
                model_of(), eva_state_dict={"model.layers.0.self_attn.q_proj": torch.ones(2, 3)}
            ),
            ValueError,
            r"^eva_state_dict: model\.layers\.0\.self_attn\.q_proj: expected shape \(1 · rank, 32\), got \(2, 3\)",
        ),
        (lambda: peft.EvaConfig(rho=0.5), ValueError, "rho"),
    ],
)
def test_mistakes_raise_the_types_that_peft_raises(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_layers_of_a_state_dict_that_the_model_lacks_are_named():
    state = get_eva_state_dict(model_of(), loader(), show_progress_bar=False)
    state["head"] = torch.ones(2, 3)
    with pytest.warns(UserWarning, match=r"not in the model, and left out: \['head'\]"):
        initialize_lora_eva_weights(model_of(), eva_state_dict=state)


def test_a_complete_run_warns_of_nothing():
    with warnings.catch_warnings():
        model = model_of(tau=0.0)
        warnings.simplefilter("error", UserWarning)
        initialize_lora_eva_weights(model, loader(), show_progress_bar=False)


class Stream(torch.utils.data.IterableDataset):
    """Sequences, and no word of how many."""

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return iter([{"input_ids": row} for batch in token_batches(4) for row in batch["input_ids"]][: self.count])


class Unsized:
    """A loader whose length is an error of another kind than Python's own."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        raise NotImplementedError

    def __iter__(self):
        return iter(self.batches)


class Indexed:
    """Iterable by index alone, as Python takes it."""

    def __init__(self, batches):
        self.batches = batches

    def __getitem__(self, index):
        return self.batches[index]


ITERABLES = {
    "list": list,
    "tuple": tuple,
    "iterator": iter,
    "generator": lambda batches: (batch for batch in batches),
    "map": lambda batches: map(dict, batches),
    "by index": Indexed,
    "without a length": Unsized,
    "stream": lambda batches: torch.utils.data.DataLoader(Stream(4 * len(batches)), batch_size=4),
    "dataset": lambda batches: torch.utils.data.DataLoader(batches, batch_size=None),
}


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in ITERABLES.items()])
def test_any_iterable_is_a_loader(make):
    options = {"rho": 1.0, "tau": 0.0}  # done before any loader has to start again
    expected = get_eva_state_dict(model_of(**options), token_batches(4), show_progress_bar=False)
    state = get_eva_state_dict(model_of(**options), make(token_batches(4)), show_progress_bar=False)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], a) for name, a in expected.items())


@pytest.mark.parametrize("functions", ["default", "own"])
@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in ITERABLES.items()])
def test_every_kind_of_loader_without_a_batch_is_refused_before_any_forward(make, functions):
    model = model_of()
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass ran"))
    options = {} if functions == "default" else {"prepare_layer_inputs_fn": lambda x, _, name: x[0].flatten(0, 1)}
    with pytest.raises(ValueError, match=r"^dataloader: expected at least one batch, it is empty"):
        initialize_lora_eva_weights(model, make([]), show_progress_bar=False, **options)


def test_a_loader_that_ends_is_no_empty_loader():
    model = model_of(tau=1.0)
    with pytest.warns(UserWarning, match="EVA stopped at end of the data, after 2 batches"):
        initialize_lora_eva_weights(model, iter(token_batches(2)), show_progress_bar=False)


def test_what_is_no_iterable_is_refused_by_the_arguments_name():
    with pytest.raises(TypeError, match=r"^dataloader: expected an iterable of batches, got int"):
        initialize_lora_eva_weights(model_of(), 3, show_progress_bar=False)


def test_an_error_within_a_loader_comes_as_it_is():
    class Broken:
        def __iter__(self):
            raise TypeError("of its own")

    with pytest.raises(TypeError, match="of its own"):
        initialize_lora_eva_weights(model_of(), Broken(), show_progress_bar=False)
