"""What fit_quantization_error promises of every quantiser, with the bases that its own library makes on a CPU."""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from eva_lora import EvaConfig, RepairReport, fit_quantization_error, require_same_base
from eva_lora.adapters import find_adapter
from support.models import lora, token_batches
from support.pages import DOCS, ROOT
from support.real_quantisers import QUANTISERS, Quantiser, loaded, parameters, save_float_model
from support.versions import LOADS_BITSANDBYTES, needs

pytestmark = [pytest.mark.filterwarnings("ignore"), needs(LOADS_BITSANDBYTES)]  # the libraries' own

BATCHES = token_batches(10)
HELD = BATCHES[1::5]


@dataclass
class Fitted:
    """A repaired model on a base of one kind, and what it was before."""

    kind: Quantiser
    folder: Path
    model: torch.nn.Module
    report: RepairReport
    before: torch.Tensor
    after: torch.Tensor


def outputs(model):
    """Last hidden states and logits of the batches that are held back."""
    model.eval()
    with torch.no_grad():
        made = [model(**batch, output_hidden_states=True) for batch in HELD]
    return torch.cat([torch.cat([m.hidden_states[-1], m.logits], -1) for m in made])


def error(fitted, made):
    """Of a model's last hidden states, relative to those of the float model."""
    true, width = outputs(loaded(fitted.folder)), fitted.model.config.hidden_size
    return float((made - true)[..., :width].norm() / true[..., :width].norm())


@pytest.fixture(scope="module", autouse=True)
def uncompiled():
    """gptqmodel compiles its layers, which takes a minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module", params=parameters())
def fitted(request, tmp_path_factory):
    kind, folder = QUANTISERS[request.param], tmp_path_factory.mktemp("bases")
    save_float_model(folder)
    model = lora(kind.base(folder), lora_alpha=16)
    before = outputs(model)
    report = fit_quantization_error(model, BATCHES, folder, EvaConfig(rho=2.0, tau=1.0), hold_back=5, progress=False)
    after = outputs(model)
    model.save_pretrained(folder / "adapter")
    report.save(folder / "adapter")
    return Fitted(kind, folder, model, report, before, after)


def test_what_is_read_is_what_the_layer_computes_with_and_what_its_library_says(fitted):
    bases, without = find_adapter(fitted.model).base_weights()
    assert without == {}
    assert set(bases) == {name for name, rank in fitted.report.ranks.items() if rank}
    for name, base in bases.items():
        layer, weight = base.module, base.read()
        bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias.float()
        x = torch.randn(32, base.in_features, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            made = layer(x).float()
        bound = fitted.kind.rounding * (x.abs() @ weight.abs().T + bias.abs())
        assert ((made - (x @ weight.T + bias)).abs() <= bound).all(), name
        told = fitted.kind.dequantized(layer).float()
        assert ((weight - told).abs() <= fitted.kind.rounding * (told.abs() + 2 * bias.abs()[:, None])).all(), name
        given = base.read(lambda _, layer: fitted.kind.dequantized(layer))
        assert torch.equal(given, told), name


def test_layers_and_model_are_nearer_to_the_float_model_on_rows_that_were_held_back(fitted):
    report = fitted.report
    assert report.held_batches == len(HELD) == 2
    assert len(report.layers) == 14
    assert len(set(report.ranks.values())) > 1
    for name, layer in report.layers.items():
        if layer.rank:
            assert layer.fitted[1] < layer.fitted[0], name
            assert layer.held[1] < layer.held[0], name
        else:
            assert layer.held[1] == layer.held[0], name
    before, after = (error(fitted, made) for made in (fitted.before, fitted.after))
    assert after < before
    assert report.hidden_error[1] < report.hidden_error[0]
    if fitted.kind.exact:
        # Forwards in float32 of two layers: Q x + M x here, W x there.
        np.testing.assert_allclose(report.hidden_error, (before, after), rtol=1e-4)
    elif fitted.kind.rescales:
        # Of the error one part in 64 at most goes with scales between two layers, which are fitted.
        np.testing.assert_allclose(report.hidden_error, (before, after), rtol=1 / 64)
    assert any("moves scales between layers" in note for note in report.notes) == fitted.kind.rescales


def test_switched_off_it_is_the_quantised_base(fitted):
    assert not torch.equal(fitted.after, fitted.before)
    with fitted.model.disable_adapter():
        assert torch.equal(outputs(fitted.model), fitted.before)
    assert torch.equal(outputs(fitted.model), fitted.after)


def test_it_reloads_bit_equal_onto_the_same_base(fitted):
    again = PeftModel.from_pretrained(fitted.kind.base(fitted.folder), fitted.folder / "adapter")
    assert torch.equal(outputs(again), fitted.after)
    require_same_base(again, fitted.folder / "adapter")


def test_it_is_refused_on_any_other(fitted):
    for other in (fitted.kind.other, loaded):
        strange = PeftModel.from_pretrained(other(fitted.folder), fitted.folder / "adapter")
        with pytest.raises(
            ValueError, match=r"not the one that the adapter was fitted to: .*(otherwise|other weights)"
        ):
            require_same_base(strange, fitted.folder / "adapter")


def test_merged_into_a_quantised_base_it_is_rounded_away_or_refused(fitted):
    again = PeftModel.from_pretrained(fitted.kind.base(fitted.folder), fitted.folder / "adapter")
    if fitted.kind.unmerged is not None:
        with pytest.raises(fitted.kind.unmerged):
            again.merge_and_unload()
        return
    merged = outputs(again.merge_and_unload())
    assert error(fitted, merged) > error(fitted, fitted.after)


def test_the_versions_are_those_that_are_installed_and_told(fitted):
    pinned = (ROOT / "tests" / "recipes" / "quantisers.txt").read_text(encoding="utf-8").splitlines()
    page = (DOCS / "quantised-bases.md").read_text(encoding="utf-8")
    for requirement in fitted.kind.needs:
        package, _, expected = requirement.partition("==")
        if expected:
            assert version(package) == expected
            assert requirement in pinned
            assert f"{package} {expected}" in page
