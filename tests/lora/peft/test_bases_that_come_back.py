"""Adapters that took part of their base: saved, loaded elsewhere, switched off, and made ordinary ones of."""

import copy
import json
import pickle
import subprocess
import sys

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from eva_lora import eva_initialize, export_plain, export_uniform, initialize, load_adapter
from eva_lora.adapters import plain
from support.models import LINEARS, lora, tiny_llama, token_batches

UNIT = 2.0**-24
PATTERNS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 20}}
SCALINGS = [{"lora_alpha": 8}, {"use_rslora": True, **PATTERNS}]


@pytest.fixture(scope="module")
def base():
    return tiny_llama().eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(**token_batches(1)[0]).logits


def trained(model, steps=3):
    """A few steps, so that A and B are not what they were."""
    torch.manual_seed(0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for batch in token_batches(steps, seed=3):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def started(base, method="pissa", **options):
    model = lora(copy.deepcopy(base), **options)
    initialize(model, method=method)
    return model


def left_of(model):
    """The base as it is inside of the model, lacking what the adapter took."""
    left = copy.deepcopy(model.get_base_model())
    for name, layer in [*left.named_modules()]:
        if hasattr(layer, "lora_A"):
            left.set_submodule(name, layer.base_layer)
    return left


def assert_same_model(model, other):
    """Modules with all attributes, modes and hooks; parameters, and whether these are trained."""
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in other.named_modules()]
    for module, its in zip(model.modules(), other.modules(), strict=True):
        assert set(vars(module)) == set(vars(its))
        assert module.training == its.training
        hooks = ("_forward_hooks", "_forward_pre_hooks")
        assert [len(vars(module)[table]) for table in hooks] == [len(vars(its)[table]) for table in hooks]
    for (name, parameter), (its, expected) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert (name, parameter.requires_grad) == (its, expected.requires_grad)
        assert torch.equal(parameter, expected)


def near(one, other):
    """Logits as near as a forward in float32 with other products of the same numbers."""
    return (one - other).abs().max() <= 2.0**-16 * other.abs().max()


@pytest.mark.parametrize("options", SCALINGS, ids=["alpha", "rsLoRA and patterns"])
def test_a_plain_adapter_on_the_untouched_base_computes_the_same(base, tmp_path, options):
    model = trained(started(base, **options))
    model.save_pretrained(tmp_path / "adapter")
    for number, source in enumerate((model, tmp_path / "adapter")):
        plain = export_plain(source, tmp_path / f"plain{number}")
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), plain.folder)
        assert near(logits(loaded), logits(model))
        assert not near(logits(base), logits(model))
        assert set(plain.errors.values()) == {0.0}
        for name, layer in loaded.get_base_model().named_modules():
            if hasattr(layer, "lora_A"):
                mine = model.get_base_model().get_submodule(name)
                assert layer.r["default"] == plain.ranks[name] == 2 * mine.r["default"]
                assert layer.scaling["default"] == pytest.approx(mine.scaling["default"], rel=1e-15)
                a, b = mine.lora_A["default"].weight, mine.lora_B["default"].weight
                start = mine.lora_start["default"]
                assert torch.equal(layer.lora_A["default"].weight, torch.cat([a, start.kept_a]))
                assert torch.equal(layer.lora_B["default"].weight, torch.cat([b, -start.kept_b], 1))


def test_truncated_it_says_its_error(base, tmp_path):
    model = trained(started(base))
    plain = export_plain(model, tmp_path, rank=3)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    for name, rank in plain.ranks.items():
        layer = model.get_base_model().get_submodule(name)
        start = layer.lora_start["default"]
        delta = layer.get_delta_weight("default").detach().double() - torch.matmul(*start.factors())
        s = torch.linalg.svdvals(delta)
        a, b = (weights[f"base_model.model.{name}.lora_{which}.weight"].double() for which in "AB")
        got = layer.scaling["default"] * b @ a
        assert rank == 3
        # Errors of factors in float32, which BA − B₀A₀ was small beside.
        rounding = 64 * UNIT * layer.scaling["default"] * (start.kept_b.norm() * start.kept_a.norm()).double()
        assert plain.errors[name] == pytest.approx(float(s[3:].norm() / s.norm()), rel=1e-3)
        assert (delta - got).norm() <= s[3:].norm() * (1 + 1e-3) + rounding
    everything = export_plain(model, tmp_path / "all", rank=64)
    assert set(everything.ranks.values()) == {8}
    assert set(everything.errors.values()) == {0.0}


@pytest.mark.slow
def test_loading_in_a_fresh_process_with_another_seed_gives_equal_logits(base, tmp_path):
    model = trained(started(base, "milora"))
    model.save_pretrained(tmp_path / "adapter")
    base.save_pretrained(tmp_path / "base")
    save_file({"logits": logits(model)}, tmp_path / "logits.safetensors")
    script = f"""
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from eva_lora import load_adapter
torch.manual_seed(1234)
torch.set_num_threads(1)
model = load_adapter(AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r}), {str(tmp_path / "adapter")!r})
tokens = torch.tensor({token_batches(1)[0]["input_ids"].tolist()})
with torch.no_grad():
    found = model.eval()(input_ids=tokens).logits
expected = load_file({str(tmp_path / "logits.safetensors")!r})["logits"]
assert (found - expected).abs().max() <= 2.0**-16 * expected.abs().max()
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_loaded_weights_are_bit_equal_and_train_on(base, tmp_path):
    model = trained(started(base))
    model.save_pretrained(tmp_path)
    torch.manual_seed(1234)  # other than the model was made with
    loaded = load_adapter(copy.deepcopy(base), tmp_path, is_trainable=True)
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert loaded.peft_config["default"].init_lora_weights == model.peft_config["default"].init_lora_weights
    assert any(p.requires_grad for p in loaded.parameters())
    loaded.load_adapter(tmp_path, "default", is_trainable=True)  # as trainers resume: the same start is no conflict
    trained(loaded).save_pretrained(tmp_path / "again")
    assert near(logits(load_adapter(copy.deepcopy(base), tmp_path / "again")), logits(loaded))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_switched_off_the_base_is_back(base, dtype):
    """Also in a copy, after other adapters were active, and after merging and unmerging."""
    whole = copy.deepcopy(base).to(dtype)
    model = trained(started(whole).train(), steps=12)
    expected, mine = logits(whole).float(), logits(model).float()
    # What is left of a weight was rounded once to its dtype, in 21 layers, whose errors add up like their outputs.
    allowed = 16 * torch.finfo(dtype).eps * expected.abs().max()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=True))
    twin = copy.deepcopy(model)
    with twin.disable_adapter():
        assert (logits(twin).float() - expected).abs().max() <= allowed
    for each in (model, twin):
        each.set_adapter("other")  # of which B is zero
        assert (logits(each).float() - expected).abs().max() <= allowed
        each.set_adapter("default")
        assert torch.equal(logits(each).float(), mine)
    assert not (mine - expected).abs().max() <= allowed
    model.merge_adapter()
    assert (logits(model).float() - mine).abs().max() <= allowed
    model.unmerge_adapter()
    with model.disable_adapter():
        assert (logits(model).float() - expected).abs().max() <= allowed
    merged = twin.merge_and_unload()
    assert (logits(merged).float() - mine).abs().max() <= allowed


def deleted(model):
    model.delete_adapter("default")
    model.add_adapter("default", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=True))  # the name is free
    model.set_adapter("default")
    return model


WAYS_OUT = {
    "unload": lambda model: model.unload(),
    "merging another": lambda model: model.merge_and_unload(adapter_names=["other"]),
    "deleting": deleted,
    "deleting, unloading": lambda model: deleted(model).merge_and_unload(),
}


@pytest.mark.parametrize("way", WAYS_OUT)
def test_where_the_adapter_is_taken_out_the_weights_are_the_base_s_again(base, way):
    model = trained(started(base))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=True))  # of which B is zero
    left = WAYS_OUT[way](pickle.loads(pickle.dumps(model)))
    shortened = (
        (n.replace(".base_layer", "").removeprefix("base_model.model."), x) for n, x in left.named_parameters()
    )
    weights = dict(shortened)
    for name, expected in base.named_parameters():
        # Two roundings of entries that are no larger than ‖W‖₂: of what is left of W, and of the sum.
        allowed = 2 * UNIT * (1 + UNIT) * torch.linalg.matrix_norm(expected, 2) if expected.ndim == 2 else 0.0
        assert (weights[name] - expected).abs().max() <= allowed
    assert not any(module._forward_hooks for module in left.modules())
    assert near(logits(left), logits(base))


def test_another_adapter_is_not_loaded_over_it(base, tmp_path):
    trained(lora(copy.deepcopy(base))).save_pretrained(tmp_path)
    model = started(base)
    expected = logits(model)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ValueError, match=r"layers\.0.*lora_A\.default comes without what it started from"):
            each.load_adapter(tmp_path, "default")
        assert torch.equal(logits(each), expected)
        each.load_adapter(tmp_path, "another")  # beside it is another matter
        each.set_adapter("another")
        assert near(logits(each), logits(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)))


@pytest.mark.parametrize("other", ["a", "b", "w"])
def test_another_adapter_s_name_does_not_lose_what_is_kept(base, tmp_path, other):
    model = started(base, r=2, target_modules=["q_proj"])
    model.add_adapter(other, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=True))
    model.save_pretrained(tmp_path)
    assert near(logits(load_adapter(copy.deepcopy(base), tmp_path)), logits(base))


def test_gradients_do_not_reach_what_is_kept(base):
    model = trained(started(base))
    for name, buffer in model.named_buffers():
        if "lora_start" in name:
            assert not buffer.requires_grad
    assert not any("lora_start" in name for name, _ in model.named_parameters())


def test_unconverted_it_does_not_load_onto_the_base_in_silence(base, tmp_path):
    started(base).save_pretrained(tmp_path)
    for load in (
        lambda: PeftModel.from_pretrained(copy.deepcopy(base), tmp_path),
        lambda: PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=True),
        lambda: lora(copy.deepcopy(base)).load_adapter(tmp_path, "second"),
        lambda: copy.deepcopy(base).load_adapter(str(tmp_path)),
    ):
        with pytest.raises(ValueError, match=r"Unknown initialization .*eva_lora\.load_adapter: pissa"):
            load()
    with pytest.raises(ValueError, match=r"export_plain makes an ordinary adapter of it first"):
        export_uniform(tmp_path, tmp_path / "uniform")
    model = lora(copy.deepcopy(base))
    with pytest.raises(ValueError, match="was taken from; load the base anew"):
        load_adapter(left_of(started(base)), tmp_path)  # what is left of a base is no base
    with pytest.raises(ValueError, match="expected a base without LoRA layers"):
        load_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="was taken from; load the base anew"):
        load_adapter(tiny_llama(seed=5), tmp_path)
    other = started(tiny_llama(seed=5))
    with pytest.raises(ValueError, match="is not what this model's base was changed by"):
        other.load_adapter(tmp_path, "default")


def test_an_incomplete_file_is_named_and_the_base_stays(base, tmp_path):
    started(base).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({k: v for k, v in weights.items() if "layers.1.mlp.up_proj.lora_start" not in k}, file)
    fresh = copy.deepcopy(base)
    with pytest.raises(ValueError, match=r"does not hold what the adapter of model\.layers\.1\.mlp\.up_proj started"):
        load_adapter(fresh, tmp_path)
    assert_same_model(fresh, base)
    save_file(weights, file)
    other = tiny_llama(seed=5)
    with pytest.raises(ValueError, match="was taken from; load the base anew"):
        load_adapter(other, tmp_path)
    assert_same_model(other, tiny_llama(seed=5))
    other.load_state_dict(base.state_dict())  # the base as it should have been: it loads
    assert torch.equal(logits(load_adapter(other, tmp_path)), logits(load_adapter(fresh, tmp_path)))


def failing(folder, how):
    """What a folder held before something in it was broken."""
    file = folder / "adapter_model.safetensors"
    saved = load_file(file)
    key = next(key for key in reversed(saved) if key.endswith(how[0]))
    save_file({k: how[1](v).contiguous() if k == key else v for k, v in saved.items()}, file)
    return saved, file


BROKEN = [("lora_A.weight", lambda a: a[:3]), ("kept_a", lambda a: a[:2]), ("kept_b", lambda b: b[:, :3]),
          ("kept_w", lambda w: w * float("nan"))]  # fmt: skip


@pytest.mark.parametrize("how", BROKEN, ids=[name for name, _ in BROKEN])
def test_a_load_that_fails_leaves_everything_as_it_was(base, tmp_path, how):
    started(base).save_pretrained(tmp_path)
    saved, file = failing(tmp_path, how)
    fresh = copy.deepcopy(base).train()
    fresh.gradient_checkpointing_enable()  # for which PEFT hangs a hook on the embedding
    untouched = copy.deepcopy(fresh)
    with pytest.raises((ValueError, RuntimeError), match=r"size mismatch|does not hold what|was taken from"):
        load_adapter(fresh, tmp_path)
    assert_same_model(fresh, untouched)
    save_file(saved, file)
    assert torch.equal(logits(load_adapter(fresh, tmp_path)), logits(load_adapter(copy.deepcopy(base), tmp_path)))


def test_so_does_one_that_is_broken_off_while_weights_are_moved(base, tmp_path, monkeypatch):
    started(base).save_pretrained(tmp_path)
    begin, calls = plain.begin, []

    def cut(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return begin(*args)

    monkeypatch.setattr(plain, "begin", cut)
    fresh = copy.deepcopy(base)
    with pytest.raises(KeyboardInterrupt):
        load_adapter(fresh, tmp_path)
    assert [*fresh.state_dict()] == [*base.state_dict()]
    for parameter, expected in zip(fresh.parameters(), base.parameters(), strict=True):
        assert (parameter - expected).abs().max() <= 2 * UNIT * expected.abs().max()  # subtracted, and added again


def test_so_does_one_of_an_ordinary_adapter(base, tmp_path):
    lora(copy.deepcopy(base)).save_pretrained(tmp_path)
    failing(tmp_path, BROKEN[0])
    fresh = copy.deepcopy(base).train()
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_adapter(fresh, tmp_path)
    assert_same_model(fresh, copy.deepcopy(base).train())


def test_ordinary_adapters_load_as_ever_and_are_written_as_they_are(base, tmp_path):
    model = lora(copy.deepcopy(base))
    eva_initialize(model, token_batches(), progress=False)
    trained(model).save_pretrained(tmp_path / "adapter")
    assert near(logits(load_adapter(copy.deepcopy(base), tmp_path / "adapter")), logits(model))
    saved, files = load_file(tmp_path / "adapter" / "adapter_model.safetensors"), []
    for number, source in enumerate((model, tmp_path / "adapter")):
        plain = export_plain(source, tmp_path / f"plain{number}", rank=(None, 64)[number])
        assert set(plain.errors.values()) == {0.0}
        assert plain.ranks == {
            name: layer.r["default"] for name, layer in model.get_base_model().named_modules() if hasattr(layer, "r")
        }
        files.append(load_file(plain.folder / "adapter_model.safetensors"))
        assert near(logits(PeftModel.from_pretrained(copy.deepcopy(base), plain.folder)), logits(model))
    assert all(torch.equal(value, file[name]) for name, value in saved.items() for file in files)
    with pytest.raises(ValueError, match="leaves the base as it is: expected neither initial nor base"):
        export_plain(model, tmp_path / "plain", base=base)
    with pytest.raises(TypeError, match="expected a PeftModel or a folder, got LlamaForCausalLM"):
        export_plain(base, tmp_path / "plain")
    with pytest.raises(ValueError, match="rank: expected None or an integer of at least 1, got 0"):
        export_plain(model, tmp_path / "plain", rank=0)
    config = tmp_path / "adapter" / "adapter_config.json"
    loftq = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}
    config.write_text(json.dumps({**json.loads(config.read_text()), **loftq}))
    with pytest.raises(ValueError, match="not known what init_lora_weights='loftq' leaves in the base"):
        export_plain(tmp_path / "adapter", tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


# --- PEFT's own


def of_peft(base, init, **options):
    """With PEFT's own start, prepared as PEFT asks for it: one text at a time."""
    if init not in ("corda", "lora_ga"):
        return lora(copy.deepcopy(base), init_lora_weights=init, **options)
    model, texts = copy.deepcopy(base), [{n: x[:1] for n, x in batch.items()} for batch in token_batches(8)]
    common = {"r": 4, "lora_alpha": 8, "target_modules": LINEARS, "init_lora_weights": init, **options}
    if init == "corda":
        corda = pytest.importorskip("peft.tuners.lora.corda")
        config = LoraConfig(**common, corda_config=peft.tuners.lora.config.CordaConfig(corda_method="ipm"))
        corda.preprocess_corda(model, config, torch.no_grad()(lambda: [model(**text) for text in texts]))
    else:
        loraga = pytest.importorskip("peft.tuners.lora.loraga")
        config = LoraConfig(**common, lora_ga_config=peft.LoraGAConfig())
        loss_of = lambda text: model(**text, labels=text["input_ids"]).loss  # noqa: E731
        loraga.preprocess_loraga(model, config, lambda: [loss_of(text).backward() for text in texts])
    return get_peft_model(model, config)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing", "ignore:Using Rank-Stabilized LoRA")
@pytest.mark.parametrize("options", SCALINGS, ids=["alpha", "rsLoRA and patterns"])
@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4", "corda", "lora_ga"])
def test_peft_s_own_become_ordinary_given_where_they_started(base, tmp_path, init, options):
    """For rsLoRA with patterns PEFT's own conversion refuses."""
    model = of_peft(base, init, **options)
    model.save_pretrained(tmp_path / "initial")
    trained(model).save_pretrained(tmp_path / "adapter")
    plain = export_plain(tmp_path / "adapter", tmp_path / "plain", initial=tmp_path / "initial")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), plain.folder)
    assert (logits(loaded) - logits(model)).abs().max() <= 2.0**-14 * logits(model).abs().max()
    if init not in ("pissa", "olora"):
        reason = "draws what it takes" if init.endswith("niter_4") else f"that the {init} adapter was saved in before"
        with pytest.raises(ValueError, match=reason):
            export_plain(tmp_path / "adapter", tmp_path / "other", base=copy.deepcopy(base))
    else:
        again = export_plain(model, tmp_path / "other", base=base)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), again.folder)
        assert (logits(loaded) - logits(model)).abs().max() <= 2.0**-14 * logits(model).abs().max()
    with pytest.raises(ValueError, match=r"export_plain makes an ordinary adapter of it first"):
        export_uniform(tmp_path / "adapter", tmp_path / "uniform")


def test_what_cannot_be_known_is_refused(base, tmp_path):
    lora(copy.deepcopy(base), init_lora_weights="pissa").save_pretrained(tmp_path / "pissa")
    with pytest.raises(ValueError, match=r"initial: expected the folder .* or base=, the model as it was; got None"):
        export_plain(tmp_path / "pissa", tmp_path / "out")
    lora(copy.deepcopy(base), init_lora_weights="pissa", r=2).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"initial: it holds no start for .* or one of another shape"):
        export_plain(tmp_path / "pissa", tmp_path / "out", initial=tmp_path / "other")
    config = tmp_path / "pissa" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "init_lora_weights": "corda"}))
    with pytest.raises(ValueError, match="initial: expected the folder that the corda adapter was saved in before"):
        export_plain(tmp_path / "pissa", tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()
    dora = lora(copy.deepcopy(base), init_lora_weights="pissa", use_dora=True)
    dora.save_pretrained(tmp_path / "dora")
    with pytest.raises(ValueError, match="lora_magnitude_vector is no part of a sum of products B A"):
        export_plain(tmp_path / "dora", tmp_path / "out", initial=tmp_path / "dora")
