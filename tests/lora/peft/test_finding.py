"""Where PEFT's layers are: named as in their PEFT model, whatever wraps it, and the same ones after a reload."""

from dataclasses import replace

import peft
import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.distributed.tensor import DTensor

from eva_lora import EvaConfig, apply, collect, eva_initialize, plan
from eva_lora.adapters import PatternsAmong, find_adapter, whole_weights
from eva_lora.peft import planned_config
from support.models import lora_a_of, tiny_llama, token_batches
from support.other_kinds import OTHER_KINDS
from support.ranks import on_ranks
from support.versions import needs
from support.wrappers import CHANGEABLE, FIXED, HandsOn

pytestmark = pytest.mark.filterwarnings("ignore:EVA stopped at")

BATCHES = token_batches(3)
NEEDS = {"fully_shard": needs("torch>=2.7")}  # before, it does not run on a CPU
CONFIG = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights="eva")


def adapted(config=CONFIG, base=tiny_llama):
    return peft.get_peft_model(base(), config, low_cpu_mem_usage=False)


def collected(model, batches=BATCHES, **options):
    return collect(model, batches, EvaConfig(**{"max_batches": 3, **options}), progress=False)


def initialised(model, batches=BATCHES, **options):
    return eva_initialize(model, batches, EvaConfig(**{"max_batches": 3, **options}), progress=False)


def matrices(model):
    """Every A by the name that EVA gives its layer, whole."""
    with whole_weights(model):
        weights = {n: layer.lora_A["default"].weight for n, layer in find_adapter(model).layers.items()}
        return {n: w.full_tensor() if isinstance(w, DTensor) else w.detach().clone() for n, w in weights.items()}


def reloaded(model, base, folder):
    model.save_pretrained(folder)
    return peft.PeftModel.from_pretrained(base(), folder)


def require_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], a) for name, a in expected.items())


@pytest.mark.parametrize("wrap", [pytest.param(wrap, id=name) for name, wrap in CHANGEABLE.items()])
def test_a_model_that_is_initialised_in_a_wrapper_saves_and_loads(wrap, tmp_path):
    plain, inside = adapted(), adapted()
    initialised(plain)
    report = initialised(wrap(inside))
    assert report.ranks.keys() == find_adapter(adapted()).layers.keys()
    assert len(set(report.ranks.values())) > 1
    found = matrices(inside)
    require_equal(found, matrices(plain))
    assert inside.peft_config["default"].rank_pattern == plain.peft_config["default"].rank_pattern
    if not any(
        hasattr(module, "_checkpoint_wrapped_module") for module in inside.modules()
    ):  # has a state dict of its own
        require_equal(matrices(reloaded(inside, tiny_llama, tmp_path)), found)


@pytest.mark.parametrize("dora", [False, pytest.param(True, id="DoRA", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [pytest.param(name, marks=NEEDS.get(name, ())) for name in (*CHANGEABLE, *FIXED)])
def test_the_remedy_for_wrapped_models_works_in_every_wrapper(name, dora, request):
    wrap = {**CHANGEABLE, **FIXED}[name]
    if dora and name == "fully_shard":
        pytest.skip("refused by name: PEFT cannot make a sharded adapter anew")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=dora)
    eva_plan = plan(collected(adapted(config)))
    expected = adapted(planned_config(config, eva_plan))
    apply(expected, eva_plan)
    expected = lora_a_of(expected)

    def check(rank):
        if name in FIXED:
            with pytest.raises(ValueError, match=r"^model: it is .*collect, plan, build .*planned_config.*apply"):
                initialised(wrap(adapted(config)))
        its_plan = plan(collected(wrap(adapted(config))))
        built = wrap(adapted(planned_config(config, its_plan)))
        parameters = {n: id(p) for n, p in built.named_parameters()}
        apply(built, its_plan)
        assert {n: id(p) for n, p in built.named_parameters()} == parameters  # the wrapper's own
        return its_plan.ranks, matrices(built)

    torch.compiler.set_stance("force_eager")  # what is compiled computes the same; it is about names here
    request.addfinalizer(lambda: torch.compiler.set_stance("default"))
    [(ranks, found)] = on_ranks(1, check)
    assert ranks == eva_plan.ranks
    require_equal(found, expected)


class Towers(nn.Module):
    """Two models under one roof; what the first gives goes into the second."""

    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, x):
        return self.decoder(self.encoder(x))


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x):
        return self.down(torch.sin(4 * self.up(x)))


def tower(seed=0):
    torch.manual_seed(seed)
    return Tower()


def towers(wrap=lambda model: model, ranks=(4, 3)):
    parts = [
        peft.get_peft_model(tower(seed), peft.LoraConfig(r=rank, target_modules=["up", "down"]))
        for seed, rank in enumerate(ranks)
    ]
    return wrap(Towers(*parts))


def rows(count=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(40, 12, generator=generator) * 0.6 ** torch.arange(12) for _ in range(count)]


@pytest.mark.parametrize("wrap", [lambda model: model, nn.Sequential, CHANGEABLE["DataParallel"]])
def test_several_peft_models_in_one_are_all_initialised_under_one_budget(wrap, tmp_path):
    model = towers(wrap)
    report = initialised(model, rows())
    both = model if isinstance(model, Towers) else next(model.children())
    layers = {f"{part}.{name}" for part in ("encoder", "decoder") for name in ("up", "down")}
    assert report.ranks.keys() == layers
    assert sum(report.ranks.values()) == 2 * (4 + 3)
    for seed, part in enumerate((both.encoder, both.decoder)):
        name = ("encoder", "decoder")[seed]
        found = lora_a_of(part)
        assert {f"{name}.{layer}": len(a) for layer, a in found.items()} == {
            layer: rank for layer, rank in report.ranks.items() if layer.startswith(name) and rank
        }
        require_equal(lora_a_of(reloaded(part, lambda: tower(seed), tmp_path / name)), found)  # noqa: B023


def test_plans_of_several_are_applied_to_all_or_none_and_each_can_be_built_with_its_part():
    eva_plan = plan(collected(towers(), rows()))
    whole = towers()
    apply(whole, eva_plan)
    built = Towers(
        *(
            peft.get_peft_model(
                tower(seed),
                planned_config(peft.LoraConfig(r=rank, target_modules=["up", "down"]), eva_plan.part(path)),
            )
            for seed, rank, path in ((0, 4, "encoder"), (1, 3, "decoder"))
        )
    )
    apply(built, eva_plan)
    for part in ("encoder", "decoder"):
        require_equal(lora_a_of(getattr(built, part)), lora_a_of(getattr(whole, part)))
    with pytest.raises(ValueError, match=r"^path: expected that of a part .* 'nowhere'"):
        eva_plan.part("nowhere")

    failing = towers()
    before = {name: p.clone() for name, p in failing.named_parameters()}
    patterns = [dict(part.peft_config["default"].rank_pattern) for part in (failing.encoder, failing.decoder)]
    last = failing.decoder.base_model.model.down
    last.update_layer = lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt)
    last.lora_variant["default"] = object()  # made anew whatever its rank
    with pytest.raises(KeyboardInterrupt):
        apply(failing, eva_plan)
    after = dict(failing.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in after.items())
    assert [part.peft_config["default"].rank_pattern for part in (failing.encoder, failing.decoder)] == patterns


def test_several_with_different_eva_configs_need_one():
    model = towers()
    model.encoder.peft_config["default"].eva_config = peft.EvaConfig(rho=1.5)
    with pytest.raises(ValueError, match=r"^model: .*\['encoder', 'decoder'\] carry different eva_config; pass config"):
        eva_initialize(model, rows(), progress=False)
    initialised(model, rows())


def test_a_peft_model_within_another_is_refused_by_name():
    inner = peft.get_peft_model(tower(), peft.LoraConfig(r=2, target_modules=["up"]))
    model = peft.get_peft_model(Towers(inner, tower(1)), peft.LoraConfig(r=2, target_modules=["decoder.down"]))
    with pytest.raises(ValueError, match=r"^model: the PEFT model '.*encoder.*' is part of another, "):
        initialised(model, rows())


def test_layers_that_no_configuration_describes_are_refused_beside_others():
    model = towers()
    model.spare = nn.ModuleList(
        [peft.get_peft_model(tower(), peft.LoraConfig(target_modules=["up"])).base_model.model.up]
    )
    with pytest.raises(ValueError, match=r"^model: it has PEFT LoRA layers, but no peft_config"):
        initialised(model, rows())


class Blocks(nn.Module):
    def __init__(self, count=2):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"fc": nn.Linear(12, 12), "proj": nn.Linear(12, 12)}) for _ in range(count)
        )

    def forward(self, x):
        for block in self.blocks:
            x = x + block["proj"](torch.sin(4 * block["fc"](x)))
        return x


class OneTwice(nn.Module):
    """A tower at the root, and one of the same layout below a name: as open_clip has them."""

    def __init__(self):
        super().__init__()
        self.visual = nn.Module()
        self.visual.transformer, self.transformer, self.first = Blocks(), Blocks(), nn.Linear(12, 12)

    def forward(self, x):
        return self.visual.transformer(x) + self.transformer(self.first(x))


class Lookalikes(nn.Module):
    """Names that differ where a pattern's dot matches anything, or that begin alike."""

    def __init__(self):
        super().__init__()
        self.a, self.c = (
            nn.ModuleDict({"b": nn.Linear(12, 12)}),
            nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(12, 12)})}),
        )
        self.a_b, self.axb, self.c_a_b, self.last = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x):
        for i, layer in enumerate((self.a["b"], self.c["a"]["b"], self.a_b, self.axb, self.c_a_b, self.last), 2):
            x = x + torch.sin(i * layer(x))
        return x


def seeded(make):
    torch.manual_seed(0)
    return make()


TARGETS = [
    (OneTwice, r"transformer\.blocks\.\d+\.(fc|proj)|first"),
    (OneTwice, r"visual\.transformer\.blocks\.\d+\.(fc|proj)|first"),
    (OneTwice, ["fc", "proj", "first"]),
    (OneTwice, "all-linear"),
    (OneTwice, ["visual.transformer.blocks.0.fc", "first"]),
    (Lookalikes, r"a\.b|a_b|axb|last"),
    (Lookalikes, ["b", "a_b", "axb", "c_a_b", "last"]),
]


@pytest.mark.parametrize("budget", [None, 5, 3, 1])
@pytest.mark.parametrize(("make", "targets"), TARGETS)
@pytest.mark.parametrize("how", ["apply", "planned_config"])
def test_a_reloaded_model_has_the_layers_that_were_saved_and_no_other(make, targets, budget, how, tmp_path):
    config = peft.LoraConfig(r=3, target_modules=targets)
    model = peft.get_peft_model(seeded(make), config)
    eva_plan = plan(collected(model, rows()), budget=budget)
    if how == "planned_config":
        model = peft.get_peft_model(seeded(make), planned_config(config, eva_plan))
    apply(model, eva_plan)
    again = reloaded(model, lambda: seeded(make), tmp_path)
    # ``model`` has them all: every name of one model and of the other is looked at.
    ours, theirs = (
        {n: (m.r["default"], m.scaling["default"]) for n, m in one.named_modules() if isinstance(m, LoraLayer)}
        for one in (model, again)
    )
    assert ours == theirs
    assert {n.removeprefix("base_model.model."): rank for n, (rank, _) in ours.items()} == {
        n: rank for n, rank in eva_plan.ranks.items() if rank
    }
    require_equal(lora_a_of(again), lora_a_of(model))


class Stacks(nn.Module):
    """Parameters of one name, one below the other's."""

    def __init__(self):
        super().__init__()
        self.outer = nn.ModuleDict({"head": nn.Linear(12, 12)})
        self.head, self.other = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x):
        return self.head(torch.sin(3 * self.outer["head"](x))) + self.other(x)


def test_parameters_that_peft_cannot_leave_out_are_refused_and_all_stays():
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["head.weight", "other.weight"])
    model = peft.get_peft_model(seeded(Stacks), config)
    eva_plan = plan(collected(model, rows()), EvaConfig(max_rank=4), budget=2)
    if eva_plan.ranks["outer.head.weight"] or not eva_plan.ranks["head.weight"]:
        eva_plan = given(eva_plan, {"outer.head.weight": 0, "head.weight": 2, "other.weight": 0})
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"^target_parameters: PEFT cannot leave out \['outer.head.weight'\]"):
        apply(model, eva_plan)
    assert {name: id(p) for name, p in model.named_parameters()}.keys() == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with pytest.raises(ValueError, match=r"^target_parameters: PEFT cannot leave out"):
        planned_config(config, eva_plan)


def test_parameters_without_a_rank_are_left_out_of_a_planned_model(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["head.weight", "other.weight"])
    statistics = collected(peft.get_peft_model(seeded(Stacks), config), rows())
    eva_plan = given(plan(statistics), {"outer.head.weight": 2, "head.weight": 0, "other.weight": 2})
    model = peft.get_peft_model(seeded(Stacks), planned_config(config, eva_plan))
    apply(model, eva_plan)
    again = reloaded(model, lambda: seeded(Stacks), tmp_path)
    assert {n for n, m in again.named_modules() if isinstance(m, LoraLayer)} == {
        f"base_model.model.{n}" for n in ("outer.head", "other")
    }


def given(eva_plan, ranks):
    """The plan with other ranks."""
    width = next(iter(eva_plan.sites.values())).in_features
    sites = {name: replace(eva_plan.sites[name], rank=rank) for name, rank in ranks.items()}
    lora_a = {name: torch.eye(width)[:rank] for name, rank in ranks.items()}
    return replace(eva_plan, sites=sites, lora_a=lora_a)


def test_a_configuration_that_could_not_load_the_adapter_is_refused():
    model = adapted()
    model.peft_config["default"].exclude_modules = ["q_proj"]
    eva_plan = plan(collected(model))
    with pytest.raises(ValueError, match=r"^model: exclude_modules or modules_to_save of its LoraConfig"):
        apply(model, eva_plan)


@pytest.mark.parametrize(
    ("name", "others", "pattern"),
    [
        ("a.b", ["a.b", "c.b"], "a.b"),
        ("a.b", ["x.a.b"], r"^a\.b"),
        ("a.b", ["a_b"], r"^a\.b"),
        ("a.b", ["x.axb"], r"^a\.b"),
        ("a.b", ["xa.b", "a.bc", "a.b.c"], "a.b"),
        ("a+", [], r"^a\+"),
    ],
)
def test_a_pattern_matches_its_own_layer_and_no_other(name, others, pattern):
    from peft.utils.other import get_pattern_key

    assert PatternsAmong(others).of(name) == pattern
    assert get_pattern_key([pattern], name) == pattern
    assert all(get_pattern_key([pattern], other) == other for other in others if other != name)


@pytest.mark.parametrize("dora", [False, True], ids=["", "DoRA"])
@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva"])
def test_a_planned_model_can_be_built_from_every_initialisation(init, dora):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=init, use_dora=dora)
    eva_plan = plan(collected(adapted(config)))
    assert any(rank % 2 for rank in eva_plan.ranks.values())
    built, grown = adapted(planned_config(config, eva_plan)), adapted(config)
    apply(built, eva_plan)
    apply(grown, eva_plan, overwrite=init is False)
    require_equal(lora_a_of(built), lora_a_of(grown))
    assert config.init_lora_weights == init


def test_the_option_that_is_refused_is_the_one_that_was_set():
    base = tiny_llama()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    with pytest.raises(
        ValueError, match=r"^model: .* sets ensure_weight_tying and targets tied layers, here \['lm_head'\]"
    ):
        initialised(peft.get_peft_model(base, config))


def test_a_state_dict_of_a_wrapped_model_is_that_of_the_model():
    from eva_lora.peft import get_eva_state_dict

    states = [get_eva_state_dict(model, BATCHES, show_progress_bar=False) for model in (adapted(), HandsOn(adapted()))]
    require_equal(*states)


@pytest.mark.parametrize("wrap", [torch.compile, CHANGEABLE["DataParallel"], FIXED["DeepSpeedEngine"]])
def test_layers_of_other_libraries_have_their_names_in_wrappers_that_are_known(wrap):
    kind = OTHER_KINDS[0]
    kind = getattr(kind, "values", [kind])[0]
    plain, wrapped = find_adapter(kind.model()), find_adapter(wrap(kind.model()))
    assert [site.name for site in wrapped.sites] == [site.name for site in plain.sites]
