"""Gradients of layers that are not linear: convolutions by their patches; what has no such rows is refused by name."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from eva_lora import METHODS, export_plain, initialize, load_adapter
from eva_lora.adapters import sites
from eva_lora.collecting import Asked
from support.bounds import gamma
from support.gradients import FORMULAS, cosine, gradients_of, require_same, svd, told, whole

GRADIENT_METHODS = [name for name, method in METHODS.items() if method.data == "gradients"]
NAMES = ["volume", "plane", "line"]
GAP = 0.02


class Convolutions(nn.Module):
    """Of three, two and one dimensions: overlapping, padded, with strides, one called twice."""

    def __init__(self, mode="zeros"):
        super().__init__()
        torch.manual_seed(0)
        self.volume = nn.Conv3d(2, 4, (1, 2, 2), padding=(0, 1, 0))
        self.plane = nn.Conv2d(8, 8, (3, 2), stride=(2, 1), padding=(1, 0), padding_mode=mode)
        self.line = nn.Conv1d(24, 24, 3, padding="same")

    def forward(self, x):  # (n, 2, 2, 5, 6)
        y = torch.tanh(self.volume(x))  # (n, 4, 2, 6, 5)
        y = torch.tanh(self.plane(y.flatten(1, 2)))  # (n, 8, 3, 4)
        y = y.flatten(1, 2)
        return self.line(torch.tanh(self.line(y)))


def loss_fn(model, x):
    return (model(x) - 1).square().mean()


@pytest.fixture(scope="module")
def base():
    return Convolutions()


def images(count=2, samples=9, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(samples, 2, 2, 5, 6, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def adapted(base, **options):
    return get_peft_model(
        copy.deepcopy(base), LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": NAMES, **options})
    )


@pytest.mark.parametrize("piece", [sites.PIECE_ELEMENTS, 1], ids=["whole", "a line at a time"])
def test_products_are_those_of_the_gradients_that_autograd_forms(base, piece, monkeypatch):
    monkeypatch.setattr(sites, "PIECE_ELEMENTS", piece)
    base = copy.deepcopy(base).double()
    batches, model = images(dtype=torch.float64), adapted(base)
    exact, rounding = gradients_of(base, batches, NAMES, loss_fn), gamma(2000, torch.float64)
    require_same(whole(model, batches, loss_fn=loss_fn), exact, rounding)
    generator = torch.Generator().manual_seed(2)
    right, left = (
        {n: torch.randn(g.shape[side], 3, generator=generator, dtype=torch.float64) for n, g in exact.items()}
        for side in (1, 0)
    )
    found = told(model, batches, {n: Asked(right=x) for n, x in right.items()}, loss_fn=loss_fn)
    require_same(found, {n: exact[n] @ right[n] for n in exact}, rounding)
    found = told(model, batches, {n: Asked(left=x) for n, x in left.items()}, loss_fn=loss_fn)
    require_same(found, {n: exact[n].T @ left[n] for n in exact}, rounding)


def test_a_sample_without_a_batch_dimension_too(base):
    def loss_fn(model, x):
        return model.volume(x).square().mean()

    base, x = copy.deepcopy(base).double(), images(1, dtype=torch.float64)[0][0]
    found = whole(adapted(base, target_modules=["volume"]), [x], loss_fn=loss_fn)
    require_same(found, gradients_of(base, [x], ["volume"], loss_fn), gamma(2000, torch.float64))


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_a_convolution_starts_as_the_method_s_paper_says(base, method, tmp_path):
    base = copy.deepcopy(base).requires_grad_(False)
    batches, model = images(), adapted(base)
    exact = gradients_of(base, batches, NAMES, loss_fn)
    report = initialize(model, batches, method, loss_fn=loss_fn)
    assert report.losses[1] < report.losses[0]
    compared = 0
    for name, layer in report.layers.items():
        mine, g = model.get_base_model().get_submodule(name), exact[name]
        a, b = (x.weight.detach().double().flatten(1) for x in (mine.lora_A["default"], mine.lora_B["default"]))
        w, left = (x.weight.detach().double().flatten(1) for x in (base.get_submodule(name), mine.base_layer))
        s = mine.scaling["default"]
        its_b, its_a = FORMULAS[method](g, layer.rank, s, a=a)
        moved = s * b @ a if METHODS[method].base == "less" else 0
        assert ((left + moved - w).abs() <= (1 + 1e-6) * 2.0**-24 * left.abs() + 1e-12).all(), name
        torch.testing.assert_close((b.norm(), a.norm()), (its_b.norm(), its_a.norm()), rtol=1e-3, atol=0)
        if method == "gora":
            assert (b - its_b).norm() <= 1e-4 * its_b.norm()
            continue
        values = svd(g)[1]
        if all(values[end - 1] - values[end] >= GAP * values[end - 1] for end in (2, 4) if end < len(values)):
            compared += 1
            assert cosine(b, its_b) >= 0.99, name
            assert cosine(a.T, its_a.T) >= 0.99, name
    assert method == "gora" or compared == len(NAMES)
    wanted = model(batches[0])
    model.save_pretrained(tmp_path / "adapter")
    load = load_adapter if METHODS[method].base == "less" else PeftModel.from_pretrained
    torch.testing.assert_close(load(copy.deepcopy(base), tmp_path / "adapter")(batches[0]), wanted, rtol=0, atol=1e-5)
    if METHODS[method].base == "less":
        plain = PeftModel.from_pretrained(copy.deepcopy(base), export_plain(model, tmp_path / "plain").folder)
        torch.testing.assert_close(plain(batches[0]), wanted, rtol=0, atol=1e-5)


# --- a refusal before a batch is asked for


def never():
    raise AssertionError("a batch was asked for")
    yield


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_patches_that_a_does_not_read_are_refused_by_name_before_anything_is_done(method):
    message = f"method='{method}' cannot start 1 layers; plane: its A reads other patches than the layer"
    with pytest.raises(ValueError, match=message):
        initialize(adapted(Convolutions("reflect")), never(), method, loss_fn=loss_fn)
