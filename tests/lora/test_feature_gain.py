"""How large the features are that A gives B, beside PEFT's default A; and A divided by that."""

import warnings
from dataclasses import replace
from statistics import median

import numpy as np
import peft
import pytest
import torch

from eva_lora import (
    EvaConfig,
    apply,
    collect,
    eva_initialize,
    export_uniform,
    feature_gain,
    fit_quantization_error,
    initialize,
    plan,
)
from eva_lora.peft import initialize_lora_eva_weights
from eva_lora.planning import EvaStatistics
from eva_lora.reporting import load_directions
from support.bounds import gamma
from support.models import initialise, layer_inputs, lora, lora_a_of, tiny_llama, token_batches

pytestmark = pytest.mark.filterwarnings("ignore:EVA stopped at")

ROUNDING = gamma(200)  # of sums over up to 144 rows and 48 features in float32, and of what they are divided by


@pytest.fixture(scope="module")
def seen():
    """Exact statistics of a small model, and its layers' rows in float64."""
    model = lora(tiny_llama())
    config = EvaConfig(statistic="gram", oversampling=100.0, max_batches=6)
    return collect(model, token_batches(), config, progress=False), layer_inputs(model, token_batches())


def plain_gain(a, rows):
    features = (rows @ a.double().T).square().sum(1).mean()
    return float((features / (len(a) * rows.square().sum(1).mean() / (3 * rows.shape[1]))).sqrt())


def test_it_is_the_ratio_of_root_mean_squares_over_the_rows(seen):
    statistics, rows = seen
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(5, x.shape[1], generator=generator) for name, x in rows.items()}
    for lora_a in (plan(statistics).lora_a, drawn):
        gains = feature_gain(statistics, lora_a)
        assert list(gains) == [site.name for site in statistics.sites if len(lora_a[site.name])]
        for name, gain in gains.items():
            np.testing.assert_allclose(gain, plain_gain(lora_a[name], rows[name]), rtol=ROUNDING)


def test_a_mean_that_dwarfs_the_variation_costs_nothing(seen):
    """EVA's A lies across it, so that what is left after cancelling is what counts."""
    statistics, _ = seen
    site, entry = statistics.sites[0], statistics.inputs[0]
    mean = torch.nn.functional.normalize(
        torch.randn(entry.mean.shape, generator=torch.Generator().manual_seed(1)), dim=0
    )
    entry = replace(entry, mean=1e4 * mean)
    across = torch.linalg.qr(torch.cat([mean[:, None], entry.components[:3].T], 1).double()).Q[:, 1:].T
    a = {site.name: across.float()}
    inner = entry.components.double() @ a[site.name].double().T
    variances = (entry.eigenvalues[:, None] / entry.num_rows * inner.square()).sum()
    variances += (a[site.name].double() @ entry.mean.double()).square().sum()
    expected = variances / (3 * (entry.total_scatter / entry.num_rows + 1e8) / (3 * site.in_features))
    found = feature_gain(replace(statistics, inputs=[entry, *statistics.inputs[1:]]), a)
    np.testing.assert_allclose(found[site.name], expected.sqrt(), rtol=ROUNDING)


def test_defaults_have_a_gain_of_one(seen):
    """The mean over many draws of PEFT's own A, to five standard errors."""
    statistics, _ = seen
    squares = []
    for seed in range(8):
        torch.manual_seed(seed)
        squares += [gain**2 for gain in feature_gain(statistics, lora_a_of(lora(tiny_llama(), r=8))).values()]
    assert abs(np.mean(squares) - 1) <= 5 * np.std(squares) / len(squares) ** 0.5


def test_experts_count_with_their_rows(seen):
    statistics, _ = seen
    first, other = statistics.inputs[0], next(e for e in statistics.inputs[1:] if e.mean.shape == (32,))
    index = statistics.inputs.index(other)
    site = replace(statistics.sites[0], inputs=(0, -1, index))
    several = replace(
        statistics, sites=[site], inputs=[replace(first, num_rows=first.num_rows // 4), *statistics.inputs[1:]]
    )
    a = torch.randn(6, 32, generator=torch.Generator().manual_seed(2))
    totals = np.zeros(2)
    for entry, part in ((several.inputs[0], a[:2]), (other, a[4:])):
        r = entry.components.double().T * entry.eigenvalues @ entry.components.double() / entry.num_rows
        r += torch.outer(entry.mean, entry.mean).double()
        part = part.double()
        totals += entry.num_rows * np.array([float(torch.trace(part @ r @ part.T)), float(2 * torch.trace(r) / 96)])
    np.testing.assert_allclose(
        feature_gain(several, {site.name: a})[site.name] ** 2, totals[0] / totals[1], rtol=ROUNDING
    )


def test_layers_that_have_no_a_or_saw_nothing_have_none(seen):
    statistics, _ = seen
    names = [site.name for site in statistics.sites[:3]]
    unseen = replace(statistics.sites[1], inputs=(-1,))
    some = replace(statistics, sites=[statistics.sites[0], unseen, *statistics.sites[2:]])
    lora_a = {names[0]: torch.empty(0, 32), names[1]: torch.ones(2, 32), names[2]: torch.ones(2, 32)}
    assert list(feature_gain(some, lora_a)) == names[2:]
    with pytest.raises(ValueError, match=r"^lora_a: expected matrices A of the layers that the statistics are of"):
        feature_gain(statistics, {"elsewhere": torch.ones(2, 32)})
    with pytest.raises(ValueError, match=rf"^lora_a: expected A of {names[0]} of shape \(rank, 32\), got \(2, 31\)"):
        feature_gain(statistics, {names[0]: torch.ones(2, 31)})


def test_the_report_shows_it(seen, tmp_path):
    statistics, rows = seen
    model = lora(tiny_llama())
    report = initialise(model, statistic="gram", oversampling=100.0)
    assert report.feature_gain == feature_gain(statistics, plan(statistics).lora_a)
    for name, a in lora_a_of(model).items():
        np.testing.assert_allclose(report.feature_gain[name], plain_gain(a, rows[name]), rtol=ROUNDING)
    middle = median(report.feature_gain.values())
    assert f"{middle:.3g} in the median layer" in str(report)
    page = (report.save(tmp_path) / "report.html").read_text(encoding="utf-8")
    assert f"{report.feature_gain['model.layers.0.mlp.up_proj']:.3g}</td>" in page


def test_matched_gains_keep_directions_ranks_and_what_is_captured(seen):
    statistics, _ = seen
    plain = plan(statistics)
    gains = feature_gain(statistics, plain.lora_a)
    for match, factors in ((True, gains), ("global", dict.fromkeys(gains, median(gains.values())))):
        matched = plan(statistics, replace(statistics.config, match_gain=match))
        assert matched.sites == plain.sites
        for name, gain in factors.items():
            assert torch.equal(matched.lora_a[name], plain.lora_a[name] / gain)
        found = feature_gain(statistics, matched.lora_a)
        np.testing.assert_allclose([found[n] for n in gains], [gains[n] / factors[n] for n in gains], rtol=ROUNDING)


def test_it_is_written_loaded_and_exported_as_any_other(tmp_path):
    model, batches = lora(tiny_llama(), init_lora_weights="eva", eva_config=peft.EvaConfig()), token_batches()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = eva_initialize(model, batches, EvaConfig(match_gain=True, max_batches=6), progress=False)
    np.testing.assert_allclose([*report.feature_gain.values()], 1, rtol=ROUNDING)
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    for name, a in lora_a_of(model).items():
        assert torch.equal(lora_a_of(loaded)[name], a)
    exported = load_directions(export_uniform(model, tmp_path / "uniform"))
    for name, a in lora_a_of(model).items():
        assert torch.equal(exported[name][: len(a)], a)
        assert not exported[name][len(a) :].any()


def test_the_drop_in_takes_it():
    models = [lora(tiny_llama(), init_lora_weights="eva", eva_config=peft.EvaConfig(tau=0.5)) for _ in range(2)]
    initialize_lora_eva_weights(models[0], token_batches(), show_progress_bar=False, match_gain="global")
    eva_initialize(models[1], token_batches(), EvaConfig(tau=0.5, match_gain="global"), progress=False)
    for name, a in lora_a_of(models[1]).items():
        assert torch.equal(lora_a_of(models[0])[name], a)


def test_a_saved_pass_is_planned_with_it(seen, tmp_path):
    statistics, _ = seen
    loaded = EvaStatistics.load(statistics.save(tmp_path / "statistics.safetensors"))
    model = lora(tiny_llama())
    apply(model, plan(loaded, replace(loaded.config, match_gain="global")))
    assert median(feature_gain(statistics, lora_a_of(model)).values()) == pytest.approx(1, rel=ROUNDING)


@pytest.mark.parametrize("option", [{"match_gain": "global"}, {"whiten": True}])
def test_a_fit_has_no_room_for_it(option):
    floats, model = tiny_llama(), lora(tiny_llama())
    config = EvaConfig(rho=1.0, **option)
    with pytest.raises(ValueError, match=rf"^{next(iter(option))}: expected False where A and B are fitted"):
        fit_quantization_error(model, token_batches(), float_weights=floats, config=config)
    with pytest.raises(ValueError, match=rf"^{next(iter(option))}: expected False where A and B are fitted"):
        initialize(model, method="pissa", config=config)
    assert not any(p.any() for name, p in model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("value", ["layer", 2, None])
def test_other_values_are_refused(value):
    with pytest.raises(ValueError, match=r"^match_gain: expected 'global', True or False, got"):
        EvaConfig(match_gain=value)
