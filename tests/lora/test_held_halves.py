"""Layers whose base weight stays as it is while A and B start from part of it: ordinary LoRAs for their libraries."""

import copy
import pickle

import peft
import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from eva_lora import EvaConfig, collect, export_plain, initialize
from support.kinds import Kind, call
from support.other_kinds import INSTALLED, Net, loralib_linear, lycoris_layer, patcher, sequences
from support.peft_kinds import EXPERTS, KINDS, LLAMA, STACKED_EXPERTS
from support.versions import needs

SMALL = 2.0**-18  # of the largest output: for a forward with other products of the same numbers, in float32
NAMES = ("MultiheadAttention", "experts of Mixtral", "parameters of Linear and of a router")
PEFTS = [kind.parameter() for kind in KINDS if kind.name in NAMES]
PEFTS += [
    Kind(option, **LLAMA, options={"target_modules": ["q_proj"], option: True}).parameter()
    for option in ("use_dora", "lora_bias")
]


def outputs(model, batch):
    with torch.no_grad():
        return call(model, batch)


def near(one, other):
    return (one - other).abs().max() <= SMALL * other.abs().max()


def trained(model, batch, steps=3):
    """Trained with what would shrink parameters that get no gradient."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        call(model, batch).float().square().mean().backward()
        optimizer.step()
    return model


def squares(model, batch):
    return model(batch).square().mean()


def halves(state):
    """What is held of each A and B, which are the second halves along their ranks."""
    found = {}
    for name, value in state.items():
        if "experts" not in name and ".lora_A." in name:
            found[name] = value.chunk(2, 0)[1].clone()
        if "experts" not in name and ".lora_B." in name and value.ndim > 1:
            found[name] = value.chunk(2, 1)[1].clone()
    return found


@pytest.mark.parametrize("kind", PEFTS)
def test_of_peft_they_train_switch_off_copy_save_load_and_merge(kind, tmp_path):
    base, batch = kind.base().eval(), kind.batches()[0]
    expected, model = outputs(base, batch), kind.model().eval()
    initialize(model, method="pissa")
    parameters = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    assert parameters == {name: p.shape for name, p in kind.model().named_parameters() if p.requires_grad}
    held = halves(model.state_dict())
    mine = outputs(trained(model, batch), batch)
    assert not near(mine, expected)
    after = halves(model.state_dict())
    assert all(torch.equal(value, after[name]) for name, value in held.items())
    with model.disable_adapter():
        assert near(outputs(model, batch), expected)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert near(outputs(other, batch), mine)
        before = outputs(other, batch)
        trained(other, batch, steps=1)  # its own parameters, not the first one's
        assert not torch.equal(outputs(other, batch), before)
    kind.save(model, None, tmp_path)
    assert near(outputs(kind.reload(tmp_path).eval(), batch), mine)  # PeftModel.from_pretrained, on the base as it was
    again = kind.model().eval()
    initialize(again, method="milora")
    again.load_adapter(tmp_path, "default", is_trainable=True)  # as trainers resume
    assert near(outputs(again, batch), mine)
    if kind.name != "lora_bias":  # which PEFT does not merge into layers without a bias
        merged = model.merge_and_unload()
        assert (outputs(merged, batch) - mine).abs().max() <= 2.0**-16 * mine.abs().max()


@pytest.mark.parametrize("kind", [*PEFTS, *(kind.parameter() for kind in KINDS if kind.name in ("Linear", "Conv2d"))])
def test_mica_saves_and_loads_also_where_peft_does_not_know_it(kind, tmp_path):
    batch, model = kind.batches()[0], kind.model().eval()
    initialize(model, method="mica")
    assert not any("lora_B" in name and "bias" not in name for name, p in model.named_parameters() if p.requires_grad)
    mine = outputs(trained(model, batch), batch)
    kind.save(model, None, tmp_path)
    assert near(outputs(kind.reload(tmp_path).eval(), batch), mine)


class Narrow(nn.Module):
    """Linear layers of fewer directions than twice the rank; one has another module's weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head, self.other = nn.Linear(16, 3), nn.Linear(3, 16, bias=False), nn.Embedding(16, 3)
        self.other.weight = self.head.weight

    def forward(self, x):
        return self.head(torch.tanh(self.first(x)))


def narrow():
    return peft.get_peft_model(Narrow(), peft.LoraConfig(r=3, lora_alpha=6, target_modules=["first", "head"]))


def deltas(model):
    """Module or parameter → ΔW of each of its matrices, (out, in) float64."""
    found = {}
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            a, b = (getattr(layer, f"lora_{which}")["default"].weight.detach().double() for which in "AB")
            experts = getattr(layer, "num_experts", 1)
            pairs = zip(a.chunk(experts), (b[:, e::experts] for e in range(experts)), strict=True)
            found[path] = [layer.scaling["default"] * second @ first for first, second in pairs]
    return found


@pytest.mark.parametrize("kind", [*PEFTS, "few directions"])
def test_cut_down_they_are_the_nearest_of_that_rank_and_say_what_is_lost(kind, tmp_path):
    """Against full singular value decompositions of ΔW in float64; float32 rounds what factors were summed of."""
    if kind == "few directions":
        base, model, batch, rank = Narrow, narrow(), torch.randn(5, 16), 5
    else:
        base, model, batch, rank = kind.base, kind.model().eval(), kind.batches()[0], 3
    initialize(model, method="pissa")
    trained(model, batch)
    if getattr(kind, "name", "") == "use_dora":
        with pytest.raises(ValueError, match="lora_magnitude_vector is no part of a sum of products B A"):
            export_plain(model, tmp_path, rank=rank)
        assert not (tmp_path / "adapter_config.json").exists()
        return
    whole = export_plain(model, tmp_path / "whole")
    assert set(whole.errors.values()) == {0.0}
    assert near(outputs(peft.PeftModel.from_pretrained(base(), whole.folder).eval(), batch), outputs(model, batch))
    plain = export_plain(model, tmp_path / "small", rank=rank)
    loaded = peft.PeftModel.from_pretrained(base(), plain.folder)
    squares = {}
    for (path, all_of_it), cut in zip(deltas(model).items(), deltas(loaded).values(), strict=True):
        name = path.removesuffix(".base_layer.out_proj").replace(".base_layer", "")
        layer = model.get_base_model().get_submodule(path)
        name += f".{layer.parameter_name}" if hasattr(layer, "parameter_name") else ""
        assert plain.ranks[name] == min(rank, *all_of_it[0].shape)
        size = layer.scaling["default"] * layer.lora_A["default"].weight.norm() * layer.lora_B["default"].weight.norm()
        for wanted, got in zip(all_of_it, cut, strict=True):
            s = torch.linalg.svdvals(wanted)
            assert (wanted - got).norm() <= s[rank:].norm() + 4 * 2.0**-24 * size
            sums = squares.setdefault(name, [0.0, 0.0])
            sums[0], sums[1] = sums[0] + s[rank:].square().sum(), sums[1] + s.square().sum()
    assert plain.errors == pytest.approx({name: float((a / b) ** 0.5) for name, (a, b) in squares.items()}, abs=1e-6)
    model.save_pretrained(tmp_path / "adapter")
    if model.peft_config["default"].target_parameters:
        with pytest.raises(ValueError, match="whose ranks it does not tell; load it and pass the model"):
            export_plain(tmp_path / "adapter", tmp_path / "again", rank=rank)
    else:
        assert export_plain(tmp_path / "adapter", tmp_path / "again", rank=rank).errors == plain.errors


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(torch.tanh(self.embedding(x)))


def tied():
    return peft.get_peft_model(Tied(), peft.LoraConfig(r=2, lora_alpha=4, target_modules=["head"]))


def test_a_weight_that_another_module_shares_stays_as_it_is():
    model, x = tied(), torch.arange(12)[None]
    expected = Tied()(x)
    report = initialize(model, method="pissa")
    assert near(outputs(model, x), expected)
    assert torch.equal(model.get_base_model().embedding.weight, Tied().embedding.weight)
    assert any("another module has the same weight" in note for note in report.notes)
    assert "stays as it is" in str(report)
    assert report.ranks == {"head": 2}


def test_two_on_one_base_are_right():
    model, x = tied(), torch.arange(12)[None]
    initialize(model, method="pissa")
    first = outputs(trained(model, x), x)
    model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=4, target_modules=["head"]))
    model.set_adapter("other")
    initialize(model, method="milora")
    assert near(outputs(model, x), Tied()(x))
    model.set_adapter("default")
    assert torch.equal(outputs(model, x), first)


def test_what_would_be_wrong_is_refused(tmp_path):
    model, ordinary, another = tied(), tied(), tied()
    ordinary.save_pretrained(tmp_path / "ordinary")
    for each in (model, another):
        initialize(each, method="pissa")
    another.save_pretrained(tmp_path / "another")
    with pytest.raises(ValueError, match="half of A and B of head is held"):
        initialize(model, method="milora", overwrite=True)
    with pytest.raises(
        ValueError, match=r"lora_A\.default\.weight: expected shape \(4, 8\), half of it what this started"
    ):
        model.load_adapter(tmp_path / "ordinary", "default")
    with pytest.raises(RuntimeError, match="size mismatch"):
        ordinary.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="adapter 'default' cannot be swapped in place: half of A and B is held"):
        hotswap_adapter(model, tmp_path / "another", "default")


@needs(STACKED_EXPERTS)
def test_ranks_move_by_what_all_experts_of_a_layer_hold_and_removed_layers_are_left(tmp_path):
    (kind,) = (kind for kind in KINDS if kind.name == "experts of Mixtral")
    base, batch = kind.base().eval(), kind.batches()[0]
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=[], target_parameters=EXPERTS)
    model = peft.get_peft_model(kind.base(), config).eval()
    with torch.no_grad():  # one layer whose first directions hold least, which will be given none
        for each in (base, model.get_base_model()):
            flat = next(p for name, p in each.named_parameters() if "layers.1" in name and "down_proj" in name)
            flat.copy_(torch.eye(*flat.shape[1:]).expand_as(flat))
    report = initialize(model, method="pissa", config=EvaConfig(rho=2.0))
    shares = {}
    for name in report.layers:
        stack = base.get_parameter(name).double()  # (experts, out, in)
        squares = torch.linalg.svdvals(stack).square()
        shares[name] = (squares.sum(0) / squares.sum())[:4]
    least = torch.cat([*shares.values()]).sort().values[-8]
    assert report.ranks == {name: int((share >= least).sum()) for name, share in shares.items()}
    assert 0 in report.ranks.values()
    for name, layer in report.layers.items():
        assert layer.weight_share == pytest.approx(float(shares[name][: layer.rank].detach().sum()), rel=1e-5)
    expected = outputs(base, batch)
    assert near(outputs(model, batch), expected)
    mine = outputs(trained(model, batch), batch)
    model.save_pretrained(tmp_path)
    assert near(outputs(peft.PeftModel.from_pretrained(base, tmp_path).eval(), batch), mine)


@needs(STACKED_EXPERTS)
@pytest.mark.parametrize("method", ["corda", "sc-lora"])
def test_what_is_captured_of_experts_is_of_all_their_tokens_together(method):
    (kind,) = (kind for kind in KINDS if kind.name == "experts of Mixtral")
    base, batches = kind.base().eval(), kind.batches()
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=[], target_parameters=EXPERTS)
    model = peft.get_peft_model(kind.base(), config).eval()
    known, kept = (
        collect(model, some, EvaConfig(rho=1.0, tau=1.0, max_batches=len(some)), progress=False)
        for some in (batches, batches[:1])
    )
    report = initialize(model, known, method, keep=kept if method == "sc-lora" else None)
    shares = [("output_share", known)] + ([("kept_share", kept)] if method == "sc-lora" else [])
    for which, statistics in shares:
        for site in statistics.sites:
            path, _, name = site.name.rpartition(".")
            layer = model.get_base_model().get_submodule(path)
            while layer.parameter_name != name:
                layer = layer.base_layer
            b = layer.lora_B["default"].weight.detach().double().view(-1, 4, 4)[:, :2]  # of it the half that is trained
            part = whole = 0.0
            for expert, index in enumerate(site.inputs):
                if index < 0:
                    continue
                entry, w = statistics.inputs[index], base.get_parameter(site.name)[expert].detach().double()
                moment, q = entry.second_moment(), torch.linalg.qr(b[..., expert]).Q
                f, t = moment.factor.double(), float(moment.rest)
                r = f @ f.T + t * torch.eye(len(f), dtype=torch.float64)
                part += entry.num_rows * float(((q.T @ w @ r) * (q.T @ w)).sum())
                whole += entry.num_rows * float(((w @ r) * w).sum())
            assert getattr(report.layers[site.name], which) == pytest.approx(part / whole, rel=1e-4)


def test_several_peft_models_hold_where_one_of_them_has_to():
    towers = nn.ModuleDict({"left": tied()})
    towers["right"] = peft.get_peft_model(nn.Sequential(nn.Linear(8, 6)), peft.LoraConfig(r=2, target_modules=["0"]))
    x, y = torch.arange(12)[None], torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    expected = outputs(towers["left"], x), outputs(towers["right"], y)
    report = initialize(towers, method="pissa")
    assert any("in left, of head" in note for note in report.notes)
    assert near(outputs(towers["left"], x), expected[0])
    assert near(outputs(towers["right"], y), expected[1])
    assert len(towers["right"].get_base_model()[0].lora_A["default"].weight) == 4


def test_a_step_of_gradients_is_held_where_a_weight_cannot_move():
    model, x = tied(), torch.arange(12)[None]
    report = initialize(model, [x], "lora-ga", loss_fn=squares)
    assert any("base weights stay as they are" in note for note in report.notes)
    assert near(outputs(model, x), Tied()(x))
    assert not near(outputs(trained(model, x), x), Tied()(x))


def test_a_step_of_gradients_is_held_beside_an_adapter_that_took_its_part(tmp_path):
    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 7))

    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0", "2"])
    model, x = peft.get_peft_model(base(), config), torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    expected = outputs(base(), x)
    initialize(model, [x], "lora-ga", loss_fn=squares)
    model.add_adapter("other", config)
    model.set_adapter("other")
    report = initialize(model, [x], "lora-ga", loss_fn=squares)
    assert any("part of it is with the adapter 'default' already" in note for note in report.notes)
    for name in ("default", "other"):
        model.set_adapter(name)
        assert near(outputs(model, x), expected)
    mine = outputs(trained(model, x), x)
    assert not near(mine, expected)
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert near(outputs(peft.PeftModel.from_pretrained(base(), tmp_path / "other"), x), mine)
    model.delete_adapter("default")
    assert near(outputs(model, x), mine)
    merged = model.merge_and_unload()
    assert (outputs(merged, x) - mine).abs().max() <= 2.0**-16 * mine.abs().max()


# --- other libraries


def of(layer):
    """The model, its linear layers replaced."""
    model = Net()
    for name, linear in list(model.named_children()):
        made = layer(linear)
        if made is not None:
            model.add_module(name, made)
    return model


@needs("loralib")
def test_loralib_saves_merges_and_loads_an_ordinary_lora_of_twice_the_rank():
    import loralib

    def doubled(linear):
        made = loralib.Linear(linear.in_features, linear.out_features, r=8, lora_alpha=16)
        made.load_state_dict(linear.state_dict(), strict=False)
        return made

    model, (x, *_) = of(loralib_linear), sequences()
    initialize(model, method="pissa")
    mine = outputs(trained(model, x), x)
    assert not near(mine, Net()(x))
    saved = loralib.lora_state_dict(model)
    fresh = of(doubled)
    assert not fresh.load_state_dict(saved, strict=False).unexpected_keys
    assert near(outputs(fresh, x), mine)
    with pytest.raises(RuntimeError, match="size mismatch"):
        of(loralib_linear).load_state_dict(saved, strict=False)
    assert near(outputs(model.eval(), x), mine)  # which merges
    assert near(outputs(model.train(), x), mine)
    loralib.mark_only_lora_as_trainable(model)
    assert {p.shape[0 if "lora_A" in n else 1] for n, p in model.named_parameters() if p.requires_grad} == {4}


@needs("loralib")
def test_ranks_move_between_layers_of_another_library():
    model, (x, *_) = of(loralib_linear), sequences()
    report = initialize(model, method="pissa", budget=9)
    shares = {n: torch.linalg.svdvals(m.weight.detach().double()).square() for n, m in Net().named_children()}
    shares = {name: (squares / squares.sum())[:4] for name, squares in shares.items()}  # rho is 1: as many candidates
    least = torch.cat([*shares.values()]).sort().values[-9]
    assert report.ranks == {name: max(1, int((share >= least).sum())) for name, share in shares.items()}
    for name, layer in model.named_children():
        assert layer.r == 2 * report.ranks[name] == 2 * len(dict(layer.named_parameters())["lora_A"])
        assert layer.scaling == 2
    assert near(outputs(model, x), Net()(x))


@needs("loralib")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_layers_in_16_bits_are_asked_too(dtype):
    model, (x, *_) = of(loralib_linear).to(dtype), sequences()
    before = {name: p.clone() for name, p in model.named_parameters() if "lora_" not in name}
    expected = outputs(model, x.to(dtype)).float()
    initialize(model, method="pissa")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    # B A x and B₀ A₀ x, which are the same, are added up in another order, in three layers.
    allowed = 16 * torch.finfo(dtype).eps * expected.abs().max()
    assert (outputs(model, x.to(dtype)).float() - expected).abs().max() <= allowed
    layer = model.first
    held = 2 * layer.lora_B.detach()[:, 4:].double() @ layer.lora_A.detach()[4:].double()
    u, d, v = torch.linalg.svd(layer.weight.detach().double(), full_matrices=False)
    wanted = (u[:, :4] * d[:4]) @ v[:4]
    assert (held + wanted).norm() <= 4 * torch.finfo(dtype).eps * wanted.norm()  # of A, B, the scaling that is seen


@needs("lycoris-lora")
def test_lycoris_keeps_multipliers_and_scalings_and_gives_the_layer_back():
    model, (x, *_) = of(lycoris_layer), sequences()
    initialize(model, method="pissa")
    owners = [patcher(layer) for layer in model.children()]
    optimizer = torch.optim.SGD([p for owner in owners for p in owner.parameters() if p.requires_grad], lr=1.0)
    call(model, x).square().mean().backward()
    optimizer.step()
    mine = outputs(model, x)
    assert not near(mine, Net()(x))
    again = of(lycoris_layer)
    for layer, owner in zip(again.children(), owners, strict=True):
        saved, other = owner.state_dict(), patcher(layer)
        other.lora_dim, other.scale = 8, float(saved["alpha"]) / 8
        other.lora_down = nn.Linear(layer.in_features, 8, bias=False)
        other.lora_up = nn.Linear(8, layer.out_features, bias=False)
        other.load_state_dict(saved)
    assert near(outputs(again, x), mine)
    for owner in owners:
        owner.multiplier = 0.0
    assert near(outputs(model, x), Net()(x))
    for owner in owners:
        owner.restore()
    assert torch.equal(outputs(model, x), Net()(x))


@needs("litgpt")
def test_litgpt_filters_and_merges_it():
    from litgpt.lora import LoRALinear, lora_filter, mark_only_lora_as_trainable

    (kind,) = (kind for kind in INSTALLED if kind.name == "litgpt LoRALinear")
    model, (x, *_) = kind.model(), sequences()
    initialize(model, method="pissa")
    mark_only_lora_as_trainable(model)
    mine = outputs(trained(model, x), x)
    saved = {key: value for key, value in model.state_dict().items() if lora_filter(key, value)}
    whole = {**Net().state_dict(), **saved}
    whole = {key.replace(".weight", ".linear.weight").replace(".bias", ".linear.bias"): v for key, v in whole.items()}
    with pytest.raises(RuntimeError, match="size mismatch"):
        kind.model().load_state_dict(whole, assign=True)
    fresh = Net()
    for child, linear in list(fresh.named_children()):
        fresh.add_module(child, LoRALinear(linear.in_features, linear.out_features, r=8, lora_alpha=16))
    fresh.load_state_dict(whole, assign=True)
    for layer in fresh.children():
        layer.merge()
    assert near(outputs(fresh, x), mine)


@needs("torchtune")
def test_torchtune_disables_filters_and_merges_it():
    from torchtune.modules.peft import (
        disable_adapter,
        get_adapter_params,
        get_adapter_state_dict,
        get_merged_lora_ckpt,
        set_trainable_params,
    )

    (kind,) = (kind for kind in INSTALLED if kind.name == "torchtune LoRALinear")
    model, (x, *_) = kind.model(), sequences()
    initialize(model, method="pissa")
    set_trainable_params(model, get_adapter_params(model))
    mine = outputs(trained(model, x), x)
    with disable_adapter(model):
        assert near(outputs(model, x), Net()(x))
    assert {len(a) for key, a in get_adapter_state_dict(model.state_dict()).items() if "lora_a" in key} == {8}
    merged = Net()
    merged.load_state_dict(get_merged_lora_ckpt(model.state_dict(), rank=4, alpha=8.0))
    assert near(outputs(merged, x), mine)
