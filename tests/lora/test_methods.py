"""Every method of the table, against its paper's formula in dense float64, written here from the paper."""

import copy
import itertools
import re
import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

import eva_lora
from eva_lora import (
    METHODS,
    EvaConfig,
    EvaStatistics,
    StartReport,
    collect,
    eva_initialize,
    export_plain,
    initialize,
    load_adapter,
)
from eva_lora.collecting import run
from eva_lora.planning import Allocation, SiteStatistics
from support.bounds import gamma
from support.method_formulas import BETA, FORMULAS, FROM_INPUTS, GAP, cosine, svd
from support.models import (
    LINEARS,
    layer_inputs,
    load_minilm,
    lora,
    minilm_text_batches,
    tiny_gpt2,
    tiny_llama,
    token_batches,
)
from support.pages import blocks
from support.quantised import rounded

UNIT = 2.0**-24


@pytest.fixture(scope="module")
def base():
    return tiny_llama()


def statistics_of(model, batches, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # not converged: there are few batches
        config = EvaConfig(max_batches=len(batches), tau=1.0, rho=1.0, **options)
        return collect(model, batches, config, progress=False)


def started(base, method, *, batches=None, kept=None, **options):
    """A model, and its report, started from statistics that hold everything."""
    model = lora(copy.deepcopy(base), **options)
    batches = (batches or token_batches()) if METHODS[method].data != "none" else None
    data = statistics_of(model, batches, keep_moments=True) if batches else None
    keep = statistics_of(model, kept or token_batches(seed=9), keep_moments=True) if method == "sc-lora" else None
    return model, initialize(model, data, method, keep=keep, beta=BETA, progress=False)


def factors_of(model, name):
    layer = model.get_base_model().get_submodule(name)
    a, b = layer.lora_A["default"].weight.detach().double(), layer.lora_B["default"].weight.detach().double()
    return a, b, layer.base_layer.weight.detach().double(), layer.scaling["default"]


def test_every_method_has_a_formula_here():
    assert set(FORMULAS) == set(FROM_INPUTS)


@pytest.mark.parametrize("method", FROM_INPUTS)
def test_a_method_starts_as_its_paper_says(base, method):
    model, report = started(base, method)
    rows = layer_inputs(lora(copy.deepcopy(base)), token_batches())
    kept = layer_inputs(lora(copy.deepcopy(base)), token_batches(seed=9))
    compared = 0
    for name, layer in report.layers.items():
        a, b, left, scaling = factors_of(model, name)
        w = base.get_submodule(name).weight.detach().double()
        moments = [x[name].T @ x[name] / len(x[name]) for x in (rows, kept)]
        its_b, its_a, gap, of = FORMULAS[method](w, moments[0], layer.rank, scaling, kept=moments[1])
        product, wanted = b @ a, its_b @ its_a
        if METHODS[method].base == "less":
            # One rounding of what is left, in the base's dtype.
            assert ((left + scaling * product - w).abs() <= (1 + 1e-6) * UNIT * left.abs() + 1e-12).all(), name
        else:
            assert torch.equal(left, w)
        if gap <= GAP * of:
            continue
        compared += 1
        assert cosine(b, its_b) >= 0.999, name
        torch.testing.assert_close(b.norm(), its_b.norm(), rtol=1e-3, atol=0)
        torch.testing.assert_close(product.norm(), wanted.norm(), rtol=1e-3, atol=0)
        if a.any():
            assert cosine(a.T, its_a.T) >= 0.999, name
    assert compared >= 12  # of 21


@pytest.mark.parametrize("options", [{"lora_alpha": 8, "use_rslora": True}, {"alpha_pattern": {"q_proj": 32}}], ids=str)
@pytest.mark.parametrize("method", ["pissa", "sc-lora"])
def test_what_moves_is_the_same_whatever_the_scaling_is(base, method, options):
    """But for methods whose B is U, of which B A is the same."""
    plain, _ = started(base, method, lora_alpha=4)
    scaled, _ = started(base, method, **options)
    for name, _ in base.named_modules():
        if name.rpartition(".")[2] in LINEARS:
            (a, b, _, one), (a2, b2, _, s) = factors_of(plain, name), factors_of(scaled, name)
            assert one == 1
            expected = b @ a if method == "sc-lora" else b @ a / s
            assert (b2 @ a2 - expected).norm() <= 1e-5 * expected.norm()
            if method == "pissa":  # 1/s goes half to each
                torch.testing.assert_close(a2.norm(), b2.norm(), rtol=1e-5, atol=0)


def test_a_weight_kept_transposed_gives_what_a_plain_one_gives():
    model = get_peft_model(tiny_gpt2(), LoraConfig(r=3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True))
    name = "transformer.h.0.attn.c_attn"
    before = model.get_base_model().get_submodule(name).base_layer.weight.detach().clone()
    assert isinstance(model.get_base_model().get_submodule(name).base_layer, Conv1D)
    initialize(model, method="pissa")
    a, b, left, scaling = factors_of(model, name)
    u, d, v = svd(before.T.double())
    wanted = (u[:, :3] * d[:3]) @ v[:3]
    assert (scaling * b @ a - wanted).norm() <= 1e-5 * wanted.norm()
    assert (left.T + scaling * b @ a - before.T.double()).abs().max() <= UNIT * left.abs().max() * (1 + 1e-6)


def test_bfloat16_bases_round_what_is_left_and_the_report_says_how_much(base):
    model = lora(copy.deepcopy(base).bfloat16())
    report = initialize(model, method="pissa")
    for name, layer in report.layers.items():
        a, b, left, scaling = factors_of(model, name)
        w = base.get_submodule(name).weight.detach().bfloat16().double()
        assert model.get_base_model().get_submodule(name).base_layer.weight.dtype == torch.bfloat16
        lost = (left + scaling * b @ a - w).norm() / w.norm()
        torch.testing.assert_close(torch.tensor(layer.rounding, dtype=torch.float64), lost, rtol=1e-6, atol=0)
        assert 2.0**-14 < layer.rounding < 2.0**-8
    assert "its dtype rounds off" in str(report)


def test_a_streamed_subspace_finds_corda_s_output_energy(base):
    """What the pass follows by itself, without whole covariances: of 8 columns of 32 and 48."""
    model = lora(copy.deepcopy(base))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        config = EvaConfig(max_batches=6, rho=1.0, statistic="subspace", oversampling=5.0)
        initialize(model, token_batches(), "corda", config, progress=False)
    rows = layer_inputs(lora(copy.deepcopy(base)), token_batches())
    for name, x in rows.items():
        w, moment = base.get_submodule(name).weight.detach().double(), x.T @ x / len(x)
        u = svd(w @ moment)[0][:, :4]
        best, total = ((m @ moment * m).sum() for m in (u.T @ w, w))
        _, b, _, _ = factors_of(model, name)
        q = torch.linalg.qr(b).Q
        got = ((q.T @ w) @ moment * (q.T @ w)).sum()
        assert got >= best - 0.01 * total, name


def test_reports_say_what_each_layer_aims_at(base, tmp_path):
    model, report = started(base, "sc-lora")
    rows, kept = (layer_inputs(lora(copy.deepcopy(base)), token_batches(seed=seed)) for seed in (1, 9))
    for name, layer in report.layers.items():
        w = base.get_submodule(name).weight.detach().double()
        q = torch.linalg.qr(factors_of(model, name)[1]).Q
        for share, x in ((layer.weight_share, None), (layer.output_share, rows[name]), (layer.kept_share, kept[name])):
            part, whole = ((m if x is None else m @ x.T).square().sum() for m in (q.T @ w, w))
            assert share == pytest.approx(float(part / whole), rel=1e-4)
    assert StartReport.load(report.save(tmp_path)) == report
    assert "method sc-lora" in str(report)


@pytest.mark.parametrize("method", [name for name in FROM_INPUTS if METHODS[name].data == "none"])
@pytest.mark.parametrize("whole", [True, False])
def test_on_statistics_methods_that_need_none_say_what_they_would_take_of_outputs(base, method, whole):
    model = lora(copy.deepcopy(base))
    statistics = statistics_of(model, token_batches(), keep_moments=whole)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = initialize(model, statistics, method, dry_run=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for site in statistics.sites:
        w, known = base.get_submodule(site.name).weight.detach().double(), statistics.inputs[site.input]
        u = svd(w)[0]
        u = u[:, -4:] if METHODS[method].end == "bottom" else u[:, :4]
        factor, rest = (part.double() for part in known.second_moment())
        r = known.moment if whole else factor @ factor.T + rest * torch.eye(len(factor), dtype=w.dtype)
        part, total = (float(((m @ r) * m).sum()) for m in (u.T @ w, w))
        assert report.layers[site.name].output_share == pytest.approx(part / total, rel=1e-3)
    with pytest.raises(ValueError, match=f"expected None with method='{method}', which looks at weights alone"):
        initialize(model, statistics, method)


def test_ranks_move_by_scores_and_removed_layers_keep_their_weight(base):
    model = lora(copy.deepcopy(base), r=1)
    report = initialize(model, method="pissa", config=EvaConfig(rho=2.0))
    values = {name: svd(base.get_submodule(name).weight.detach().double())[1].square() for name in report.layers}
    shares = {name: (squares[:2] / squares.sum()).tolist() for name, squares in values.items()}
    pooled = sorted((share for pair in shares.values() for share in pair), reverse=True)
    assert report.ranks == {n: sum(share >= pooled[20] for share in pair) for n, pair in shares.items()}
    gone = [name for name, rank in report.ranks.items() if not rank]
    assert gone
    for name in gone:
        assert torch.equal(model.get_base_model().get_submodule(name).weight, base.get_submodule(name).weight)


@pytest.mark.skipif(not hasattr(BaseTunerLayer, "frozen_peft_weight_names"), reason="this PEFT cannot keep B frozen")
def test_mica_s_second_matrix_stays_frozen_where_adapters_are_switched(base):
    model, _ = started(base, "mica")
    with model.disable_adapter():
        pass
    model.set_adapter("default")
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert not any("lora_B" in name for name in trainable)


def test_eva_is_eva(base):
    one, two, three = (lora(copy.deepcopy(base)) for _ in range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        config = EvaConfig(max_batches=6)
        report = eva_initialize(one, token_batches(), config, progress=False)
        assert initialize(two, token_batches(), config=config, progress=False).ranks == report.ranks
        statistics = collect(three, token_batches(), config, progress=False)
    initialize(three, statistics)
    state = one.state_dict()
    for other in (two, three):
        assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())


# --- refusals


@pytest.mark.parametrize("method", METHODS)
def test_data_that_a_method_does_not_take_or_lacks_is_an_error_before_the_first_batch(base, method):
    model = lora(copy.deepcopy(base))

    def never():
        raise AssertionError("a batch was taken")
        yield

    data = METHODS[method].data
    if data == "none":
        with pytest.raises(ValueError, match=f"loader_or_statistics: expected None with method='{method}'"):
            initialize(model, never(), method)
    else:
        with pytest.raises(ValueError, match="loader_or_statistics: expected batches or EvaStatistics with method="):
            initialize(model, None, method)
        with pytest.raises(TypeError, match="loader_or_statistics: expected an iterable of batches"):
            initialize(model, "data.jsonl", method)
    if data == "two sets":
        with pytest.raises(ValueError, match="keep: expected batches or EvaStatistics with method='sc-lora', got None"):
            initialize(model, never(), method)
    else:
        with pytest.raises(ValueError, match=f"keep: expected None with method='{method}'"):
            initialize(model, None if data == "none" else never(), method, keep=never())


def test_arguments_out_of_range_are_named(base):
    model = lora(copy.deepcopy(base))
    for options, message in (
        ({"method": "olora"}, r"method: expected one of \('eva', 'pissa', .*got 'olora'"),
        ({"method": "pissa", "beta": 2}, "beta: expected a number between 0 and 1, got 2"),
        ({"method": "milora", "config": EvaConfig(rho=2.0)}, "rho: expected 1 with method='milora'"),
        *(
            ({"method": "milora", "config": EvaConfig(rho=1.0, **bound)}, "min_rank, max_rank, rank_multiple: expected")
            for bound in ({"min_rank": 5}, {"max_rank": 3}, {"rank_multiple": 3})
        ),
        ({"method": "pissa", "config": EvaConfig(budget_parameters=47)}, "expected enough for one rank of .* least 48"),
        (
            {"method": "pissa", "config": EvaConfig(rho=2.0, adjust_scaling_factors=False)},
            "adjust_scaling_factors: expected True",
        ),
        ({"method": "eva"}, "loader_or_statistics: expected batches or EvaStatistics with method='eva', got None"),
        ({"method": "eva", "keep": []}, "keep: expected None with method='eva'"),
    ):
        with pytest.raises(ValueError, match=message):
            initialize(model, **options)


def test_statistics_that_do_not_hold_what_a_method_takes_are_refused(base):
    model = lora(copy.deepcopy(base))
    with pytest.raises(ValueError, match="need statistics with keep_moments=True"):
        initialize(model, statistics_of(model, token_batches()), "astra")
    few = statistics_of(model, token_batches(1, shape=(1, 20)), keep_moments=True)
    with pytest.raises(ValueError, match=r"20 rows tell \d+ of \d+ from rounding"):
        initialize(model, few, "corda-kpm")
    other = lora(tiny_llama(), target_modules=["q_proj"])
    with pytest.raises(ValueError, match="they are of another model"):
        initialize(model, statistics_of(other, token_batches()), "corda")


@pytest.mark.parametrize("method", FROM_INPUTS)
def test_a_config_that_says_nothing_of_ranks_leaves_them(base, method):
    """As none at all does, and as the shell has it: EVA's rho is EVA's."""
    model, data = lora(copy.deepcopy(base)), token_batches(2, shape=(4, 40))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # not converged
        report = initialize(
            model, None if METHODS[method].data == "none" else data, method, EvaConfig(max_batches=2),
            keep=token_batches(2, seed=9) if method == "sc-lora" else None, progress=False,
        )  # fmt: skip
    assert {layer.rank for layer in report.layers.values()} == {4}
    assert report.config["rho"] == 1.0


@pytest.mark.parametrize("options", [{"budget": 2}, {"config": EvaConfig(budget_parameters=2 * 8)}], ids=str)
def test_a_direction_of_little_energy_before_one_of_much_counts_with_it(options):
    """CorDA orders directions by W R and ranks move by W R Wᵀ: a layer's first may have less than its second, and a
    rank of two is worth what both have."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (nn.Linear(4, 4, bias=False) for _ in range(2))
            self.first.weight.data = torch.diag(torch.tensor([1.0, 10.0, 0.1, 0.1]))  # W R: 10, 9; W R Wᵀ: 10, 90
            self.second.weight.data = torch.diag(torch.tensor([1.0, 3.0, 2.0, 2.0]))

        def forward(self, x):
            return self.first(x), self.second(x)

    x = torch.diag(torch.tensor([10.0, 0.9, 0.9, 0.9]).sqrt()) * 2  # R is its square's mean
    model = get_peft_model(Net(), LoraConfig(r=2, lora_alpha=2, target_modules=["first", "second"]))
    report = initialize(model, [torch.cat([x, -x] * 4)], "corda", progress=False, **options)
    assert {name: layer.rank for name, layer in report.layers.items()} == {"first": 2, "second": 0}
    assert report.layers["first"].output_share == pytest.approx(100 / 100.018, rel=1e-5)
    if "config" in options:
        assert "no ranks do better" in "".join(report.notes)


def allocated(rows, budget, **options):
    """Ranks of layers with such scores."""
    width = max(map(len, rows))
    sites = [
        SiteStatistics(f"{i}", inputs=(i,), rank=width, in_features=width, converged=True, components_converged=width)
        for i in range(len(rows))
    ]
    made = Allocation(sites, EvaConfig(rho=1.0, **options))
    return [*made.ranks([np.array(row) for row in rows], budget, falling=False).values()]


def test_bounds_are_kept_in_mind_where_scores_do_not_fall():
    rows = [[0.05, 0.85, 0.06, 0.04], [0.4, 0.58, 0.01, 0.01]]
    assert allocated(rows, 3, min_rank=1) == [2, 1]  # 1.3, not the 1.03 of one and two
    rows = [[0.2, 0.21, 0.55, 0.04], [0.26, 0.25, 0.25, 0.24]]
    assert allocated(rows, 2, max_rank=3, rank_multiple=2) == [0, 2]  # 0.55 is out of reach


def test_of_what_needs_every_direction_the_pass_reads_all_rows_once():
    """Leading directions converge early, and repeated rows tell nothing: neither may end it, nor make it go on."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(48, 48, generator=generator) * torch.cat([torch.full((4,), 30.0), torch.ones(44)])
    rows = torch.randn(40, 24, 48, generator=generator) @ mixing.T
    target = torch.randn(16, 48, generator=generator)
    for method in ("corda-kpm", "astra", "lora-null"):
        net = nn.Sequential(nn.Linear(48, 16, bias=False))
        net[0].weight.data.copy_(target)
        model = get_peft_model(net, LoraConfig(r=3, lora_alpha=3, target_modules=["0"]))
        for config in (EvaConfig(equal_data=False), None):
            report = initialize(model, list(rows), method, config, progress=False, dry_run=config is not None)
            assert (report.num_batches, report.num_rows) == (40, 40 * 24)
        x, w = rows.flatten(0, 1).double(), target.double()
        a, b, _, _ = factors_of(model, "0")
        left, right, gap, reference = FORMULAS[method](w, x.T @ x / len(x), 3, 1.0)
        assert gap > GAP * reference
        assert (b @ a - left @ right).norm() < 1e-5 * (left @ right).norm()
        model = get_peft_model(nn.Sequential(nn.Linear(48, 16)), LoraConfig(r=3, target_modules=["0"]))
        with pytest.raises(ValueError, match=r"24 rows tell 24 of 48 from rounding"):
            initialize(model, [rows[0]], method, progress=False)


def test_an_endless_loader_is_read_to_the_bound_and_that_is_said(monkeypatch):
    monkeypatch.setattr(run, "DEFAULT_MAX_BATCHES", 5)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), LoraConfig(r=2, target_modules=["0"]))
    with pytest.warns(
        UserWarning, match=r"stopped at max_batches \(5\), after 50 rows; whatever the loader holds beyond"
    ):
        report = initialize(model, (torch.randn(10, 8) for _ in itertools.count()), "astra", progress=False)
    assert report.num_batches == 5


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight
        self.middle = nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, padding_mode="circular")
        self.grouped = nn.Conv1d(8, 8, 3, groups=2)
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x):
        return self.head(self.middle(self.embedding(x)))


def test_layers_that_cannot_be_started_are_named_and_nothing_is_changed(base):
    def tied(**options):
        return get_peft_model(Tied(), LoraConfig(**{"r": 2, **options}))

    for model, message in (
        (tied(target_modules=["conv"]), "cannot start 1 layers; conv: its A reads other patches than the layer"),
        (tied(target_modules=["grouped"]), "EVA applies to none of its LoRA layers: .*groups=2"),
        (tied(target_modules=["middle"], r=9), "middle has rank 9, its weight has 8 directions"),
        (lora(copy.deepcopy(base), init_lora_weights="pissa"), "has already changed the base weights"),
    ):
        state = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            initialize(model, method="pissa")
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_base_gives_part_of_itself_once(base):
    model, _ = started(base, "pissa")
    with pytest.raises(ValueError, match="has already changed the base weights"):
        initialize(model, method="pissa", overwrite=True)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=True))
    model.set_adapter("second")
    with pytest.raises(ValueError, match="part of it is with the adapter 'default' already"):
        initialize(model, method="pissa")


class Convolutions(nn.Module):
    """Of one and of two dimensions, their patches overlapping, padded and spread."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.plane = nn.Conv2d(3, 6, (3, 2), stride=(2, 1), padding=(1, 0))
        self.line = nn.Conv1d(18, 9, 3, padding="same", dilation=1)

    def forward(self, x):  # (n, 3, 6, 6)
        y = torch.tanh(self.plane(x))  # (n, 6, 3, 5)
        return self.line(y.flatten(1, 2))

    def patches(self, x):
        """Rows of both, by ``unfold``: (rows, channels · kernel) float64."""
        plane = nn.functional.unfold(x, (3, 2), padding=(1, 0), stride=(2, 1))
        y = torch.tanh(self.plane(x)).flatten(1, 2)[:, :, None]
        line = nn.functional.unfold(y, (1, 3), padding=(0, 1))
        return {"plane": plane.mT.flatten(0, 1).double(), "line": line.mT.flatten(0, 1).double()}


@pytest.mark.parametrize("method", FROM_INPUTS)
def test_a_convolution_s_inputs_are_its_patches(method, tmp_path):
    base = Convolutions().requires_grad_(False)
    x, other = torch.randn(2, 64, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=3, lora_alpha=6, target_modules=["plane", "line"]))
    data = None if METHODS[method].data == "none" else statistics_of(model, [x], keep_moments=True)
    keep = statistics_of(model, [other], keep_moments=True) if method == "sc-lora" else None
    initialize(model, data, method, keep=keep, beta=BETA)
    expected = base(x)
    allowed = 2.0**-18 * expected.abs().max()
    assert (model(x) - expected).abs().max() <= allowed
    for name, rows in base.patches(x).items():
        w, kept = base.get_submodule(name).weight.double().flatten(1), base.patches(other)[name]
        moments = [m.T @ m / len(m) for m in (rows, kept)]
        b0, a0, gap, of = FORMULAS[method](w, moments[0], 3, 2.0, kept=moments[1])
        a, b, *_ = factors_of(model, name)
        if gap > GAP * of:
            assert (b.flatten(1) @ a.flatten(1) - b0 @ a0).norm() <= 1e-3 * (b0.norm() * a0.norm())
            assert cosine(b.flatten(1), b0) >= 0.999
    if METHODS[method].base == "kept":
        return
    nn.init.ones_(model.get_submodule("base_model.model.line.lora_B.default").weight)  # trained
    with model.disable_adapter():
        assert (model(x) - expected).abs().max() <= allowed
    mixed = model.eval()(x, adapter_names=["default", "__base__"] * 32)
    assert (mixed[1::2] - expected[1::2]).abs().max() <= allowed
    assert (mixed[::2] - model(x)[::2]).abs().max() <= allowed
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(load_adapter(copy.deepcopy(base), tmp_path / "adapter")(x), model(x))
    plain = PeftModel.from_pretrained(copy.deepcopy(base), export_plain(model, tmp_path / "plain").folder)
    assert (plain(x) - model(x)).abs().max() <= 2.0**-18 * model(x).abs().max()
    assert (model.unload()(x) - expected).abs().max() <= allowed


@pytest.mark.parametrize("method", ["pissa", "milora", "mica", "corda", "sc-lora"])
def test_a_layer_of_zeros_starts_with_finite_factors(base, method):
    silent = copy.deepcopy(base).eval()
    nn.init.zeros_(silent.model.layers[0].self_attn.q_proj.weight)
    model, report = started(silent, method)
    assert report.layers["model.layers.0.self_attn.q_proj"].weight_share == 0
    a, b, weight, _ = factors_of(model, "model.layers.0.self_attn.q_proj")
    assert torch.equal(b @ a, weight)  # which are all zero
    assert b.isfinite().all()
    assert b.abs().sum() > 0  # or no gradient would reach A


@pytest.mark.parametrize("method", ["pissa", "milora", "mica", "corda"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(base, method, value):
    model = lora(copy.deepcopy(base))
    data = statistics_of(model, token_batches()) if method == "corda" else None
    model.get_base_model().model.layers[1].mlp.up_proj.weight.data[3, 3] = value
    with pytest.raises(ValueError, match=r"the weight of model\.layers\.1\.mlp\.up_proj holds NaN or Inf"):
        initialize(model, data, method)


@pytest.mark.parametrize("within", ["a layer", "a weight"])
def test_what_fails_half_way_leaves_the_model_as_it_was(base, monkeypatch, within):
    from eva_kernels import low_rank_update
    from eva_kernels.low_rank_update import reference
    from eva_lora.adapters import peft

    model = lora(copy.deepcopy(base))
    x, state = token_batches(1)[0], {name: value.clone() for name, value in model.state_dict().items()}
    calls = []

    def failing(*args, **options):
        calls.append(args)
        if len(calls) == 5:
            raise MemoryError("no more")
        return real(*args, **options)

    monkeypatch.setattr(low_rank_update, "core_runs", lambda *arguments: False)
    monkeypatch.setattr(reference, "PIECE", 4 * 32)  # eight pieces of the first weight
    where, name = (peft, "begin") if within == "a layer" else (reference, "_norm")
    real = getattr(where, name)
    monkeypatch.setattr(where, name, failing)
    with pytest.raises(MemoryError):
        initialize(model, method="pissa")
    after = model.state_dict()
    assert set(after) == set(state)
    for name, value in after.items():
        assert (value - state[name]).abs().max() <= 4 * UNIT * state[name].abs().max(), name  # there and back
    assert model.peft_config["default"].init_lora_weights is True
    assert torch.isfinite(model(**x).logits).all()


def test_quantised_bases_are_refused_by_name(base):
    class Rounded(nn.Linear):
        def __init__(self, weight):
            super().__init__(weight.shape[1], weight.shape[0], bias=False)
            self.weight = nn.Parameter((rounded(weight.detach()) * 64).to(torch.int8), requires_grad=False)

        def forward(self, x):
            return x @ (self.weight.to(x.dtype) / 64).T

    quantised = copy.deepcopy(base)
    layer = quantised.model.layers[0].self_attn
    layer.q_proj = Rounded(layer.q_proj.weight)
    model = lora(quantised)
    for method in ("pissa", "mica"):
        with pytest.raises(ValueError, match=r"q_proj cannot give part of itself to the adapter: it is quantised"):
            initialize(model, method=method)


def test_whole_moments_are_saved_with_the_statistics(base, tmp_path):
    model = lora(copy.deepcopy(base))
    statistics = statistics_of(model, token_batches(), keep_moments=True)
    assert {entry.kind for entry in statistics.inputs} == {"gram"}
    loaded = EvaStatistics.load(statistics.save(tmp_path / "statistics.safetensors"))
    rows = layer_inputs(model, token_batches())
    for site in loaded.sites:
        x = rows[site.name]
        exact = x.T @ x / len(x)
        error = (loaded.inputs[site.input].moment - exact).abs()
        scale = torch.outer(exact.diagonal().sqrt(), exact.diagonal().sqrt())
        assert (error <= 4 * gamma(len(x), torch.float64) * scale).all()  # about a shift, and back
    initialize(model, loaded, "lora-null", progress=False)
    assert eva_lora.plan(loaded).ranks


def test_the_page_s_code_does_what_it_says(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = [block.code for block in blocks("docs/methods.md") if block.language == "python"]
    assert code
    for block in code:
        names = {"model": lora(copy.deepcopy(base)), "loader": token_batches(), "base": copy.deepcopy(base)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            exec(compile(block, "methods.md", "exec"), names)


@pytest.mark.slow
def test_pissa_on_every_layer_of_a_real_model():
    real = load_minilm()
    targets = r".*encoder\.layer\.\d+\.(attention\.self\.(query|key|value)|.*\.dense)"
    model = get_peft_model(copy.deepcopy(real), LoraConfig(r=16, target_modules=targets))
    report = initialize(model, method="pissa")
    assert len(report.layers) == 36
    for name in report.layers:
        a, b, left, scaling = factors_of(model, name)
        w = real.get_submodule(name).weight.detach().double()
        s = torch.linalg.svdvals(w)
        q = torch.linalg.qr(b).Q
        assert (q.T @ w).square().sum() >= (1 - 2e-4) * s[:16].square().sum()
        assert (left + scaling * b @ a - w).abs().max() <= UNIT * left.abs().max() * (1 + 1e-6)


@pytest.mark.slow
def test_corda_on_every_layer_of_a_real_model_is_the_dense_formula():
    real, batches = load_minilm(), minilm_text_batches()[:3]
    targets = r".*encoder\.layer\.\d+\.(attention\.self\.(query|key|value)|.*\.dense)"
    for whole in (True, False):
        model = get_peft_model(copy.deepcopy(real), LoraConfig(r=16, target_modules=targets))
        statistics = statistics_of(model, batches, keep_moments=whole)
        initialize(model, statistics, "corda")
        for site in statistics.sites:
            a, b, _, scaling = factors_of(model, site.name)
            w, known = real.get_submodule(site.name).weight.detach().double(), statistics.inputs[site.input]
            parts = known.second_moment()
            eye = torch.eye(w.shape[1], dtype=w.dtype)
            r = known.moment if whole else parts.factor.double() @ parts.factor.double().T + parts.rest.double() * eye
            u, s, _ = svd(w @ r)
            wanted = u[:, :16] @ (u[:, :16].T @ w)
            # What float32 rounds off turns neighbours that differ by less than a hundredth into each other.
            if whole or s[15] - s[16] > 0.01 * s[15]:
                assert (scaling * b @ a - wanted).norm() <= 1e-6 * wanted.norm(), site.name


# --- budgets


class Chain(nn.Module):
    """Layers of different shapes, wide and narrow."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.wide = nn.Linear(6, 20, bias=False), nn.Linear(20, 3, bias=False)
        self.last = nn.Linear(3, 7)

    def forward(self, x):
        return self.last(torch.tanh(self.wide(torch.tanh(self.first(x)))))

    def scores(self, x):
        """Of each layer's directions, from its paper's decomposition: shares of ‖W‖², and of E‖W x‖²."""
        found = {}
        for name, layer in self.named_children():
            w, rows = layer.weight.double(), x.double()
            _, d, _ = svd(w)
            moment = rows.T @ rows / len(rows)
            left = svd(w @ moment)[0]
            energies = ((left.T @ w) @ moment * (left.T @ w)).sum(1)
            found[name] = d.square() / d.square().sum(), energies / energies.sum()
            x = torch.tanh(layer(x))
        return {"pissa": {n: one for n, (one, _) in found.items()}, "corda": {n: two for n, (_, two) in found.items()}}


def budgeted(method, config=None, **options):
    base, x = Chain().requires_grad_(False), torch.randn(200, 6, generator=torch.Generator().manual_seed(1))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["first", "wide", "last"]))
    scores = Chain().requires_grad_(False).scores(x)[method]
    data = statistics_of(model, [x], keep_moments=True) if method == "corda" else None
    report = initialize(model, data, method, config or EvaConfig(rho=2.0), **options)
    return model, report, {name: [0.0, *score[:4].cumsum(0).tolist()] for name, score in scores.items()}


def best(scores, allowed):
    """The most that any ranks hold among those allowed, by trying all."""
    choices = itertools.product(*(range(len(score)) for score in scores.values()))
    sums = {ranks: sum(s[rank] for s, rank in zip(scores.values(), ranks, strict=True)) for ranks in choices}
    return max(held for ranks, held in sums.items() if allowed(ranks))


@pytest.mark.parametrize("budget", [None, 1, 3, 4, 7, 11])
@pytest.mark.parametrize("method", ["pissa", "corda"])
def test_a_budget_goes_to_the_directions_that_hold_most(method, budget):
    """In any layer no more than its weight has: three in the one of three outputs, and in that of three inputs."""
    model, report, scores = budgeted(method, budget=budget)
    given = min(budget or 6, 10)
    held = sum(scores[name][rank] for name, rank in report.ranks.items())
    assert sum(report.ranks.values()) == given
    assert report.budget == (budget or 6)
    assert held == pytest.approx(best(scores, lambda ranks: sum(ranks) == given), rel=1e-6)
    for name, rank in report.ranks.items():
        layer = model.get_base_model().get_submodule(name)
        assert (layer.r["default"] if rank else 0) == rank


@pytest.mark.parametrize("parameters", [30, 51, 77, 120, 163])
@pytest.mark.parametrize("method", ["pissa", "corda"])
def test_a_budget_of_parameters_is_an_optimum_or_says_how_far_it_may_be_from_one(method, parameters):
    costs = (26, 23, 10)
    _, report, scores = budgeted(method, EvaConfig(rho=2.0, budget_parameters=parameters))
    spent = sum(rank * cost for rank, cost in zip(report.ranks.values(), costs, strict=True))
    assert spent <= parameters
    held = sum(scores[name][rank] for name, rank in report.ranks.items())
    most = best(scores, lambda ranks: sum(rank * cost for rank, cost in zip(ranks, costs, strict=True)) <= parameters)
    told = [float(re.search(r"sum to ([\d.e-]+) more", note).group(1)) for note in report.notes if "sum to" in note]
    assert held <= most * (1 + 1e-6)
    assert most <= held * (1 + 1e-6) + sum(told) * 1.05  # printed in two digits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"budget_parameters": 47},
            "expected enough for one rank of one layer, which has at least 48, got 47",
        ),
        ({"budget_parameters": 999, "min_rank": 1}, "expected at least the 1392 that a rank of 1 in every layer costs"),
        ({"budget_parameters": 2000, "min_rank": 1, "rank_multiple": 4}, "the 5568 that a rank of 1 in every layer"),
    ],
)
@pytest.mark.parametrize("method", ["eva", "corda"])
def test_parameters_that_cannot_do_are_refused_before_the_first_batch(base, method, options, message):
    def unread():
        pytest.fail("a batch was read")
        yield

    with pytest.raises(ValueError, match=message):
        initialize(lora(copy.deepcopy(base)), unread(), method, EvaConfig(**options))


def test_a_budget_may_be_less_than_configured_where_ranks_are_bounded(base):
    config = EvaConfig(max_batches=2, max_rank=2)
    report = initialize(lora(copy.deepcopy(base)), token_batches(2), "corda", config, budget=20, progress=False)
    assert (sum(report.ranks.values()), max(report.ranks.values())) == (20, 2)
    with pytest.raises(ValueError, match="budget: expected at most the 42 components"):
        initialize(lora(copy.deepcopy(base)), token_batches(2), "corda", config, budget=43, progress=False)


def test_a_budget_that_cannot_be_given_is_refused():
    for method in (name for name, row in METHODS.items() if not row.scores and row.data == "none"):
        with pytest.raises(ValueError, match=f"budget: expected None with method='{method}', whose directions have no"):
            initialize(get_peft_model(Chain(), LoraConfig(r=2, target_modules=["first"])), method=method, budget=3)
    for options, message in (
        ({"budget": 0}, "budget: expected at least 1, got 0"),
        (
            {"budget": 3, "config": EvaConfig(budget_parameters=99)},
            "budget: expected None with budget_parameters, which is the budget then",
        ),
        (
            {"budget": 3, "config": EvaConfig(rho=1.0, adjust_scaling_factors=False)},
            "adjust_scaling_factors: expected True with method='pissa' where ranks may change",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            budgeted("pissa", **options)
    with pytest.raises(ValueError, match="budget: expected None with method='eva', whose plan takes it"):
        initialize(get_peft_model(Chain(), LoraConfig(r=2, target_modules=["first"])), [], budget=3)


@pytest.mark.parametrize("method", ["eva", "pissa", "corda"])
def test_parameters_are_spent_in_place_of_ranks(base, method):
    model = lora(copy.deepcopy(base))
    whole = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    config = EvaConfig(rho=2.0, max_batches=6, budget_parameters=whole)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        data = None if method == "pissa" else token_batches()
        report = initialize(model, data, method, config, progress=False)
    spent = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert whole - 80 < spent <= whole  # a unit of rank costs 48 to 80
    assert report.budget == sum(report.ranks.values())
    assert any(f"{spent:,} of {whole:,} parameters are spent" in note for note in report.notes)
    with pytest.raises(ValueError, match="budget_parameters: expected None with method='milora'"):
        initialize(lora(copy.deepcopy(base)), method="milora", config=EvaConfig(rho=1.0, budget_parameters=5))
