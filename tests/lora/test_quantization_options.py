"""Beside A and B: biases, DoRA, rounds of LoftQ, splits, several adapters, models that keep state."""

import copy
import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast, ViTConfig, ViTModel

import eva_lora
from eva_lora import EvaConfig, EvaPlan, RepairReport
from eva_lora import fit_quantization_error as fit
from eva_lora.peft import replace_lora_weights_loftq
from support.models import layer_inputs, lora, tiny_llama, token_batches
from support.quantised import least_errors, output_errors, quantised, rounded
from support.versions import needs

UNIT = 2.0**-24


def repaired(model, floats, batches=None, *, hold_back=0, **options):
    config = {"rho": 1.0, "max_batches": 6, "tau": 1.0, "statistic": "gram", "oversampling": 100.0}
    given = {name: options.pop(name) for name in [*options] if name in EvaConfig.__dataclass_fields__}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # not converged: there are few batches
        return fit(
            model, batches or token_batches(), floats, EvaConfig(**{**config, **given}), progress=False,
            hold_back=hold_back, **options,
        )  # fmt: skip


@pytest.fixture(scope="module")
def floats():
    return tiny_llama()


def layer_of(model, name):
    return model.get_base_model().get_submodule(name)


# --- biases


def test_biases_take_the_mean_error_and_directions_the_rest(floats):
    """Beside a free bias the least error is that of the centred rows: no bias nor direction does better."""
    bases = quantised(floats, group=16)
    model = lora(copy.deepcopy(bases), lora_bias=True, lora_alpha=8)
    rows = layer_inputs(model, token_batches())
    report = repaired(model, floats)
    centred = {name: x - x.mean(0) for name, x in rows.items()}
    least = least_errors(floats, bases, centred, report.ranks)
    without = output_errors(model, floats, rows)
    for name, x in rows.items():
        layer = layer_of(model, name)
        error = (floats.get_submodule(name).weight - layer.base_layer.weight).detach().double()
        change = layer.get_delta_weight("default").detach().double()
        bias = layer.scaling["default"] * layer.lora_B["default"].bias.detach().double()
        assert bias.any(), name
        left = float((x @ (error - change).T - bias).square().sum(1).mean())
        rounding = 2 * len(x) * UNIT * without[name][0]
        assert left <= (1 + 1e-6) * least[name] + rounding, name
        before, _, output = without[name]
        fitted = report.layers[name].fitted
        np.testing.assert_allclose(fitted, (before / output, left / output), rtol=0, atol=2 * rounding / output)


def test_a_model_with_biases_is_measured_with_them_and_reloads(floats, tmp_path):
    bases = quantised(floats, bits=3, group=16)
    model, batches = lora(copy.deepcopy(bases), lora_bias=True), token_batches(4)
    report = repaired(model, floats, batches, hold_back=4, max_batches=None)
    model.eval()
    with torch.no_grad():
        true = floats.eval()(**batches[1], output_hidden_states=True).hidden_states[-1]
        made = model(**batches[1], output_hidden_states=True).hidden_states[-1]
    # Forwards in float32 of three layers: Q x + s B A x + c here, by hooks there.
    np.testing.assert_allclose(report.hidden_error[1], (made - true).norm() / true.norm(), rtol=1e-4)
    rows = layer_inputs(model, [batches[1]])
    for name, x in rows.items():
        layer = layer_of(model, name)
        w = floats.get_submodule(name).weight.detach().double()
        error = w - layer.base_layer.weight.detach().double() - layer.get_delta_weight("default").detach().double()
        bias = layer.scaling["default"] * layer.lora_B["default"].bias.detach().double()
        left = (x @ error.T - bias).square().sum() / (x @ w.T).square().sum()
        np.testing.assert_allclose(report.layers[name].held[1], left, rtol=4 * x.shape[1] * UNIT)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(bases), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**batches[1]).logits, model(**batches[1]).logits)


def test_biases_are_in_a_plan_s_file(floats, tmp_path):
    plans = []
    write = eva_lora.adapters.PeftAdapter.apply
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            eva_lora.adapters.PeftAdapter, "apply", lambda self, plan: plans.append(plan) or write(self, plan)
        )
        model = lora(quantised(floats, group=16), lora_bias=True)
        repaired(model, floats)
    loaded = EvaPlan.load(plans[0].save(tmp_path / "plan.safetensors"))
    assert loaded.lora_bias.keys() == plans[0].lora_bias.keys() == loaded.sites.keys()
    other = lora(quantised(floats, group=16), lora_bias=True)
    eva_lora.apply(other, loaded)
    for name in loaded.sites:
        ours, theirs = (layer_of(m, name).lora_B["default"].bias for m in (other, model))
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="plan: it has a bias beside B for"):
        eva_lora.apply(lora(quantised(floats, group=16)), loaded)


# --- DoRA


def test_with_dora_a_layer_computes_with_the_repaired_weight(floats):
    """Its lengths are those of Q + s B A, so that a start with DoRA is the start without it."""
    bases, batch = quantised(floats, group=16), token_batches(1)[0]
    logits = []
    for dora in (False, True):
        model = lora(copy.deepcopy(bases), use_dora=dora)
        report = repaired(model, floats, hold_back=3, max_batches=None)
        assert len(report.layers) == 21
        with torch.no_grad():
            logits.append(model.eval()(**batch).logits.double())
    # DoRA divides by lengths and multiplies with them again: roundings of float32, through three layers.
    assert (logits[0] - logits[1]).norm() <= 1e-5 * logits[0].norm()
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(**batch).logits, bases.eval()(**batch).logits)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora" in n}
    replace_lora_weights_loftq(model, model_path=floats, callback=lambda *_: False)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if "lora" in n)


# --- LoftQ's rounds


def test_rounds_of_loftq_are_its_alternation(floats):
    bases = quantised(floats, bits=3, group=16)
    model, seen = lora(copy.deepcopy(bases), lora_alpha=8), []

    def requantize(name, layer, matrix):
        seen.append(name)
        layer.weight.data.copy_(rounded(matrix, bits=3, group=16))

    report = fit(
        model, None, floats, EvaConfig(rho=1.0), method="loftq", rounds=3, requantize=requantize, progress=False
    )
    assert len(seen) == 2 * 21
    for name in report.layers:
        w = floats.get_submodule(name).weight.detach()
        q = bases.get_submodule(name).weight.detach()
        for turn in range(3):
            u, s, vt = np.linalg.svd((w - q).double().numpy(), full_matrices=False)
            fitted = torch.from_numpy((u[:, :4] * s[:4]) @ vt[:4])
            if turn < 2:
                q = rounded((w.double() - fitted).float(), bits=3, group=16)
        layer = layer_of(model, name)
        # The same but for roundings; where a weight was at the middle of a step these decide, and it is a step off.
        apart = (layer.base_layer.weight - q).abs() > 1e-4 * q.abs().max()
        assert apart.float().mean() <= 1e-2, name
        left = w.double() - layer.base_layer.weight.double() - layer.get_delta_weight("default").double()
        once = w.double() - bases.get_submodule(name).weight.double()
        assert left.norm() < np.linalg.norm(np.linalg.svd(once.detach().numpy())[1][4:])
        assert report.layers[name].weight_error > 0
    eva_lora.require_same_base(model, report)
    with pytest.raises(ValueError, match="computes with other weights"):
        eva_lora.require_same_base(lora(copy.deepcopy(bases)), report)


def test_bitsandbytes_quantises_anew_by_itself(floats):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    floats = nn.Sequential(nn.Linear(64, 128, bias=False))
    layer = bnb.nn.Linear4bit(64, 128, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.load_state_dict(floats[0].state_dict())
    base = nn.Sequential(layer.to("cpu"))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0"]))
    x, errors = torch.randn(32, 64), []
    for rounds in (1, 2, 5):
        report = fit(
            copy.deepcopy(model), None, floats, EvaConfig(rho=1.0), method="loftq", rounds=rounds, progress=False
        )
        errors.append(report.layers["0"].fitted[1])
    assert errors[2] < errors[1] < errors[0]
    fit(model, None, floats, EvaConfig(rho=1.0), method="loftq", rounds=5, progress=False)
    with torch.no_grad():
        left = (model(x) - floats(x)).square().sum() / floats(x).square().sum()
    assert left < 2 * errors[2]  # other rows than R = I has


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds: expected an integer of at least 1"),
        ({"rounds": 2, "method": "repair"}, "rounds: expected 1 without method"),
        ({"rounds": 2, "config": EvaConfig(rho=2.0)}, "rounds: expected 1 where ranks move"),
        ({"rounds": 2}, "requantize: expected a callable for layer"),
        ({"passes": 0}, "passes: expected an integer of at least 1"),
        ({"passes": 2}, "passes: expected 1 with method"),
        ({"passes": 2, "method": "repair", "config": EvaConfig()}, "passes: expected 1 where ranks move"),
        ({"float_inputs": True}, "float_inputs: expected False without batches"),
        (
            {"float_inputs": True, "passes": 2, "method": "repair"},
            "float_inputs: expected False without batches, and with passes above 1",
        ),
        ({"data": []}, "loader_or_statistics: expected None with method"),
        ({"method": "repair", "data": None}, "loader_or_statistics: expected batches or EvaStatistics with method"),
        ({"requantize": print}, "requantize: expected None, since one round leaves the base as it is"),
        ({"repair_explained": 0.5}, "repair_explained: expected None without method"),
        ({"repair_share": 0.5}, "repair_share: expected None without method"),
        (
            {"method": "eva+repair", "repair_share": 0.3, "repair_explained": 0.5},
            "repair_share: expected None beside repair_explained",
        ),
        ({"method": "eva+repair", "repair_explained": 1.0}, "repair_explained: expected a number between 0 and 1"),
    ],
)
def test_options_that_do_not_go_together_are_named(floats, options, message):
    model = lora(quantised(floats, group=16))
    arguments = {"config": EvaConfig(rho=1.0), "method": "loftq", **options}
    data = arguments.pop("data", None if arguments["method"] == "loftq" else token_batches())
    with pytest.raises(ValueError, match=message):
        fit(model, data, floats, progress=False, **arguments)


# --- the split


def test_as_many_directions_repair_as_explain_a_share_of_the_error(floats):
    bases = quantised(floats, group=16)
    model = lora(copy.deepcopy(bases), r=8)
    rows = layer_inputs(model, token_batches())
    report = repaired(model, floats, method="eva+repair", repair_explained=0.8)
    counts = set()
    for name, x in rows.items():
        error = (floats.get_submodule(name).weight - bases.get_submodule(name).weight).detach().double()
        values = torch.linalg.eigvalsh(error @ (x.T @ x / len(x)) @ error.T).flip(0)[:8]
        explained = values.cumsum(0) / values.sum()
        count = next(k + 1 for k in range(8) if explained[k] >= 0.8)
        assert report.layers[name].repaired == count, name
        b = layer_of(model, name).lora_B["default"].weight
        assert b[:, :count].any(0).all()
        assert not b[:, count:].any()
        counts.add(count)
    assert len(counts) > 1


# --- whose base


def test_of_several_adapters_the_one_that_is_meant_is_looked_at(floats):
    model = lora(quantised(floats, group=16))
    report = repaired(model, floats)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("other")
    eva_lora.require_same_base(model, report, "default")
    layer_of(model, "model.layers.0.mlp.up_proj").base_layer.weight.data.mul_(1.1)
    with pytest.raises(ValueError, match=r"layer model\.layers\.0\.mlp\.up_proj computes with other weights"):
        eva_lora.require_same_base(model, report, adapter_name="default")


# --- models that keep something


class Counting(nn.Module):
    """What it makes of a batch depends on how many it has seen, in ways that can be put back."""

    def __init__(self, kind):
        super().__init__()
        self.fc, self.head = nn.Linear(32, 32), nn.Linear(32, 8)
        self.kind, self.count, self.history = kind, 0, []
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        self.history.append(self.count)
        with torch.no_grad():
            self.seen += 1
        times = {"number": self.count, "list": len(self.history), "buffer": self.seen, "none": 1}[self.kind]
        return self.head(self.fc(x) * times)


@pytest.mark.parametrize("kind", ["number", "list", "buffer"])
def test_a_model_s_own_state_does_not_spoil_what_is_measured(kind):
    """Three forwards of a batch are compared: each finds what the first one found."""
    errors = []
    for each in ("none", kind):
        torch.manual_seed(0)
        floats = Counting(each)
        model = get_peft_model(quantised(floats, bits=3, group=16, keep=()), LoraConfig(r=2, target_modules=["fc"]))
        batches = [torch.randn(64, 32) for _ in range(2)]
        report = repaired(model, floats, batches, hold_back=2, max_batches=None)
        errors.append(report.hidden_error)
    # What the state multiplies is in all three alike; the bias of the head is not multiplied, so that it is not exact.
    assert errors[1][1] < errors[1][0]
    np.testing.assert_allclose(errors[1], errors[0], rtol=0.2)


def test_where_state_cannot_be_put_back_nothing_is_said_of_the_model_s_end():
    torch.manual_seed(0)
    floats = Counting("none")
    base = quantised(floats, bits=3, group=16, keep=())
    base.stream = iter(range(100))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["fc"]))
    del base.stream
    base.stream = (number for number in range(100))
    report = repaired(model, floats, [torch.randn(64, 32) for _ in range(2)], hold_back=2, max_batches=None)
    assert report.hidden_error is None
    assert report.kl is None
    assert any("was not measured: it holds what cannot be put back" in note for note in report.notes)
    assert all(layer.held is not None for layer in report.layers.values())
    assert isinstance(report, RepairReport)


# --- one part of the model after the other


def test_statistics_are_of_one_pass(floats):
    model = lora(quantised(floats, group=16))
    statistics = eva_lora.collect(model, token_batches(2), EvaConfig(max_batches=2), progress=False)
    with pytest.raises(ValueError, match="passes: expected 1 with statistics"):
        fit(model, statistics, floats, EvaConfig(rho=1.0), progress=False, passes=2)


def test_in_sequence_each_layer_is_at_its_minimum_on_what_the_repaired_model_gives_it(floats):
    """Once all are repaired a layer's inputs are those that it was fitted on: only layers before it make them."""
    bases = quantised(floats, bits=2, group=16)
    model, batches = lora(copy.deepcopy(bases)), token_batches()
    report = repaired(model, floats, batches, passes=100)
    rows = layer_inputs(model, batches, enabled=True)
    least = least_errors(floats, bases, rows, report.ranks)
    assert len(report.layers) == 21
    for name, (before, after, output) in output_errors(model, floats, rows).items():
        # Forwards in float32, of Q x and s B A x apart and in another order here: each layer adds roundings of its own.
        rounding = 21 * rows[name].shape[1] * UNIT * before
        assert after <= (1 + 1e-6) * least[name] + rounding, name
        np.testing.assert_allclose(report.layers[name].fitted[1], after / output, rtol=0, atol=4 * rounding / output)


def test_parts_of_a_model_are_fitted_on_what_those_before_them_give(floats):
    bases, batches = quantised(floats, bits=2, group=16), token_batches(5)
    deltas = {}
    for passes in (1, 2):
        model = lora(copy.deepcopy(bases))
        report = repaired(model, floats, batches, passes=passes, hold_back=4, max_batches=None)
        assert (report.num_batches, report.held_batches) == (4, 1)
        deltas[passes] = {n: layer_of(model, n).get_delta_weight("default").detach() for n in report.layers}
        # What was measured is what float64 says of the rows that the layers were given: the repaired model's, or not.
        rows = layer_inputs(model, [batches[1]], enabled=passes > 1)
        for name, (before, after, output) in output_errors(model, floats, rows).items():
            np.testing.assert_allclose(report.layers[name].held, (before / output, after / output), rtol=1e-4)
    same = {name for name in deltas[1] if torch.equal(deltas[1][name], deltas[2][name])}
    assert same == {*list(deltas[1])[:10]}  # of 21 layers


# --- models of other kinds


def vision():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=4
    )
    return ViTModel(config), [{"pixel_values": torch.randn(4, 3, 16, 16)} for _ in range(4)], {}, "is a convolution"


def experts():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    targets = {"target_modules": ["q_proj", "o_proj"], "target_parameters": ["experts.down_proj"]}
    return MixtralForCausalLM(config), token_batches(4), targets, "is a stack of 4 experts' matrices"


@pytest.mark.parametrize("kind", [vision, pytest.param(experts, marks=needs("transformers>=5.3"))])
@pytest.mark.parametrize("passes", [1, 2])
def test_what_of_other_models_is_a_matrix_is_repaired_and_the_rest_is_named(kind, passes):
    floats, batches, targets, why = kind()
    targets = targets or {"target_modules": ["projection", "dense", "fc1", "q_proj", "query"]}
    model = get_peft_model(quantised(floats.eval(), bits=3, group=16), LoraConfig(r=4, **targets))
    report = repaired(model, floats, batches, hold_back=2, max_batches=None, passes=passes)
    assert any(why in note for note in report.notes)
    assert len(report.layers) >= 4
    assert all(layer.held[1] < layer.held[0] for layer in report.layers.values())
    assert report.hidden_error[1] < report.hidden_error[0]


@pytest.mark.parametrize("options", [{}, {"lora_bias": True}, {"use_dora": True}], ids=["plain", "biases", "DoRA"])
def test_a_repaired_adapter_of_moved_ranks_is_exported_with_one_rank(floats, options, tmp_path):
    bases, batch = quantised(floats, group=16), token_batches(1)[0]
    model = lora(copy.deepcopy(bases), **options)
    assert len(set(repaired(model, floats, rho=2.0).ranks.values())) > 1
    eva_lora.export_uniform(model, tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(bases), tmp_path)
    with torch.no_grad():
        expected, got = (m.eval()(**batch).logits for m in (model, again))
    # Zero rows and columns change at most the order of float32 sums.
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_beside_modules_that_are_saved_whole_it_reloads_bit_equal(floats, tmp_path):
    bases, batch = quantised(floats, group=16), token_batches(1)[0]
    model = lora(copy.deepcopy(bases), target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])
    repaired(model, floats, rho=2.0).save(tmp_path)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(bases), tmp_path)
    eva_lora.require_same_base(again, tmp_path)
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch).logits, model.eval()(**batch).logits)


# --- a trainer


@needs("trl>=1.0")
def test_trl_trains_from_the_repaired_adapter(floats, tmp_path):
    """The recipe of docs/quantised-bases.md: the trainer is given the model as it is, and starts there."""
    import trl
    from datasets import Dataset

    model = lora(quantised(floats, group=16))
    repaired(model, floats, rho=2.0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    vocabulary = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    dataset = Dataset.from_dict({"input_ids": token_batches(1)[0]["input_ids"].tolist()})
    trainer = trl.SFTTrainer(
        model=model, train_dataset=dataset,
        args=trl.SFTConfig(
            output_dir=str(tmp_path), max_steps=1, learning_rate=1e-2, report_to="none", use_cpu=True, bf16=False,
            save_strategy="no", disable_tqdm=True, dataset_kwargs={"skip_prepare_dataset": True},
        ),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token="b", pad_token="a"),
    )  # fmt: skip
    assert all(torch.equal(before[name], parameter) for name, parameter in trainer.model.named_parameters())
    trainer.train()
    changed = {name for name, parameter in trainer.model.named_parameters() if not torch.equal(before[name], parameter)}
    assert changed == {name for name in before if "lora_" in name}


# --- inputs of both models


def test_with_float_inputs_each_layer_is_at_its_minimum_on_what_both_models_give_it(floats):
    """Every second batch's rows are the float model's: of layers that do not share their inputs, too."""
    base, batches = (
        quantised(floats, bits=2, group=16, keep=("lm_head", "k_proj", "v_proj", "gate_proj")),
        token_batches(),
    )
    targets = ["q_proj", "o_proj", "up_proj", "down_proj"]
    model = lora(copy.deepcopy(base), target_modules=targets)
    report = repaired(model, floats, batches, float_inputs=True)
    used = f"{len(batches) // 2} of {len(batches)} batches were run with the float weights in the layers' place"
    assert used in report.notes
    alone = repaired(lora(copy.deepcopy(base), target_modules=targets), floats, batches[:1], float_inputs=True)
    assert "0 of 1 batches were run with the float weights in the layers' place" in alone.notes
    true = lora(copy.deepcopy(floats), target_modules=targets)
    theirs, ours = layer_inputs(true, batches[1::2]), layer_inputs(model, batches[::2])
    rows = {name: torch.cat([ours[name], theirs[name]]) for name in ours}
    least = least_errors(floats, base, rows, report.ranks)
    assert len(report.layers) == 12
    for name, (before, after, output) in output_errors(model, floats, rows).items():
        # Forwards in float32, of Q x and M x apart there and of W x here: each layer adds roundings of its own.
        rounding = 12 * rows[name].shape[1] * UNIT * before
        assert after <= (1 + 1e-6) * least[name] + rounding, name
        np.testing.assert_allclose(report.layers[name].fitted[1], after / output, rtol=0, atol=4 * rounding / output)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(**batches[0]).logits, base.eval()(**batches[0]).logits)
