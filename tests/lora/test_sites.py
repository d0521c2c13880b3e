"""Sites: one's own layers registered or passed, and how inputs become rows."""

import copy

import pytest
import torch
from torch import nn

from eva_lora import EvaConfig, LoraSite, ParameterSite, apply, collect, eva_initialize, plan, register_adapter
from eva_lora.adapters import sites as sites_module
from eva_lora.adapters.sites import Patches
from support.bounds import EXACT_CAPTURES, UNIT_ROUNDOFF, gamma, product_rounding
from support.models import captured_share, scatter

pytestmark = pytest.mark.filterwarnings("ignore:EVA stopped at")


class PlainLora(nn.Module):
    """A linear layer and a LoRA, as people write it."""

    def __init__(self, width, out, rank=4):
        super().__init__()
        self.base = nn.Linear(width, out)
        self.A = nn.Parameter(torch.randn(rank, width))
        self.B = nn.Parameter(torch.randn(out, rank))

    def forward(self, x):
        return self.base(x) + x @ self.A.T @ self.B.T


class Net(nn.Module):
    def __init__(self, layer=PlainLora):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = layer(12, 16), layer(12, 16), layer(16, 5)

    def forward(self, x):
        return self.third(torch.tanh(self.first(x) + self.second(x)))


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr("eva_lora.adapters._registered", [])


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(40, 12, generator=generator) * 3 * 0.35 ** torch.arange(12) for _ in range(3)]


def base_outputs(net, x):
    """Without the LoRA, from the base weights alone."""
    with torch.no_grad():
        hidden = torch.tanh(net.first.base(x) + net.second.base(x))
        return hidden, net.third.base(hidden)


def sites_of(net, **options):
    return [ParameterSite.of(n, m, **options) for n, m in net.named_modules() if isinstance(m, PlainLora)]


def assert_initialised(net, batches, report):
    x = torch.cat(batches).double()
    hidden = torch.cat([base_outputs(net, b)[0] for b in batches]).double()
    for name, rows in (("first", x), ("second", x), ("third", hidden)):
        layer = net.get_submodule(name)
        assert layer.A.shape[0] == layer.B.shape[1] == report.ranks[name]
        assert captured_share(layer.A.detach(), scatter(rows)) >= EXACT_CAPTURES
        assert not layer.B.any()
    assert len(set(report.ranks.values())) > 1
    assert sum(report.ranks.values()) == 12
    with torch.no_grad():
        assert torch.equal(net(batches[0]), base_outputs(net, batches[0])[1])


def test_a_registered_adapter_is_found(registry, batches):
    @register_adapter
    def find(model):
        return [ParameterSite.of(name, m) for name, m in model.named_modules() if isinstance(m, PlainLora)]

    net = Net()
    report = eva_initialize(net, batches, EvaConfig(max_batches=3, tau=1.0), overwrite=True, progress=False)
    assert report.shared_inputs == [["first", "second"]]
    assert_initialised(net, batches, report)
    optimizer = torch.optim.SGD([net.first.A, net.first.B, net.third.B], lr=0.1)
    net(batches[0]).square().mean().backward()
    optimizer.step()
    assert net.third.B.any()


def test_what_was_registered_last_is_asked_first(registry, batches):
    asked = []
    for name in ("one", "two"):
        register_adapter(lambda model, name=name: asked.append(name) or (sites_of(model) if name == "one" else None))
    eva_initialize(Net(), batches, EvaConfig(max_batches=2), overwrite=True, progress=False)
    assert asked[:2] == ["two", "one"]


def test_what_a_registered_function_returns_is_checked(registry, batches):
    register_adapter(lambda model: iter(sites_of(model)))
    with pytest.raises(
        TypeError, match=r"^register_adapter: expected .* to return a list of sites, .* got list_iterator"
    ):
        eva_initialize(Net(), batches, progress=False)


def test_sites_can_be_passed(batches):
    net = Net()
    sites = sites_of(net)
    report = eva_initialize(
        net, batches, EvaConfig(max_batches=3, tau=1.0), sites=sites, overwrite=True, progress=False
    )
    assert_initialised(net, batches, report)


def test_three_steps_with_sites(batches, tmp_path):
    net = Net()
    statistics = collect(net, batches, EvaConfig(max_batches=3, tau=1.0), sites=sites_of(net), progress=False)
    eva_plan = plan(type(statistics).load(statistics.save(tmp_path / "statistics")), budget=9)
    apply(net, eva_plan, sites=sites_of(net), overwrite=True)
    assert {n: m.A.shape[0] for n, m in net.named_modules() if isinstance(m, PlainLora)} == eva_plan.ranks


def test_the_pass_sees_the_base_and_leaves_b_as_it_was(batches):
    net = Net()
    before = copy.deepcopy(net.state_dict())
    seen = []

    def forward(model, x):
        seen.append(torch.equal(model(x), base_outputs(model, x)[1]))
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(net, batches, forward_fn=forward, sites=sites_of(net), progress=False)
    assert seen == [True, True]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


class Scaled(nn.Module):
    """Factors as layers or transposed, and the scaling kept in attributes."""

    def __init__(self, width, out, rank=4):
        super().__init__()
        self.base = nn.Linear(width, out)
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, out, bias=False)
        self.left = nn.Parameter(torch.randn(width, rank).bfloat16())
        self.right = nn.Parameter(torch.zeros(rank, out).bfloat16(), requires_grad=False)
        self.rank, self.alpha, self.scaling = rank, 8, 2.0

    def forward(self, x):
        return self.base(x) + self.scaling * self.up(self.down(x))


@pytest.mark.parametrize("adjust", [True, False])
def test_layers_as_factors_and_scalings_in_attributes(batches, adjust):
    net = Net(Scaled)
    sites = [
        ParameterSite.of(n, m, "down.weight", "up.weight", rank="rank", alpha="alpha", scaling="scaling")
        for n, m in net.named_children()
    ]
    config = EvaConfig(max_batches=3, adjust_scaling_factors=adjust)
    eva_plan = plan(collect(net, batches, config, sites=sites, progress=False), budget=10)
    apply(net, eva_plan, sites=sites, overwrite=True)
    assert len(set(eva_plan.ranks.values())) > 1
    for name, rank in eva_plan.ranks.items():
        layer = net.get_submodule(name)
        assert (layer.down.out_features, layer.up.in_features, layer.rank) == (rank, rank, rank)
        assert layer.alpha == (2 * rank if adjust else 8)
        assert layer.scaling == pytest.approx(2.0 if adjust else 8 / rank)
    net(batches[0]).mean().backward()


def test_transposed_factors_keep_their_dtype_and_what_is_trained(batches):
    net = Net(Scaled)
    sites = [ParameterSite.of(n, m, "left", "right", transposed=True) for n, m in net.named_children()]
    report = eva_initialize(net, batches, EvaConfig(max_batches=3, tau=1.0), sites=sites, progress=False)
    x = torch.cat(batches).double()
    for name in ("first", "second"):
        layer = net.get_submodule(name)
        assert layer.left.shape == (12, report.ranks[name])
        assert (layer.left.dtype, layer.left.requires_grad, layer.right.requires_grad) == (torch.bfloat16, True, False)
        turned = report.ranks[name] * UNIT_ROUNDOFF[torch.bfloat16] ** 2  # Σ sin², of rows that are rounded
        assert captured_share(layer.left.detach().T.float(), scatter(x)) >= EXACT_CAPTURES - turned


def test_ranks_are_multiples_of_the_divisor_of_their_site(batches):
    net = Net()
    sites = [ParameterSite.of(n, m, rank_multiple=k) for (n, m), k in zip(net.named_children(), (3, 1, 2), strict=True)]
    report = eva_initialize(
        net, batches, EvaConfig(max_batches=3, tau=1.0), sites=sites, overwrite=True, progress=False
    )
    assert report.ranks["first"] % 3 == 0
    assert report.ranks["third"] % 2 == 0


def test_layers_that_cannot_be_emptied_keep_a_rank(batches):
    net = Net()
    statistics = collect(net, batches, EvaConfig(max_batches=3, tau=1.0), sites=sites_of(net), progress=False)
    assert set(plan(statistics, budget=3).ranks.values()) == {1}
    with pytest.raises(ValueError, match=r"^budget: expected at least the 3 components"):
        plan(statistics, budget=2)


def test_a_failing_write_changes_nothing(batches, monkeypatch):
    net = Net()
    eva_plan = plan(collect(net, batches, EvaConfig(max_batches=2), sites=sites_of(net), progress=False), budget=9)
    before, ids = copy.deepcopy(net.state_dict()), [id(p) for p in net.parameters()]
    original, calls = ParameterSite.write, []

    def sometimes(self, *args, **options):
        calls.append(self)
        if len(calls) == 3:
            raise MemoryError
        original(self, *args, **options)

    monkeypatch.setattr(ParameterSite, "write", sometimes)
    with pytest.raises(MemoryError):
        apply(net, eva_plan, sites=sites_of(net), overwrite=True)
    assert [id(p) for p in net.parameters()] == ids
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda net: 3, TypeError, r"^sites: expected a list of LoraSite, got int"),
        (lambda net: [net], TypeError, r"^sites: expected a list of LoraSite, got \['Net'\]"),
        (lambda net: [], ValueError, r"^sites: expected at least one"),
        (lambda net: sites_of(net)[:1] * 2, ValueError, r"^sites: expected unique names, got \['first'\] twice"),
        (
            lambda net: [ParameterSite.of("first", net.first, "A", "base.weight")],
            ValueError,
            r"^layer first: expected A and base\.weight of one rank, got 4 and 12",
        ),
        (
            lambda net: [ParameterSite.of("first", net.first, "C")],
            ValueError,
            r"^layer first: expected a parameter C, a Pl",
        ),
        (lambda net: [ParameterSite.of("first", net.first, "base")], TypeError, r"^layer first: .* got Linear"),
        (lambda net: [ParameterSite.of("first", net.first, "base.bias")], TypeError, r"^layer first: .* got shape"),
    ],
)
def test_wrong_sites_are_named_before_any_forward(batches, make, error, message):
    net = Net()
    net.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass ran"))
    with pytest.raises(error, match=message):
        eva_initialize(net, batches, sites=make(net), progress=False)


def test_sites_that_can_only_be_watched_are_refused_for_writing(batches):
    net = Net()
    sites = [LoraSite(n, m, m.base.in_features, 2) for n, m in net.named_children()]
    statistics = collect(net, batches, EvaConfig(max_batches=2), sites=sites, progress=False)
    with pytest.raises(TypeError, match=r"^sites: expected ParameterSite, which can be written, got \['LoraSite'\]"):
        apply(net, plan(statistics), sites=sites)
    net.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass ran"))
    with pytest.raises(TypeError, match=r"^sites: expected ParameterSite"):
        eva_initialize(net, batches, sites=sites, progress=False)


@pytest.mark.parametrize("piece", [1, 100, 10**6])
@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (nn.Conv1d(3, 5, 4, stride=2, padding=1), (5, 3, 17)),
        (nn.Conv1d(2, 5, 3, padding="same", dilation=2), (3, 2, 9)),
        (nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 0)), (4, 3, 9, 8)),
        (nn.Conv2d(3, 5, 1), (4, 3, 5, 6)),
        (nn.Conv2d(2, 5, 3, padding=1, padding_mode="circular"), (2, 2, 6, 6)),
        (nn.Conv2d(3, 5, 3), (3, 9, 8)),
        (nn.Conv3d(2, 5, (2, 3, 1), stride=2, padding=1), (2, 2, 6, 5, 4)),
    ],
    ids=["1d", "1d dilated, same", "2d", "1x1", "circular", "without batch", "3d"],
)
def test_patches_are_what_the_convolution_sees(monkeypatch, conv, shape, piece):
    """Rows times the flattened weight are the convolution's own output, and no piece is larger than it may be."""
    monkeypatch.setattr(sites_module, "PIECE_ELEMENTS", piece)
    x, rows = torch.randn(shape, dtype=torch.float64), Patches.of(conv)
    conv = conv.double()
    pieces = list(rows.pieces(x))
    expected = conv(x if x.ndim > len(conv.kernel_size) + 1 else x[None])
    assert rows.shape(x) == (expected.shape[0], *expected.shape[2:])
    weight = conv.weight.flatten(1)
    assert rows.width == weight.shape[1]
    got = torch.cat(pieces) @ weight.T + conv.bias
    allowed = 2 * gamma(rows.width + 1, torch.float64) * (torch.cat(pieces).abs() @ weight.abs().T + conv.bias.abs())
    assert ((got - expected.movedim(1, -1).reshape(-1, 5)).abs() <= allowed).all()
    line = rows.width * torch.Size(expected.shape[3:]).numel()
    assert max(p.numel() for p in pieces) <= max(piece, line)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.wide_too = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.point, self.point_too = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.wide(x) + self.wide_too(x) + self.point(x) + self.point_too(x)


def test_convolutions_share_an_input_only_if_they_make_the_same_patches():
    import peft

    names = ["wide", "wide_too", "point", "point_too"]
    model = peft.get_peft_model(Branches(), peft.LoraConfig(r=2, target_modules=names))
    data = [torch.randn(3, 3, 6, 6) for _ in range(2)]
    report = eva_initialize(model, data, EvaConfig(max_batches=2), progress=False)
    assert report.shared_inputs == [["wide", "wide_too"], ["point", "point_too"]]
    alone = peft.get_peft_model(Branches(), peft.LoraConfig(r=2, target_modules=names))
    alone.load_state_dict(alone.state_dict())
    unshared = eva_initialize(alone, data, EvaConfig(max_batches=2, share_inputs=False), progress=False)
    assert unshared.shared_inputs == []
    for name in names:
        ours, theirs = report.explained_variance_ratio[name], unshared.explained_variance_ratio[name]
        assert ours == pytest.approx(theirs, rel=0, abs=2 * product_rounding("reference", 2 * 3 * 6 * 6, 3 * 3 * 3))


def test_a_token_mask_reaches_the_rows_of_a_convolution_over_tokens():
    import peft

    class Speech(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(6, 4, 3, padding=1)

        def forward(self, x, attention_mask):
            return self.conv(x)

    x, mask = torch.randn(5, 6, 12), torch.rand(5, 12) < 0.6
    x.copy_(torch.where(torch.nn.functional.max_pool1d(mask[:, None].float(), 3, 1, 1) > 0, x, float("nan")))
    model = peft.get_peft_model(Speech(), peft.LoraConfig(r=3, target_modules=["conv"]))
    report = eva_initialize(model, [{"x": x, "attention_mask": mask}], EvaConfig(max_batches=1), progress=False)
    assert report.num_rows == int(mask.sum())
    seen = nn.functional.unfold(nn.functional.pad(x, (1, 1))[:, :, None], (1, 3)).movedim(1, 2)[mask]
    a = model.base_model.model.conv.lora_A["default"].weight.detach().flatten(1)
    assert captured_share(a, scatter(seen.double())) >= EXACT_CAPTURES
