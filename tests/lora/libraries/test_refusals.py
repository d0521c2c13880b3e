"""What EVA refuses of other libraries' LoRA layers, leaves out, or undoes; nothing is changed by an error."""

import copy

import loralib
import pytest
import torch
from torch import nn

from eva_lora import EvaConfig, apply, collect, eva_initialize, plan
from support import grouped_experts, layout_kinds
from support.bounds import product_rounding
from support.grouped_experts import GROUPED_EXPERTS
from support.layout_kinds import _LoRALayer
from support.other_kinds import LAYOUTS, ConvNet, Net, images, loralib_linear, sequences

pytestmark = pytest.mark.filterwarnings("ignore:EVA stopped at")


@pytest.fixture
def lycoris():
    return pytest.importorskip("lycoris", reason="lycoris is not installed")


def steep():
    """Inputs so steep that ranks move to the third layer, which sees what a nonlinearity made of them."""
    return [batch * 0.4 ** torch.arange(24) for batch in sequences()]


def initialise(model, batches=None, **options):
    return eva_initialize(model, batches or steep(), EvaConfig(max_batches=2, **options), progress=False)


def with_layers(make, base=None):
    model = Net() if base is None else base
    for name, layer in list(model.named_children()):
        made = make(layer)
        if made is not None:
            model.add_module(name, made)
    return model


def test_a_merged_adapter_is_refused_until_it_is_taken_out():
    model = with_layers(loralib_linear)
    for layer in model.children():
        nn.init.normal_(layer.lora_B)
    model.eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"^model: the adapter of first is merged .* model\.train\(\) takes it out"):
        initialise(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.train()
    with pytest.raises(
        ValueError, match=r"^model: its adapter was trained: B is not zero in 3 of 3 layers, .* first\."
    ):
        initialise(model)
    eva_initialize(model, steep(), EvaConfig(max_batches=2), overwrite=True, progress=False)


def test_merging_nothing_is_no_obstacle():
    """A new loralib model that was put in eval mode is "merged": B = 0 was added."""
    model, base = with_layers(loralib_linear).eval(), Net()
    initialise(model)
    assert all(layer.merged and not layer.training for layer in model.children())
    x = sequences()[0]
    with torch.no_grad():
        assert torch.equal(model.train()(x), base(x))
        assert torch.equal(model.eval()(x), base(x))


def test_the_pass_does_not_merge():
    model = with_layers(loralib_linear)
    for layer in model.children():
        nn.init.normal_(layer.lora_B)
    before = copy.deepcopy(model.state_dict())
    collect(model, sequences(), EvaConfig(max_batches=2), progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(layer.training and not layer.merged for layer in model.children())


def test_loralib_convolutions_that_cannot_run_are_refused():
    model = nn.Sequential(loralib.Conv1d(4, 6, 3, r=2))
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 4, 9))  # loralib's own error
    with pytest.raises(ValueError, match=r"^model: loralib's adapter of 0 cannot run: B A has 18 x 12 values"):
        initialise(model, [torch.randn(2, 4, 9)])


def test_embeddings_are_left_out_and_named():
    model = nn.Sequential(loralib.Embedding(20, 8, r=2), loralib.Linear(8, 5, r=2))
    with pytest.warns(UserWarning, match="0: an embedding's input is token numbers"):
        report = initialise(model, [torch.randint(0, 20, (4, 30)) for _ in range(2)])
    assert list(report.ranks) == ["1"]


def test_nothing_but_layers_that_are_left_out_is_an_error():
    with pytest.raises(ValueError, match=r"^model: EVA applies to none of its LoRA layers: .*token numbers"):
        initialise(nn.Sequential(loralib.Embedding(20, 8, r=2)), [torch.zeros(2, 3, dtype=torch.long)])


def test_a_scalar_that_begins_with_0_is_refused(lycoris):
    model = Net()
    lycoris.LoConModule("name", model.first, 1.0, 4, 8, use_scalar=True).apply_to()
    with pytest.raises(ValueError, match=r"^model: LoRA layer first has use_scalar"):
        initialise(model)


def test_updates_that_are_no_two_matrices_are_left_out(lycoris):
    model = ConvNet()
    lycoris.LoConModule("one", model.first, 1.0, 4, 8, use_tucker=True).apply_to()
    lycoris.LoConModule("two", model.second, 1.0, 4, 8).apply_to()
    with pytest.warns(UserWarning, match="first: the Tucker core lora_mid"):
        initialise(model, images())
    model = Net()
    lycoris.LohaModule("one", model.first, 1.0, 4, 8).apply_to()
    lycoris.LoConModule("two", model.second, 1.0, 4, 8).apply_to()
    with pytest.warns(UserWarning, match="first: the update of a LohaModule is no product"):
        report = initialise(model)
    assert list(report.ranks) == ["second"]


def test_parameters_outside_of_the_model_are_found_in_optimizers(lycoris):
    model = Net()
    network = lycoris.LoConModule("one", model.first, 1.0, 4, 8)
    network.apply_to()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"^model: an optimizer already holds A or B of first"):
        initialise(model)
    del optimizer
    initialise(model)


@pytest.mark.parametrize("adjust", [True, False])
def test_integer_division_keeps_its_scaling_or_is_refused(adjust):
    model = with_layers(lambda base: _LoRALayer(base, r=4, alpha=5))
    statistics = collect(model, steep(), EvaConfig(max_batches=2), progress=False)
    before = {name: layer.alpha // layer.r for name, layer in model.named_children()}
    eva_plan = plan(statistics, EvaConfig(adjust_scaling_factors=adjust))
    grown = max(eva_plan.ranks.values())
    assert grown > 5
    if adjust:
        apply(model, eva_plan)
        assert {name: layer.alpha // layer.r for name, layer in model.named_children()} == before
        return
    state, ranks = copy.deepcopy(model.state_dict()), {layer.r for layer in model.children()}
    with pytest.raises(ValueError, match=r"its scaling alpha // rank would be 0 with alpha 5 and rank"):
        apply(model, eva_plan)
    assert {layer.r for layer in model.children()} == ranks == {4}
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_scaling_that_is_0_already_is_refused():
    with pytest.raises(ValueError, match=r"^layer first: its scaling alpha // rank would be 0 with alpha 3 and rank 4"):
        initialise(with_layers(lambda base: _LoRALayer(base, r=4, alpha=3)))


def test_ranks_of_split_adapters_divide_by_the_workers():
    model = with_layers(layout_kinds.MegatronLoRALinear)
    for layer in model.children():
        layer.adapter.config = type("Config", (), {"tensor_model_parallel_size": 2})()
    report = initialise(model)
    assert sum(report.ranks.values()) == 12
    assert all(rank % 2 == 0 for rank in report.ranks.values())


def test_adapters_that_are_split_already_are_refused():
    model = with_layers(layout_kinds.MegatronLoRALinear)
    model.first.adapter.dim = 8
    with pytest.raises(ValueError, match=r"^model: A of first\.adapter has 4 of its 8 rows in this process"):
        initialise(model)


SCALED = {"loralib Linear": "scaling", "NeMo Automodel": "scale", "torchtitan": "_lora_scaling"}


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("adjust", [True, False])
def test_scalings(name, adjust):
    make = loralib_linear if name == "loralib Linear" else next(kind.layer for kind in LAYOUTS if kind.name == name)
    model = with_layers(make)
    report = initialise(model, adjust_scaling_factors=adjust)
    assert len(set(report.ranks.values())) > 1
    for layer_name, layer in model.named_children():
        expected = 2.0 if adjust else 8 / report.ranks[layer_name]
        assert getattr(layer, SCALED[name]) == pytest.approx(expected)


@pytest.mark.parametrize("options", [{}, {"rs_lora": True}])
@pytest.mark.parametrize("adjust", [True, False])
def test_lycoris_scalings_are_those_of_a_module_of_that_rank_and_of_the_saved_file(lycoris, options, adjust):
    model = Net()
    networks = {name: lycoris.LoConModule(name, layer, 1.0, 4, 8, **options) for name, layer in model.named_children()}
    scale = networks["first"].scale
    for network in networks.values():
        network.apply_to()
    report = initialise(model, adjust_scaling_factors=adjust)
    assert len(set(report.ranks.values())) > 1
    for name, network in networks.items():
        fresh = lycoris.LoConModule(name, Net().get_submodule(name), 1.0, report.ranks[name], 8, **options)
        assert network.scale == pytest.approx(scale if adjust else fresh.scale)
        assert float(network.alpha) / network.lora_dim == pytest.approx(network.scale)  # how a file is read
        assert network.lora_dim == network.lora_down.weight.shape[0] == report.ranks[name]


def test_experts_share_one_alpha_so_ranks_move_only_with_it_adjusted():
    model = GROUPED_EXPERTS.model()
    before = copy.deepcopy(model.state_dict())
    config = EvaConfig(max_batches=2, adjust_scaling_factors=False)
    statistics = collect(model, GROUPED_EXPERTS.batches(), config, progress=False)
    with pytest.raises(ValueError, match=r"^plan: experts\.down_proj cannot keep alpha while its rank goes"):
        apply(model, plan(statistics, budget=7))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    apply(model, plan(statistics, EvaConfig(rho=1.0, adjust_scaling_factors=False)))
    assert not torch.equal(model.experts.lora_down_a, before["experts.lora_down_a"])
    assert (model.experts.rank, model.experts.alpha) == (4, 8.0)


def test_merged_experts_are_refused():
    model = GROUPED_EXPERTS.model()
    model.experts.merged = True
    nn.init.normal_(model.experts.lora_up_b)
    with pytest.raises(ValueError, match=r"^model: the adapter of experts\.gate_up_proj is merged"):
        initialise(model, GROUPED_EXPERTS.batches())


def test_masked_tokens_reach_no_expert():
    """The routed rows of unmasked tokens alone count, wherever the routing takes them."""
    batches = GROUPED_EXPERTS.batches()
    mask = torch.rand(batches[0].shape[:2], generator=torch.Generator().manual_seed(1)) < 0.6

    def with_outliers(batch):
        return torch.where(mask[..., None], batch, 1e3 * batch.flip(-1))

    reports = [
        eva_initialize(model, loader, EvaConfig(max_batches=3), row_mask_fn=fn, progress=False)
        for model, loader, fn in (
            (GROUPED_EXPERTS.model(), [with_outliers(b) for b in batches], lambda _: mask),
            (GROUPED_EXPERTS.model(), [b[mask][None] for b in batches], None),
        )
    ]
    masked, dropped = reports
    assert masked.num_rows == dropped.num_rows == int(mask.sum()) * 3
    for name, ratios in dropped.explained_variance_ratio.items():
        rounding = 2 * product_rounding("reference", masked.num_rows * grouped_experts.TOP_K, len(ratios))
        assert masked.explained_variance_ratio[name] == pytest.approx(ratios, rel=0, abs=rounding)
    expert_rows = [report.statistic["experts.down_proj"]["expert_rows"] for report in reports]
    assert expert_rows[0] == expert_rows[1]
    assert sum(expert_rows[0]) == grouped_experts.TOP_K * masked.num_rows
