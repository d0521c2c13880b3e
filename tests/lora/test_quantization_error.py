"""LoRA that starts by repairing its quantised base, against dense float64 solutions, on models small and real."""

import copy
import warnings
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import eva_lora
from benchmarks.harness.memory import tensor_bytes
from eva_lora import EvaConfig, EvaPlan, EvaStatistics, ParameterSite, RepairReport, collect, eva_initialize
from eva_lora import fit_quantization_error as fit
from eva_lora.cli.demo import load_smollm2, packed_text
from eva_lora.fitting import completed
from eva_lora.peft import replace_lora_weights_loftq
from support.models import layer_inputs, load_minilm, lora, minilm_text_batches, tiny_llama, token_batches
from support.quantised import least_errors, output_errors, quantised, rounded
from support.tiny import state_of

ENCODER_LINEARS = r".*encoder\.layer\.\d+\.(attention\.self\.(query|key|value)|.*\.dense)"
UNIT = 2.0**-24


def repaired(model, floats, batches=None, *, hold_back=0, **options):
    config = {"rho": 1.0, "max_batches": 6, "tau": 1.0}
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


@pytest.fixture
def model(floats):
    return lora(quantised(floats, group=16))


def delta(model, name, adapter="default"):
    return model.get_base_model().get_submodule(name).get_delta_weight(adapter).detach().double()


# --- the fit


@pytest.mark.parametrize(
    "options",
    [{"lora_alpha": 4}, {"lora_alpha": 8}, {"lora_alpha": 8, "use_rslora": True}, {"alpha_pattern": {"q_proj": 32}}],
    ids=["s = 1", "s = 2", "rsLoRA", "a pattern"],
)
def test_with_exact_statistics_every_layer_is_at_its_minimum(floats, options):
    bases = quantised(floats, group=16)
    model = lora(copy.deepcopy(bases), **options)
    rows = layer_inputs(model, token_batches())
    report = repaired(model, floats, statistic="gram", oversampling=100.0)
    least = least_errors(floats, bases, rows, report.ranks)
    assert len(report.layers) == 21
    for name, (before, after, output) in output_errors(model, floats, rows).items():
        # B and A are float32, and so is the Gram matrix that the fit was made from.
        rounding = 2 * len(rows[name]) * UNIT * before
        assert after <= (1 + 1e-6) * least[name] + rounding, name
        fitted = report.layers[name].fitted
        np.testing.assert_allclose(fitted, (before / output, after / output), rtol=0, atol=2 * rounding / output)


@pytest.mark.slow  # of the fit alone: tests/kernels/test_low_rank_fit.py
def test_a_streamed_subspace_is_enough_on_every_layer_of_a_real_model():
    """All of 36 layers within 1 % of the optimum for the same rows, though R is known in 80 of 384 directions."""
    real, batches = load_minilm(), minilm_text_batches()[:3]
    bases = quantised(real)
    model = get_peft_model(copy.deepcopy(bases), LoraConfig(r=16, lora_alpha=32, target_modules=ENCODER_LINEARS))
    rows = layer_inputs(model, batches)
    report = repaired(model, real, batches, statistic="subspace")
    least = least_errors(real, bases, rows, report.ranks)
    ratios = {name: after / least[name] for name, (_, after, _) in output_errors(model, real, rows).items()}
    assert len(ratios) == 36
    assert max(ratios.values()) <= 1.01, max(ratios, key=ratios.get)


@pytest.mark.slow
def test_a_streamed_subspace_is_enough_on_every_layer_of_a_language_model():
    floats, tokenizer = load_smollm2()
    bases = quantised(floats)
    model = get_peft_model(copy.deepcopy(bases), LoraConfig(r=16, target_modules="all-linear"))
    batches = [{"input_ids": b["input_ids"]} for b in packed_text(tokenizer, sequences=4, tokens=256)[:6]]
    moments = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: add_moment(moments, name, args[0]))
        for name, layer in bases.named_modules()
        if isinstance(layer, nn.Linear) and name != "lm_head"
    ]
    with torch.no_grad():
        for batch in batches:
            bases(**batch)
    for hook in hooks:
        hook.remove()
    report = repaired(model, floats, batches)
    assert len(report.layers) == 210
    for name in report.layers:
        rank = report.ranks[name]
        error = (floats.get_submodule(name).weight - bases.get_submodule(name).weight).detach().double()
        variances, directions = torch.linalg.eigh(moments[name])
        root = directions * variances.clamp_min(0).sqrt()
        least = torch.linalg.svdvals(error @ root)[rank:].square().sum()
        assert ((error - delta(model, name)) @ root).square().sum() <= 1.01 * least, name


def add_moment(moments, name, x):
    rows = x.flatten(0, -2).double()
    moments[name] = moments.get(name, 0) + rows.T @ rows


def test_no_layer_is_worse_than_without_on_rows_of_the_fit_and_on_others():
    real, batches = load_minilm(), minilm_text_batches()[:5]
    model = get_peft_model(quantised(real), LoraConfig(r=8, target_modules=ENCODER_LINEARS))
    report = repaired(model, real, batches, hold_back=5, max_batches=None)
    assert report.held_batches == 1
    assert report.num_batches == 4
    for name, layer in report.layers.items():
        assert layer.fitted[1] < layer.fitted[0], name
        assert layer.held[1] < layer.held[0], name
    # And what was measured on the fly is what float64 says of the recorded rows.
    held = layer_inputs(model, [batches[1]])
    for name, (before, after, output) in output_errors(model, real, held).items():
        rounding = 4 * held[name].shape[1] * UNIT
        np.testing.assert_allclose(report.layers[name].held, (before / output, after / output), rtol=rounding)


def test_without_inputs_it_is_one_round_of_loftq(floats):
    """Against NumPy's SVD, for all scalings: PEFT forgets to divide by them."""
    for alpha in (4, 16):
        bases = quantised(floats, group=16)
        model = lora(copy.deepcopy(bases), lora_alpha=alpha)
        report = fit(model, None, floats, EvaConfig(rho=1.0), method="loftq")
        for name in report.layers:
            error = (floats.get_submodule(name).weight - bases.get_submodule(name).weight).detach().double().numpy()
            u, s, vt = np.linalg.svd(error, full_matrices=False)
            expected = (u[:, :4] * s[:4]) @ vt[:4]
            least = np.square(s[4:]).sum()
            got = delta(model, name).numpy()
            assert np.square(error - got).sum() <= (1 + 1e-5) * least
            # Singular vectors turn where singular values are close: the fit is compared where they are not.
            if (s[3] - s[4]) / s[0] > 0.05:
                assert np.linalg.norm(got - expected) <= 1e-4 * np.linalg.norm(expected)
            layer = model.get_base_model().get_submodule(name)
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight * layer.scaling["default"]
            np.testing.assert_allclose((b.norm(dim=0) / a.norm(dim=1)).detach(), 1, rtol=1e-4)  # U D^½ and D^½ Vᵀ


def test_ranks_move_to_where_they_repair_most(floats):
    bases = quantised(floats, group=16)
    model = lora(copy.deepcopy(bases))
    rows = layer_inputs(model, token_batches())
    report = repaired(model, floats, statistic="gram", oversampling=100.0, rho=2.0)
    assert sum(report.ranks.values()) == report.budget == 21 * 4
    assert len(set(report.ranks.values())) > 2
    shares = {}
    for name, x in rows.items():
        error = (floats.get_submodule(name).weight - bases.get_submodule(name).weight).detach().double()
        moment = x.T @ x / len(x)
        w = floats.get_submodule(name).weight.detach().double()
        values = torch.linalg.eigvalsh(error @ moment @ error.T).flip(0)[:8]
        shares[name] = (values / torch.einsum("ij,jk,ik->", w, moment, w)).tolist()
    pooled = sorted((share for values in shares.values() for share in values), reverse=True)
    expected = {name: sum(share >= pooled[83] for share in values) for name, values in shares.items()}
    assert report.ranks == expected


def test_bounds_and_multiples_hold(floats):
    model = lora(quantised(floats, group=16))
    report = repaired(model, floats, rho=2.0, min_rank=2, max_rank=6, rank_multiple=2)
    assert set(report.ranks.values()) <= {2, 4, 6}
    assert sum(report.ranks.values()) == 84


def test_part_of_the_rank_repairs_and_the_rest_starts_as_in_eva(floats):
    bases = quantised(floats, group=16)
    both, alone = lora(copy.deepcopy(bases), r=6), lora(copy.deepcopy(bases), r=3, lora_alpha=4)
    statistics = collect_of(both)
    report = repaired(both, floats, statistics, method="eva+repair", repair_share=0.5)
    repaired(alone, floats, statistics_of_rank(statistics, 3))
    for name, layer in report.layers.items():
        assert (layer.rank, layer.repaired) == (6, 3)
        ours, theirs = delta(both, name), delta(alone, name)
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()  # the same three directions
        module = both.get_base_model().get_submodule(name)
        a, b = module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach()
        assert not b[:, 3:].any()
        assert b[:, :3].any(0).all()
        rest = a[3:].double()
        assert (rest @ rest.T - torch.eye(3)).abs().max() <= 1e-6
        assert (rest @ nn.functional.normalize(a[:3].double()).T).abs().max() <= 1e-6
        # Of what the repairing rows leave of the covariance, the leading directions.
        entry = statistics.inputs[next(s.input for s in statistics.sites if s.name == name)]
        factor = entry.components.T.double() * entry.eigenvalues.sqrt()
        taken = torch.linalg.qr(a[:3].double().T).Q
        factor -= taken @ (taken.T @ factor)
        best = torch.linalg.svdvals(factor)[:3].square().sum()
        assert (rest @ factor).square().sum() >= (1 - 1e-5) * best


def collect_of(model, batches=None, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        config = EvaConfig(**{"max_batches": 6, "tau": 1.0, "rho": 1.0, "oversampling": 5.0, **options})
        return collect(model, batches or token_batches(), config, progress=False)


def statistics_of_rank(statistics, rank):
    return replace(statistics, sites=[replace(site, rank=rank) for site in statistics.sites])


def test_statistics_that_were_saved_serve_as_well_as_batches(floats, tmp_path):
    first, second = (lora(quantised(floats, group=16)) for _ in range(2))
    repaired(first, floats, oversampling=5.0)
    path = collect_of(second).save(tmp_path / "statistics.safetensors")
    loaded = EvaStatistics.load(path)
    report = repaired(second, floats, loaded)
    assert report.held_batches == 0
    assert report.hidden_error is None
    for name in report.layers:
        assert torch.equal(delta(first, name), delta(second, name))


def test_a_layer_that_was_not_quantised_starts_as_in_eva(floats):
    """There is nothing to repair; with A and B of zero it could never learn."""
    bases = quantised(floats, group=16, keep=("lm_head", "q_proj"))
    model = lora(bases)
    report = repaired(model, floats)
    for name, layer in report.layers.items():
        module = model.get_base_model().get_submodule(name)
        a, b = module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach()
        assert a.any(1).all(), name
        if name.endswith("q_proj"):
            assert layer.fitted == (0.0, 0.0)
            assert not b.any()
    assert "3 layers have less error than their rank could repair" in report.notes[0]


def test_directions_are_completed_where_nothing_is_known():
    a, b = completed(torch.randn(2, 12), torch.randn(5, 2), 6, None, seed=0)
    assert a.shape == (6, 12)
    assert b.shape == (5, 6)
    rest = a[2:].double()
    assert (rest @ rest.T - torch.eye(4)).abs().max() <= 1e-6
    assert (rest @ nn.functional.normalize(a[:2].double()).T).abs().max() <= 1e-6
    assert not b[:, 2:].any()


# --- what the report says


@pytest.mark.parametrize(("rank", "rho"), [(4, 1.0), (1, 4.0)])
def test_the_model_s_error_is_that_to_the_float_model(floats, rank, rho):
    """Layers that are left with no rank are as the float model has them there, too."""
    bases = quantised(floats, bits=3, group=16)
    model, batches = lora(copy.deepcopy(bases), r=rank), token_batches(8)
    report = repaired(model, floats, batches, hold_back=4, max_batches=None, rho=rho)
    assert (0 in report.ranks.values()) == (rho > 1)
    assert all(layer.held is not None for layer in report.layers.values())
    held = [batches[1], batches[5]]
    squares, kl, rows = np.zeros(3), np.zeros(2), 0
    model.eval()
    for batch in held:
        with torch.no_grad():
            true = floats.eval()(**batch, output_hidden_states=True)
            for i, (made, off) in enumerate(((model, True), (model, False))):
                with made.disable_adapter() if off else torch.no_grad():
                    out = made(**batch, output_hidden_states=True)
                squares[i] += (out.hidden_states[-1] - true.hidden_states[-1]).double().square().sum()
                p, q = (x.logits.double().log_softmax(-1) for x in (true, out))
                kl[i] += (p.exp() * (p - q)).sum()
        squares[2] += true.hidden_states[-1].double().square().sum()
        rows += true.logits.shape[0] * true.logits.shape[1]
    # Forwards in float32 of three layers: Q x + M x here, W x there.
    np.testing.assert_allclose(report.hidden_error, np.sqrt(squares[:2] / squares[2]), rtol=1e-4)
    np.testing.assert_allclose(report.kl, kl / rows, rtol=1e-3)
    assert report.hidden_error[1] < report.hidden_error[0]


def test_padding_is_not_measured(floats):
    bases = quantised(floats, bits=3, group=16)
    batches = [{**b, "attention_mask": torch.ones_like(b["input_ids"])} for b in token_batches(4)]
    reports = []
    for padding in (0, 1):
        padded = [
            {"input_ids": nn.functional.pad(b["input_ids"], (0, 9), value=padding),
             "attention_mask": nn.functional.pad(b["attention_mask"], (0, 9))} for b in batches
        ]  # fmt: skip
        reports.append(repaired(lora(copy.deepcopy(bases)), floats, padded, hold_back=2))
    for name, layer in reports[0].layers.items():
        np.testing.assert_allclose(layer.held, reports[1].layers[name].held, rtol=1e-4)
    np.testing.assert_allclose(reports[0].hidden_error, reports[1].hidden_error, rtol=1e-4)
    np.testing.assert_allclose(reports[0].kl, reports[1].kl, rtol=1e-3)


def test_where_no_row_that_was_held_back_counts_it_is_said(floats, model):
    batches = token_batches(4)
    masked = [{**b, "attention_mask": torch.full_like(b["input_ids"], i != 1)} for i, b in enumerate(batches)]
    report = repaired(model, floats, masked, hold_back=4)
    assert (report.held_batches, report.hidden_error) == (1, None)
    assert any("Nothing was measured on what was held back" in note for note in report.notes)


def test_the_report_is_text_a_file_and_a_figure(model, floats, tmp_path):
    report = repaired(model, floats, hold_back=3)
    text = str(report)
    assert "21, method repair" in text
    assert "held back" in text
    assert "Rank per layer" in text
    folder = report.save(tmp_path / "report")
    assert RepairReport.load(folder) == report
    assert (folder / "repair.svg").read_text().startswith("<?xml")
    figure, errors = report.plot(), [value for layer in report.layers.values() for value in layer.held]
    assert sorted(y for axes in figure.axes for line in axes.lines for y in line.get_ydata()) == sorted(errors)
    assert all(axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > max(errors) for axes in figure.axes if axes.lines)
    assert sum(axes.axison for axes in figure.axes) == 7  # kinds of layers, of eight places
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["without the fit", "with"]
    for damage in ("{", '{"format_version": 0}', "[]", (folder / "repair.json").read_text().replace('"rank"', '"rnk"')):
        (tmp_path / "repair.json").write_text(damage)
        with pytest.raises(ValueError, match="is no complete report of a fit"):
            RepairReport.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        RepairReport.load(tmp_path / "nowhere")


# --- the model


def test_another_base_of_the_same_kind_is_told_by_its_weights(floats, model):
    report = repaired(model, floats)
    eva_lora.require_same_base(model, report)
    model.get_base_model().get_submodule("model.layers.1.mlp.up_proj").base_layer.weight.data.mul_(1.1)
    with pytest.raises(ValueError, match=r"layer model\.layers\.1\.mlp\.up_proj computes with other weights"):
        eva_lora.require_same_base(model, report)
    with pytest.raises(ValueError, match="it has no layer"):
        eva_lora.require_same_base(lora(quantised(floats), target_modules=["q_proj"]), report)


def test_what_is_merged_or_exported_is_what_was_fitted(floats):
    model = lora(quantised(floats, group=16))
    repaired(model, floats, rho=2.0)
    model.eval()
    with torch.no_grad():
        expected = model(**token_batches(1)[0]).logits
        merged = copy.deepcopy(model).merge_and_unload()(**token_batches(1)[0]).logits
    assert (merged - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_nothing_changes_where_it_fails(floats, model):
    wrong = {name: tensor + torch.randn_like(tensor) for name, tensor in floats.state_dict().items()}
    missing = {n: t for n, t in floats.state_dict().items() if "layers.2.mlp.down_proj" not in n}
    before = state_of(model)
    for weights, message in (
        (wrong, "are not what its base was made of"),
        (missing, r"a weight of layer model\.layers\.2\.mlp\.down_proj in the state dict, there is none"),
    ):
        with pytest.raises(ValueError, match=message):
            repaired(model, weights)
    with pytest.raises(RuntimeError, match="from the loader"):
        repaired(model, floats, failing())
    with pytest.raises(ValueError, match="dequantize: what it returned"):
        repaired(model, floats, dequantize=lambda name, layer: torch.zeros(3, 3))
    assert state_of(model) == before


def failing():
    yield from token_batches(2)
    raise RuntimeError("from the loader")


def test_a_fit_takes_the_memory_of_one_layer_whatever_their_number():
    """In float32 its weight and what is computed with, and less than two such matrices of workspaces; eight layers
    together would be sixteen."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    size, count, rank = 512, 8, 4
    floats = nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(count)))
    layers = []
    for layer in floats:
        quantised = bnb.nn.Linear4bit(size, size, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        quantised.load_state_dict(layer.state_dict())
        layers.append(quantised.to("cpu"))
    model = get_peft_model(nn.Sequential(*layers), LoraConfig(r=rank, target_modules=r"\d+"))
    statistics = collect_of(model, batches=[torch.randn(256, size) for _ in range(2)])
    most, _ = tensor_bytes(lambda: fit(model, statistics, floats, EvaConfig(rho=1.0), progress=False))
    factors = 2 * count * 2 * size * rank  # as they are fitted, and as they are written
    assert most <= 4 * (4 * size**2 + factors)


def test_a_missing_weight_is_said_before_any_batch_is_taken(floats, model):
    missing = {n: t for n, t in floats.state_dict().items() if "down_proj" not in n}
    taken = []
    with pytest.raises(ValueError, match="float_weights: expected a weight of layer"):
        repaired(model, missing, (taken.append(b) or b for b in token_batches()))
    assert taken == []


def test_another_model_s_weights_are_said_before_any_batch_is_taken(model):
    others = tiny_llama(seed=1), tiny_llama().to("meta")
    taken, before = [], state_of(model)
    for weights, message in zip(others, ("are not what its base was made of", "is on the meta device"), strict=True):
        with pytest.raises(ValueError, match=f"float_weights: .*{message}"):
            repaired(model, weights, (taken.append(b) or b for b in token_batches()))
    assert taken == []
    assert state_of(model) == before


def test_statistics_that_were_made_for_lower_ranks_are_told(floats):
    statistics = collect_of(lora(quantised(floats, group=16), r=2))
    for rank in (2, 4):
        report = repaired(lora(quantised(floats, group=16), r=rank), floats, statistics)
        assert any("made for lower ranks in 21 layers" in note for note in report.notes) == (rank > 2)


def test_a_repaired_adapter_is_not_overwritten_in_silence(floats, model):
    repaired(model, floats)
    for again in (lambda **k: repaired(model, floats, **k), lambda **k: eva_initialize(model, token_batches(), **k)):
        with pytest.raises(ValueError, match="its adapter was trained"):
            again()
    repaired(model, floats, overwrite=True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "pissa"}, ValueError, "method: expected one of"),
        ({"method": "eva+repair", "repair_share": 1}, ValueError, "repair_share: expected a number between 0 and 1"),
        ({"hold_back": 1}, ValueError, "hold_back: expected 0 or an integer of at least 2"),
        ({"loader_or_statistics": None}, ValueError, "loader_or_statistics: expected batches or EvaStatistics"),
        ({"loader_or_statistics": 7}, TypeError, "loader_or_statistics: expected an iterable"),
        ({"float_weights": None}, ValueError, "does not say what it was loaded from"),
        ({"float_weights": 7}, TypeError, "float_weights: expected a folder"),
        ({"dequantize": "nf4"}, TypeError, "dequantize: expected a callable, got str"),
        ({"requantize": 4, "method": "loftq", "rounds": 2, "loader_or_statistics": None}, TypeError, "requantize: exp"),
    ],
)
def test_mistakes_are_named_before_anything_is_done(floats, model, options, error, message):
    arguments = {"loader_or_statistics": token_batches(), "float_weights": floats, **options}
    with pytest.raises(error, match=message):
        fit(model, **arguments, progress=False)


def test_statistics_of_another_model_are_refused(floats, model):
    statistics = collect_of(lora(tiny_llama(), target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="they are of another model: they do not know"):
        repaired(model, floats, statistics)


@pytest.mark.parametrize(
    ("layer", "inputs", "why"),
    [
        (nn.Conv1d(4, 8, 3), torch.randn(2, 4, 9), "it is a convolution"),
        (
            nn.MultiheadAttention(8, 2),
            torch.randn(3, 2, 8),
            "it is a MultiheadAttention, whose matrices",
        ),
    ],
    ids=["convolution", "attention"],
)
def test_what_cannot_be_repaired_is_named(layer, inputs, why):
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = layer

        def forward(self, x):
            return self.one(x) if isinstance(layer, nn.Conv1d) else self.one(x, x, x)[0]

    model = get_peft_model(One(), LoraConfig(r=2, target_modules=["one"]))
    with pytest.raises(ValueError, match=f"none of its LoRA layers has a base weight to repair: .*{why}"):
        repaired(model, layer, [inputs])


def test_convolutions_are_left_alone_and_layers_of_other_dtypes_are_not():
    torch.manual_seed(0)

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc, self.head = nn.Conv2d(3, 4, 3), nn.Linear(64, 32).bfloat16(), nn.Linear(32, 8)

        def forward(self, x):
            x = self.conv(x).flatten(1).bfloat16()
            return self.head(self.fc(x).float())

    floats = Mixed()
    model = get_peft_model(quantised(floats, group=16), LoraConfig(r=2, target_modules=["conv", "fc", "head"]))
    batches = [torch.randn(64, 3, 6, 6) for _ in range(3)]
    with pytest.warns(UserWarning, match="These layers are not repaired: conv: it is a convolution"):
        report = fit(model, batches, floats, EvaConfig(rho=1.0), progress=False, hold_back=2)
    assert set(report.layers) == {"fc", "head"}
    assert all(layer.held[1] < layer.held[0] for layer in report.layers.values())


def test_what_is_held_back_is_its_own(floats):
    """Of a loader that fills one buffer anew, and of batches that a forward changes."""
    results = []
    for shared in (False, True):
        buffer = torch.empty(4, 24, dtype=torch.long)

        def loader(shared=shared, buffer=buffer):
            for batch in token_batches(5):
                yield {"input_ids": buffer.copy_(batch["input_ids"])} if shared else batch

        model = lora(quantised(floats, group=16))
        results.append(repaired(model, floats, loader(), hold_back=3, max_batches=None).hidden_error)
    assert results[0] == results[1]


def test_it_is_called_once_and_the_loader_too(floats, model):
    """Batches that are held back must never be fitted: a loader that shuffles would bring them again."""
    rounds = []

    class Loader:
        def __iter__(self):
            rounds.append(1)
            return iter(token_batches(5))

    report = repaired(model, floats, Loader(), hold_back=3, max_batches=None)
    assert len(rounds) == 1
    assert (report.num_batches, report.held_batches) == (3, 2)


# --- layers of one's own


class Own(nn.Module):
    """LoRA on a rounded weight, as anybody might write it; what it scales by is nowhere to be read."""

    def __init__(self, source, rank, *, transposed=False, hidden_scale=3.0):
        super().__init__()
        self.base = nn.Linear(source.in_features, source.out_features)
        self.base.weight.data, self.base.bias.data = rounded(source.weight.data, group=16), source.bias.data
        a, b = torch.randn(rank, source.in_features), torch.zeros(source.out_features, rank)
        self.A, self.B = nn.Parameter(a.T if transposed else a), nn.Parameter(b.T if transposed else b)
        self.transposed, self.hidden_scale = transposed, hidden_scale

    def forward(self, x):
        a, b = (self.A.T, self.B.T) if self.transposed else (self.A, self.B)
        dropped = nn.functional.dropout(x, 0.5, self.training)
        return self.base(x) + self.hidden_scale * (dropped @ a.T) @ b.T


@pytest.mark.parametrize("transposed", [False, True])
def test_layers_that_keep_their_parameters_are_repaired_whatever_they_scale_by(transposed):
    torch.manual_seed(0)
    layer = nn.Linear(48, 32)
    model = nn.Sequential(Own(layer, 4, transposed=transposed))
    sites = [ParameterSite.of("own", model[0], transposed=transposed, rank=())]
    batches = [torch.randn(64, 48) * torch.logspace(0, -1, 48) for _ in range(4)]
    report = fit(
        model, batches, {"own.weight": layer.weight.detach()},
        EvaConfig(statistic="gram", oversampling=100.0, max_batches=4, rho=1.0, tau=1.0),
        sites=sites, progress=False, hold_back=0,
    )  # fmt: skip
    x = torch.cat(batches).double()
    model.eval()
    with torch.no_grad():
        left = (model.double()(x) - layer.double()(x)).square().sum(1).mean()
    error = (layer.weight - model[0].base.weight).detach()
    values = torch.linalg.eigvalsh(error @ (x.T @ x / len(x)) @ error.T)
    assert left <= (1 + 1e-5) * values[:-4].sum()
    assert report.layers["own"].repaired == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_scaling_is_found_though_little_of_it_shows_in_short_dtypes(dtype):
    """Of what a small repair adds to a large output, half is rounded off."""
    torch.manual_seed(0)
    layer = nn.Linear(48, 32)
    own = Own(layer, 4).to(dtype)
    site = ParameterSite.of("own", own, rank=())
    b = 1e-4 * torch.randn(32, 4)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        site.write_second(b)
    unit = torch.finfo(dtype).eps / 2
    # B is rounded to the dtype, and so is all that the scaling was seen in.
    assert (own.B.float() * own.hidden_scale - b).norm() <= 4 * unit * b.norm()
    assert own.training


def test_autocast_and_training_change_nothing(floats):
    reports = []
    for around in (nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)):
        torch.manual_seed(0)
        model = nn.Sequential(Own(nn.Linear(48, 32), 4)).train()
        weight = nn.Linear(48, 32).weight.detach() * 0 + model[0].base.weight + 0.01 * torch.randn(32, 48)
        with around:
            report = fit(
                model, None, {"own.weight": weight}, method="loftq", sites=[ParameterSite.of("own", model[0], rank=())]
            )
        reports.append((report.layers, model[0].A.detach(), model[0].B.detach()))
        assert model.training
    assert reports[0][0] == reports[1][0]
    assert torch.equal(reports[0][1], reports[1][1])
    assert torch.equal(reports[0][2], reports[1][2])


def test_a_layer_of_loralib_is_repaired():
    import loralib

    torch.manual_seed(0)
    layer = nn.Linear(48, 32)
    model = nn.Sequential(loralib.Linear(48, 32, r=4, lora_alpha=12))
    model[0].weight.data, model[0].bias.data = rounded(layer.weight.data, group=16), layer.bias.data.clone()
    error = (layer.weight - model[0].weight).detach().double()
    fit(model, None, {"0.weight": layer.weight.detach()}, EvaConfig(rho=1.0), method="loftq")
    left = error - model[0].scaling * (model[0].lora_B @ model[0].lora_A).detach().double()
    assert left.square().sum() <= (1 + 1e-5) * torch.linalg.svdvals(error)[4:].square().sum()


def test_tied_weights_are_looked_for_where_a_file_has_them(tmp_path):
    config = tiny_llama().config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    tied = type(tiny_llama())(config)
    tied.save_pretrained(tmp_path)
    base = copy.deepcopy(tied)
    base.lm_head.weight = nn.Parameter(rounded(tied.lm_head.weight.detach(), group=16))
    model = lora(base, target_modules=["lm_head"])
    report = fit(model, None, tmp_path, EvaConfig(rho=1.0), method="loftq")
    assert report.layers["lm_head"].fitted[1] < report.layers["lm_head"].fitted[0]


def test_models_whose_layers_cannot_be_asked_are_refused(floats, model):
    with pytest.raises(ValueError, match=r"it is compiled by torch\.compile; fit it first"):
        repaired(torch.compile(model), floats)


def test_a_plan_with_b_is_a_file_like_any_other(floats, model, tmp_path):
    plans = []
    adapter_apply = eva_lora.adapters.PeftAdapter.apply
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            eva_lora.adapters.PeftAdapter, "apply", lambda self, plan: plans.append(plan) or adapter_apply(self, plan)
        )
        repaired(model, floats, rho=2.0)
    (plan,) = plans
    loaded = EvaPlan.load(plan.save(tmp_path / "plan.safetensors"))
    assert all(torch.equal(loaded.lora_b[name], b) for name, b in plan.lora_b.items())
    other = lora(quantised(floats, group=16))
    eva_lora.apply(other, loaded)
    for name, rank in plan.ranks.items():
        if rank:
            assert torch.equal(delta(other, name), delta(model, name))


# --- PEFT's own function


def test_peft_s_loftq_function_by_its_arguments(floats):
    bases = quantised(floats, group=16)
    model, expected = lora(copy.deepcopy(bases)), lora(copy.deepcopy(bases))
    fit(expected, None, floats, EvaConfig(rho=1.0), method="loftq")
    asked = []

    def callback(peft_model, name):
        assert peft_model is model
        asked.append(name)
        return not name.endswith("up_proj")

    replace_lora_weights_loftq(model, model_path=floats, callback=callback)
    assert len(asked) == 21
    for name in asked:
        if name.endswith("up_proj"):
            assert not delta(model, name).any()
        else:
            assert torch.equal(delta(model, name), delta(expected, name))
    assert model.peft_config["default"].init_lora_weights is True


def test_a_base_with_the_norms_of_its_float_weights_is_not_rescaled(floats):
    floats, generator = copy.deepcopy(floats), torch.Generator().manual_seed(4)
    for name, weight in floats.named_parameters():
        if weight.ndim == 1 and "norm" in name:
            weight.data = torch.rand(len(weight), generator=generator) + 0.5  # bfloat16 rounds them off
    report = repaired(lora(quantised(floats, group=16).bfloat16()), floats)
    assert not any("moves scales" in note for note in report.notes)
