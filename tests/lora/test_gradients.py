"""Starts from gradients, against gradients that autograd forms, and their papers' formulas in dense float64."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional

from eva_lora import (
    METHODS,
    EvaConfig,
    StartReport,
    export_plain,
    initialize,
    load_adapter,
)
from eva_lora.cli.demo import load_smollm2, packed_text
from eva_lora.collecting import Asked
from eva_lora.fitting import fit_leading
from support.bounds import gamma
from support.gradients import FORMULAS, cosine, gradients_of, labelled, require_same, svd, told, whole
from support.models import lora, tiny_llama, token_batches
from support.pages import blocks
from support.tiny import state_of

GRADIENT_METHODS = [name for name, method in METHODS.items() if method.data == "gradients"]
SCALED = ("lora-ga", "gora")  # where the adapter's scaling stands in the formula, or in what the base becomes
RANK = 4
GAP = 0.02  # between neighbouring singular values where a subspace ends, of the larger: below it neither is the answer


@pytest.fixture(scope="module")
def base():
    return tiny_llama()


def factors_of(model, name):
    layer = model.get_base_model().get_submodule(name)
    a, b = layer.lora_A["default"].weight.detach().double(), layer.lora_B["default"].weight.detach().double()
    return a, b, layer.base_layer.weight.detach().double(), layer.scaling["default"]


# --- the pass


def test_products_are_those_of_the_gradients_that_autograd_forms(base):
    batches, model = labelled(), lora(copy.deepcopy(base))
    exact = gradients_of(base, batches)
    require_same(whole(model, batches), exact)
    generator = torch.Generator().manual_seed(0)
    right = {n: torch.randn(g.shape[1], 5, generator=generator) for n, g in exact.items()}
    left = {n: torch.randn(g.shape[0], 5, generator=generator) for n, g in exact.items()}
    found = told(model, batches, {n: Asked(right=basis) for n, basis in right.items()})
    require_same(found, {n: exact[n] @ right[n].double() for n in exact})
    found = told(model, batches, {n: Asked(left=basis) for n, basis in left.items()})
    require_same(found, {n: exact[n].T @ left[n].double() for n in exact})
    few = dict([*right.items()][-2:])
    found = told(model, batches, {n: Asked(right=basis) for n, basis in few.items()})
    require_same(found, {n: exact[n] @ few[n].double() for n in few})


def test_in_float64_they_are_exact():
    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 5)

        def forward(self, x):
            x = torch.relu_(self.a(x))  # in place, of what the layer put out
            return self.b(self.b(x) + x)  # called twice

    plain = Sums().double()
    model = get_peft_model(copy.deepcopy(plain), LoraConfig(r=2, target_modules=["a", "b"]))
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(3, 7, 6, generator=generator, dtype=torch.float64) for _ in range(2)]

    def loss_fn(model, batch):
        return model(batch).square().mean()

    exact = gradients_of(plain, batches, ["a", "b"], loss_fn)
    found = whole(model, batches, loss_fn=loss_fn)
    require_same(found, exact, gamma(1000, torch.float64))
    assert {product.dtype for product in found.values()} == {torch.float64}


def test_reentrant_checkpointing_that_cuts_the_graph_off_is_named(base):
    model = lora(copy.deepcopy(base))
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": True})
    model.get_base_model().disable_input_require_grads()
    model.train()
    with pytest.raises(ValueError, match=r"depends on no LoRA layer: .*model\.enable_input_require_grads\(\)"):
        initialize(model, labelled(1), "lora-one")


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_under_gradient_checkpointing_a_batch_counts_once(base, reentrant):
    batches = labelled(2)
    exact = gradients_of(base, batches)
    model = lora(copy.deepcopy(base))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    calls = []
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    handle = layer.base_layer.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    before = state_of(model)
    require_same(whole(model, batches), exact)
    assert len(calls) == 2 * len(batches)  # once more in the backward
    assert state_of(model) == before
    assert all(p.grad is None for p in model.parameters())
    handle.remove()
    bases = {n: torch.eye(g.shape[1], 3) for n, g in exact.items()}
    found = told(model, batches, {n: Asked(right=basis) for n, basis in bases.items()})
    require_same(found, {n: g[:, :3] for n, g in exact.items()})


def test_nothing_of_the_model_or_the_process_is_changed(base):
    model = lora(copy.deepcopy(base), lora_dropout=0.5, modules_to_save=["lm_head"])
    model.train()
    model.get_base_model().model.norm.weight.requires_grad_(True)
    model.get_base_model().model.norm.weight.grad = torch.ones(32)
    before = state_of(model)

    def failing(model, batch):
        loss = model(**batch).loss
        torch.rand(3)
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(loss)
        return loss

    seen = []
    for loss_fn, error in ((failing, KeyboardInterrupt), (lambda m, b: m(**b).loss * torch.nan, ValueError)):
        with pytest.raises(error):
            initialize(model, labelled(), "lora-one", loss_fn=loss_fn)
        assert state_of(model) == before
    initialize(model, labelled(), "lora-one", dry_run=True)
    assert state_of(model) == before
    assert torch.equal(model.get_base_model().model.norm.weight.grad, torch.ones(32))
    assert [name for name, p in model.named_parameters() if p.grad is not None] == [
        "base_model.model.model.norm.weight"
    ]


def test_every_pass_sees_the_same_batches_and_the_same_random_numbers(base):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = copy.deepcopy(base)

        def forward(self, x):
            return functional.dropout(self.inner(x).logits, 0.5, training=True)

    drawn = []

    def loss_fn(model, x):
        out = model(x)
        drawn.append(float(out.detach().sum()))
        return out.square().mean()

    model = get_peft_model(Noisy(), LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    generator = torch.Generator().manual_seed(3)
    loader = (torch.randint(0, 97, (2, 8), generator=generator) for _ in range(5))  # that cannot start again
    report = initialize(model, loader, "lora-one", EvaConfig(rho=1.0, max_batches=2), loss_fn=loss_fn)
    assert report.num_batches == 2
    assert len(drawn) == 12  # five passes, and the loss after a step
    assert drawn[:2] == drawn[2:4] == drawn[4:6] == drawn[8:10]


def test_a_loss_that_takes_gradients_itself_is_refused(base):
    """They would be counted beside the loss's own."""

    def backward(model, batch):
        loss = model(**batch).loss
        loss.backward(retain_graph=True)
        return loss

    def grad(model, batch):
        embedded = model.get_input_embeddings()(batch["input_ids"]).requires_grad_(True)
        loss = model(inputs_embeds=embedded, labels=batch["labels"]).loss
        (gradient,) = torch.autograd.grad(loss, embedded, create_graph=True)
        return loss + gradient.square().sum()

    model = lora(copy.deepcopy(base))
    before = state_of(model)
    for loss_fn in (backward, grad):
        with pytest.raises(ValueError, match="loss_fn: it takes gradients through the model itself"):
            initialize(model, labelled(1), "lora-one", loss_fn=loss_fn)
        assert state_of(model) == before


def test_a_loss_that_switches_the_adapter_off_meanwhile_is_the_base_s(base):
    """As preference losses do for their reference."""

    def loss_fn(model, batch):
        with torch.no_grad(), model.disable_adapter():
            reference = model(**batch).loss
        return model(**batch).loss - reference

    model = lora(copy.deepcopy(base), init_lora_weights=False)  # B is not zero
    require_same(whole(model, labelled(2), loss_fn=loss_fn), gradients_of(base, labelled(2)))
    assert all(p.grad is None for p in model.parameters())


# --- bases that are quantised


class Rounded(nn.Module):
    """A layer whose weight no gradient could be of."""

    def __init__(self, weight):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter((weight.detach() * 64).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) / 64).T


def test_bases_that_have_no_gradient_tell_what_that_of_what_they_compute_with_is(base):
    batches, floats = labelled(2), copy.deepcopy(base)
    for layer in floats.model.layers:
        layer.mlp.up_proj.weight.data = (layer.mlp.up_proj.weight.data * 64).round() / 64
    exact = gradients_of(floats, batches)
    model = lora(copy.deepcopy(floats))
    for layer in model.get_base_model().model.layers:
        layer.mlp.up_proj.base_layer = Rounded(layer.mlp.up_proj.base_layer.weight)
    require_same(whole(model, batches), exact)
    for method in GRADIENT_METHODS:
        report = initialize(model, batches, method, dry_run=True)
        assert report.losses[1] < report.losses[0]
        held = any("base weights stay as they are (of model.layers.0.mlp.up_proj" in note for note in report.notes)
        assert held == (METHODS[method].base == "less")


def test_bitsandbytes_bases_too():
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    floats = nn.Sequential(nn.Linear(64, 96, bias=False), nn.Tanh(), nn.Linear(96, 64, bias=False))
    base = copy.deepcopy(floats)
    for index in (0, 2):
        out, width = floats[index].weight.shape
        layer = bnb.nn.Linear4bit(width, out, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        layer.load_state_dict(floats[index].state_dict())
        base[index] = layer.to("cpu")
        weight = base[index].weight
        floats[index].weight.data = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    x = torch.randn(40, 64)

    def loss_fn(model, batch):
        return (model(batch) - 1).square().mean()

    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0", "2"]))
    require_same(whole(model, [x], loss_fn=loss_fn), gradients_of(floats, [x], ["0", "2"], loss_fn))
    for method in GRADIENT_METHODS:
        before, after = initialize(copy.deepcopy(model), [x], method, loss_fn=loss_fn).losses
        assert after < before


# --- what each method starts from


def test_every_method_has_a_formula_here():
    assert set(FORMULAS) == set(GRADIENT_METHODS)


@pytest.mark.parametrize(
    ("method", "options"),
    [*((method, {}) for method in GRADIENT_METHODS), *((m, {"lora_alpha": 3, "use_rslora": True}) for m in SCALED)],
    ids=str,
)
def test_a_method_starts_as_its_paper_says(base, method, options):
    batches, model = labelled(), lora(copy.deepcopy(base), **options)
    exact = gradients_of(base, batches)
    report = initialize(model, batches, method, progress=False)
    compared = 0
    for name, layer in report.layers.items():
        a, b, left, scaling = factors_of(model, name)
        w, g = base.get_submodule(name).weight.detach().double(), exact[name]
        its_b, its_a = FORMULAS[method](g, layer.rank, scaling, a=a)
        if METHODS[method].base == "less":
            assert ((left + scaling * b @ a - w).abs() <= (1 + 1e-6) * 2.0**-24 * left.abs() + 1e-12).all(), name
        else:
            assert torch.equal(left, w)
        torch.testing.assert_close(b.norm(), its_b.norm(), rtol=1e-3, atol=0)
        torch.testing.assert_close(a.norm(), its_a.norm(), rtol=1e-3, atol=0)
        if method == "gora":
            assert (b - its_b).norm() <= 1e-4 * its_b.norm()
            continue
        values = svd(g)[1]
        ends = (RANK, 2 * RANK) if "ga" in method else (RANK,)
        if any((values[end - 1] - values[end]) < GAP * values[end - 1] for end in ends):
            continue
        compared += 1
        assert cosine(b, its_b) >= 0.99, name
        assert cosine(a.T, its_a.T) >= 0.99, name
        if method == "lora-one":
            chord = (2 * (1 - 0.99)) ** 0.5  # by which unit vectors are apart on either side, at that cosine
            assert (b @ a - its_b @ its_a).norm() <= 2 * chord * (its_b @ its_a).norm()
    assert method == "gora" or compared >= 12  # of 21


@pytest.mark.parametrize("rank", [1, 2])
def test_few_directions_are_found_as_many_are(rank):
    """Of a gradient whose singular values fall slowly, where five columns for each rank would miss some."""
    u, v = (
        torch.linalg.qr(torch.randn(n, 90, generator=torch.Generator().manual_seed(n)).double()).Q for n in (120, 90)
    )
    g = (u * torch.arange(1, 91) ** (-1 / 3)) @ v.T

    def run(asked):
        (one,) = asked.values()
        return {"g": (g @ one.right.double() if one.left is None else g.T @ one.left.double()).float()}

    shapes, config = {"g": tuple(g.shape)}, EvaConfig(rho=1.0)
    for times, enough in ((None, True), (5.0, False)):
        options = replace(config, oversampling=times)
        fit = fit_leading(METHODS["lora-ga"], run, shapes, {"g": rank}, {"g": 1.0}, options)["g"]
        found = cosine(fit.lora_a.T, v[:, :rank]), cosine(fit.lora_b, u[:, rank : 2 * rank])
        assert (min(found) >= 0.99) == enough, found


def test_lora_ga_s_first_step_goes_where_full_fine_tuning_s_does(base):
    """ΔW of one step of plain gradient descent on A and B, −s²(B Bᵀ G + G Aᵀ A), beside −G."""
    batches, model = labelled(), lora(copy.deepcopy(base))
    exact = gradients_of(base, batches)
    initialize(model, batches, "lora-ga")
    for name, g in exact.items():
        a, b, _, _ = factors_of(model, name)
        step = b @ b.T @ g + g @ a.T @ a
        values = svd(g)[1]
        best = (values[: 2 * RANK].square().sum() / values.square().sum()).sqrt()
        assert float((step * g).sum() / step.norm() / g.norm()) >= best - 0.01, name


def test_gora_gives_ranks_by_importance(base):
    batches, model = labelled(), lora(copy.deepcopy(base))
    exact = gradients_of(base, batches)
    report = initialize(model, batches, "gora")
    weights = {name: base.get_submodule(name).weight.detach().double() for name in exact}
    importance = {name: float((weights[name] * g).abs().mean()) for name, g in exact.items()}
    budget = sum(RANK * sum(g.shape) for g in exact.values())
    for name, rank in report.ranks.items():
        wanted = importance[name] / sum(importance.values()) * budget / sum(exact[name].shape)
        assert abs(rank - min(max(wanted, RANK / 2), 4 * RANK)) <= 0.5 + 1e-3
        assert model.get_base_model().get_submodule(name).scaling["default"] == 2
    assert len(set(report.ranks.values())) > 2
    spent = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert report.notes == (f"ranks go by importance: A and B have {spent:,} parameters, {budget:,} were configured",)


def test_a_step_that_raises_the_loss_is_warned_of(base):
    def turned(model, batch):
        loss = model(**batch).loss
        return 2 * loss.detach() - loss  # its value, and the opposite of its gradient

    for method in ("lora-ga", "lora-one"):
        model = lora(copy.deepcopy(base), target_modules=["q_proj", "down_proj"])
        with pytest.warns(UserWarning, match=f"method='{method}': a step along what the layers start from does not"):
            report = initialize(model, labelled(1), method, loss_fn=turned, dry_run=True)
        assert report.losses[1] >= report.losses[0]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            report = initialize(model, labelled(1), method)
        assert report.losses[1] < report.losses[0]


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_what_starts_from_gradients_saves_and_loads(base, method, tmp_path):
    model, batches = lora(copy.deepcopy(base)), labelled(1)
    report = initialize(model, batches, method)
    assert StartReport.load(report.save(tmp_path / "report")) == report
    assert "gradients of 1 batches" in str(report)
    with torch.no_grad():
        wanted, plain = model(**batches[0]).logits, base(**batches[0]).logits
        with model.disable_adapter():
            torch.testing.assert_close(model(**batches[0]).logits, plain, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path / "adapter")
    if METHODS[method].base == "less":
        again = load_adapter(copy.deepcopy(base), tmp_path / "adapter")
        export_plain(model, tmp_path / "plain")
        ordinary = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "plain")
        with torch.no_grad():
            torch.testing.assert_close(ordinary(**batches[0]).logits, wanted, rtol=0, atol=1e-5)
    else:
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(again(**batches[0]).logits, wanted, rtol=0, atol=1e-5)


def test_the_page_s_code_does_what_it_says(base):
    names = {"model": None, "loader": labelled(2)}
    code = [block.code for block in blocks("docs/gradients.md") if block.language == "python"]
    assert len(code) == 2
    for block in code:
        names["model"] = lora(copy.deepcopy(base))
        exec(compile(block, "gradients.md", "exec"), names)
        assert names["report"].losses[1] < names["report"].losses[0]


@pytest.mark.slow
def test_every_layer_of_a_language_model_starts_from_its_gradient_s_leading_directions():
    base, tokenizer = load_smollm2(echo=lambda message: None)
    texts = packed_text(tokenizer, sequences=4, tokens=128)
    batches = [texts[i * len(texts) // 4] for i in range(4)]
    exact = gradients_of(base, batches)
    model = lora(base, r=8)
    initialize(model, batches, "lora-one")
    assert len(exact) == 210
    for name in [*exact][::5]:
        g = exact[name]
        a, b, _, _ = factors_of(model, name)
        u, s, v = svd(g)
        for mine, best, side in ((b, u[:, :8], g.T), (a.T, v[:8].T, g)):
            assert cosine(mine, best) >= 0.99, name
            q = torch.linalg.qr(mine).Q
            assert (side @ q).square().sum() >= (1 - 1e-3) * s[:8].square().sum(), name


# --- refusals


def test_what_gradients_cannot_be_taken_of_is_named(base):
    model, batches = lora(copy.deepcopy(base)), labelled(1)
    before = state_of(model)
    for options, kind, message in (
        ({"loader_or_statistics": None}, ValueError, "loader_or_statistics: expected batches or EvaStatistics with"),
        ({"loader_or_statistics": []}, ValueError, "loader"),
        (
            {"loader_or_statistics": token_batches(1)},
            ValueError,
            "loss_fn: expected a callable, since the model returns",
        ),
        ({"loss_fn": 3}, TypeError, "loss_fn: expected a callable or None, got int"),
        (
            {"loss_fn": lambda m, b: m(**b).logits},
            TypeError,
            "loss_fn: expected the loss, a floating-point tensor of one",
        ),
        ({"loss_fn": lambda m, b: 1.0}, TypeError, "loss_fn: expected the loss, .*, got float"),
        ({"loss_fn": lambda m, b: m(**b).loss.detach()}, ValueError, "loss_fn: the loss of batch 1 depends on no LoRA"),
        ({"loss_fn": lambda m, b: m(**b).loss / 0}, ValueError, "loss_fn: the loss of batch 1 is inf$"),
        (
            {"loader_or_statistics": [*batches, dict(batches[0], labels=torch.full_like(batches[0]["labels"], -100))]},
            ValueError,
            "loss_fn: the loss of batch 2 is nan, as none of its labels counts: leave it out",
        ),
        (
            {"loader_or_statistics": labelled(1, shape=(3, 1))},
            ValueError,
            "loss_fn: the loss of batch 1 is nan, as none of its labels counts: leave it out",
        ),
        ({"loss_fn": lambda m, b: m(**b).logits[:, :1].sum() * 0}, ValueError, "takes 8 directions of the gradient of"),
        ({"forward_fn": lambda m, b: m(**b)}, ValueError, "forward_fn: expected None with method='lora-ga'"),
        ({"row_mask_fn": lambda b: None}, ValueError, "row_mask_fn: expected None with method='lora-ga'"),
        ({"keep": batches}, ValueError, "keep: expected None with method='lora-ga'"),
        ({"config": EvaConfig(rho=2.0)}, ValueError, "rho: expected 1 with method='lora-ga'"),
        ({"config": EvaConfig(rho=1.0, max_rows=5)}, ValueError, "max_rows: expected None with method='lora-ga'"),
        ({"config": EvaConfig(rho=1.0, whiten=True)}, ValueError, "whiten: expected False"),
    ):
        with pytest.raises(kind, match=message):
            initialize(model, **{"loader_or_statistics": batches, "method": "lora-ga", **options})
        assert state_of(model) == before
    for bounds in ({"min_rank": 99}, {"max_rank": 2, "rank_multiple": 3}):
        with pytest.raises(
            ValueError, match=r"rank_multiple: expected such as allow a rank for model\.layers\.0\.\S+, of"
        ):
            initialize(model, batches, "gora", EvaConfig(max_batches=2, **bounds))
        assert state_of(model) == before
    for method in ("pissa", "eva"):
        with pytest.raises(ValueError, match=f"loss_fn: expected None with method='{method}'"):
            initialize(model, None, method, loss_fn=lambda m, b: m(**b).loss)


def test_a_layer_that_no_gradient_reaches_is_named(base):
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            self.two(x)
            return self.one(x)

    model = get_peft_model(TwoHeads(), LoraConfig(r=1, target_modules=["one", "two"]))
    with pytest.raises(ValueError, match="model: no gradient has reached layer two"):
        initialize(model, [torch.ones(3, 4)], "lora-one", loss_fn=lambda m, x: m(x).square().mean())
