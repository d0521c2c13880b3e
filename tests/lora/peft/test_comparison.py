"""docs/comparison.md: what it says of PEFT's EVA holds for the PEFT that is installed, and of ours too."""

import copy
from importlib.metadata import version

import peft
import pytest
import torch
from peft.tuners.lora import eva as theirs

from eva_kernels import ConvergenceTracker
from eva_lora import EvaConfig, eva_initialize
from support.bounds import gamma, product_rounding
from support.models import LINEARS, layer_inputs, lora_a_of, scatter, tiny_llama, token_batches
from support.pages import DOCS

DESCRIBED = "0.21"

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not version("peft").startswith(f"{DESCRIBED}."), reason=f"the page is about PEFT {DESCRIBED}"),
]

BATCHES = token_batches(1, (8, 32))  # one batch, seen again: both converge on it
QUIET = {"show_progress_bar": False}


def model_of(eva=None, **options):
    eva_config = peft.EvaConfig(**{"rho": 1.0, "tau": 0.5, **(eva or {})})
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": LINEARS, "init_lora_weights": "eva"}
    return peft.get_peft_model(tiny_llama(), peft.LoraConfig(**{**defaults, "eva_config": eva_config, **options}))


class Replayed:
    """Stands in for PEFT's IncrementalPCA and shows one basis after another."""

    def __init__(self, *bases):
        self.bases = list(bases)

    def partial_fit(self, rows):
        self.components_ = self.bases.pop(0)


def test_the_page_says_which_version_it_is_about():
    assert f"PEFT {DESCRIBED}" in (DOCS / "comparison.md").read_text(encoding="utf-8")


def test_defaults_are_the_same():
    for name in ("rho", "tau", "use_label_mask", "label_mask_value", "whiten", "adjust_scaling_factors"):
        assert getattr(EvaConfig.of(None), name) == getattr(peft.EvaConfig(), name)


def test_a_flipped_sign_counts_as_not_converged_in_peft_only():
    hook = theirs.SVDHook(n_components=2, sim_thresh=0.99, name="layer")
    hook.svd = Replayed(torch.eye(2, 4), -torch.eye(2, 4))
    for _ in range(2):
        hook(None, torch.randn(8, 4), None)
    assert not hook.converged.any()
    for criterion in ("component", "subspace"):
        tracker = ConvergenceTracker([2], budget=2, criterion=criterion)
        ratios = [[0.5, 0.2]]
        tracker.update([[1.0, 1.0]], ratios, [[1.0, 2.0]])
        assert tracker.update([[1.0, 1.0]], ratios, [[1.0, 2.0]]).all_done  # |cosines| and overlaps know no sign


def test_batches_with_fewer_rows_than_components_are_left_out_by_peft_only(capsys):
    hook = theirs.SVDHook(n_components=8, sim_thresh=0.99, name="layer")
    hook(None, torch.randn(4, 16), None)
    assert not hasattr(hook.svd, "components_")
    assert "skipping" in capsys.readouterr().out
    small = token_batches(6, (1, 3))
    report = eva_initialize(model_of(), small, EvaConfig(rho=1, max_batches=6), progress=False)
    assert report.num_rows == 18


def test_whitening_divides_a_shared_matrix_once_for_every_layer_in_peft():
    plain, white = (
        theirs.get_eva_state_dict(model_of(eva={"whiten": whiten}), BATCHES, **QUIET) for whiten in (False, True)
    )
    prefix = "base_model.model.model.layers.0.self_attn."
    q, k, v = (white[f"{prefix}{name}_proj"] for name in "qkv")
    assert q.data_ptr() == k.data_ptr() == v.data_ptr()
    once = theirs.get_eva_state_dict(model_of(eva={"whiten": True}, target_modules=["q_proj"]), BATCHES, **QUIET)
    norm = once[f"{prefix}q_proj"].norm(dim=1)
    rounding = gamma(8 * 32 + 32)  # of a singular value decomposition of so many rows and columns, in float32
    assert (plain[f"{prefix}q_proj"].norm(dim=1) - 1).abs().max() <= rounding
    assert (q.norm(dim=1) / norm**3 - 1).abs().max() <= 3 * rounding  # σ^-1.5 where σ^-0.5 is meant

    model = model_of()
    report = eva_initialize(model, BATCHES, EvaConfig(rho=1, tau=0.5, whiten=True), progress=False)
    rows = layer_inputs(model, BATCHES)["model.layers.0.self_attn.q_proj"]
    values = report.num_batches * torch.linalg.eigvalsh(scatter(rows)).flip(0)
    off = product_rounding("reference", report.num_batches * len(rows), 32) * values.sum() / values[:4]
    for name in "qkv":
        a = lora_a_of(model)[f"model.layers.0.self_attn.{name}_proj"]
        # The fourth root of an eigenvalue is off by less than half as much as that, relatively.
        assert ((a.double().norm(dim=1) * values[:4] ** 0.25 - 1).abs() <= off / 2 + gamma(3)).all()


def test_loaders_without_a_length_need_ours():
    with pytest.raises(TypeError):
        theirs.get_eva_state_dict(model_of(), iter(BATCHES), **QUIET)
    assert eva_initialize(model_of(), iter(BATCHES), progress=False).num_batches == 1


def test_an_error_in_the_pass_leaves_hooks_and_eval_mode_behind_in_peft_only():
    def fail(model, batch):
        model(**batch)
        raise KeyboardInterrupt

    left = {}
    for name, call in (
        ("theirs", lambda model: theirs.get_eva_state_dict(model, BATCHES, forward_fn=fail, **QUIET)),
        ("ours", lambda model: eva_initialize(model, BATCHES, forward_fn=fail, progress=False)),
    ):
        model = model_of().train()
        with pytest.raises(KeyboardInterrupt):
            call(model)
        left[name] = (model.training, sum(len(m._forward_hooks) for m in model.modules()))
    assert left["theirs"] == (False, 21)
    assert left["ours"] == (True, 0)


def test_a_state_dict_is_emptied_and_one_of_a_bare_model_loads_nothing_in_peft_only():
    state = theirs.get_eva_state_dict(tiny_llama(), BATCHES, peft_config=model_of().peft_config["default"], **QUIET)
    before = copy.deepcopy(state)
    model = model_of()
    theirs.initialize_lora_eva_weights(model, eva_state_dict=state)
    assert not any(torch.equal(a, before[name].float()) for name, a in lora_a_of(model).items())
    named = {f"base_model.model.{name}": a for name, a in before.items()}
    theirs.initialize_lora_eva_weights(model_of(), eva_state_dict=named)
    assert named == {}

    from eva_lora.peft import initialize_lora_eva_weights

    model = model_of()
    initialize_lora_eva_weights(model, eva_state_dict=before)
    assert all(torch.equal(a, before[name].float()) for name, a in lora_a_of(model).items())
    assert len(before) == 21


@pytest.mark.parametrize("call", ["theirs", "ours"])
def test_the_head_runs_in_peft_only(call):
    model = model_of()
    calls = []
    model.get_output_embeddings().register_forward_hook(lambda _head, _args, logits: calls.append(logits.device.type))
    if call == "theirs":
        theirs.get_eva_state_dict(model, BATCHES, **QUIET)
    else:
        eva_initialize(model, BATCHES * 4, EvaConfig(tau=1.0, max_batches=8), progress=False)
    computed = calls.count("cpu")
    if call == "theirs":
        assert computed == len(calls) >= 3
    else:
        assert len(calls) == 8
        assert 1 <= computed < len(calls) / 2  # the first batch, and perhaps one that was drawn


def test_scaling_drifts_under_rslora_in_peft_only():
    scalings = {}
    for name in ("theirs", "ours"):
        model = model_of(eva={"rho": 2.0, "tau": 0.5}, use_rslora=True)
        if name == "theirs":
            theirs.initialize_lora_eva_weights(model, BATCHES, **QUIET)
        else:
            eva_initialize(model, BATCHES, EvaConfig(rho=2, tau=0.5), progress=False)
        layers = [m for m in model.modules() if hasattr(m, "scaling") and hasattr(m, "r")]
        assert len({m.r["default"] for m in layers}) > 1
        scalings[name] = [m.scaling["default"] for m in layers]
    assert max(scalings["ours"]) - min(scalings["ours"]) <= gamma(4, torch.float64) * max(scalings["ours"])
    assert max(scalings["theirs"]) / min(scalings["theirs"]) > 1.1


def test_convolutions_stay_random_in_peft():
    assert {c.__name__ for c in theirs.UNSUPPORTED_LORA_MODULES} == {"Embedding", "MultiheadAttention", "_ConvNd"}


def test_shared_inputs_are_found_by_hashing_every_value_in_peft():
    """Equal values are one input to it, whatever they belong to."""
    x = torch.arange(6.0).reshape(2, 3)
    assert theirs.HashHook.hash_fn(x) == hash(tuple(x.flatten().tolist())) == theirs.HashHook.hash_fn(x.clone())
