"""Starts from gradients of matrices that are multiplied inside of a module: experts, and parameters by their names."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from eva_lora import METHODS, initialize
from eva_lora.collecting import Asked
from harness.memory import tensor_bytes
from support.bounds import gamma
from support.gradients import FORMULAS, cosine, labelled, require_same, svd, told, whole
from support.peft_kinds import EXPERTS, STACKED_EXPERTS, gpt_oss, mixtral, qwen_moe
from support.tiny import state_of
from support.versions import needs

pytestmark = needs(STACKED_EXPERTS)

MODELS = {"Mixtral": mixtral, "Qwen3-MoE": qwen_moe, "GPT-OSS": gpt_oss}
PATHS = ("eager", "batched_mm", "grouped_mm")  # of transformers' experts
OF_GRADIENTS = [name for name, method in METHODS.items() if method.data == "gradients"]
KEPT = [name for name in OF_GRADIENTS if METHODS[name].base == "kept"]
GAP = 0.02


def made(kind, dtype=torch.float32, path="eager"):
    base = MODELS[kind]().to(dtype).requires_grad_(False).eval()
    base.set_experts_implementation(path)
    return base


def adapted(base, parameters=(*EXPERTS, "o_proj.weight"), **options):
    config = LoraConfig(
        **{"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], "target_parameters": [*parameters], **options}
    )
    return get_peft_model(copy.deepcopy(base), config)


def exact_of(base, batches):
    """Matrix → its gradient as autograd forms it, (out, in)."""
    model = copy.deepcopy(base)
    ends = (*EXPERTS, "q_proj.weight", "o_proj.weight", "gate.weight")
    weights = {name: p for name, p in model.named_parameters() if name.endswith(ends)}
    for weight in weights.values():
        weight.requires_grad_(True)
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()
    found = {}
    for name, weight in weights.items():
        gradient = weight.grad.double()
        if gradient.ndim == 2:
            found[name.removesuffix(".weight") if "q_proj" in name else name] = gradient
            continue
        for expert, matrix in enumerate(gradient.mT if "gpt_oss" in base.config.model_type else gradient):
            found[f"{name}[{expert}]"] = matrix
    return found


@pytest.mark.parametrize(
    ("kind", "path"), [*((kind, "eager") for kind in MODELS), *(("GPT-OSS", p) for p in PATHS[1:])]
)
def test_products_are_those_of_the_gradients_that_autograd_forms(kind, path):
    dtype = torch.float32 if path == "grouped_mm" else torch.float64  # which that has no kernel for
    base, batches = made(kind, dtype, path), labelled(2)
    model = adapted(base)
    exact = exact_of(base, batches)
    found = whole(model, batches)
    exact = {name: exact[name] for name in found}
    assert len(found) == 2 * (4 + 4 + 2)  # of each block 4 experts' two matrices, q_proj and o_proj
    rounding = gamma(2000, dtype)
    require_all_near(found, exact, rounding)
    generator = torch.Generator().manual_seed(2)
    right, left = (
        {n: torch.randn(g.shape[side], 3, generator=generator, dtype=dtype) for n, g in exact.items()}
        for side in (1, 0)
    )
    before = state_of(model)
    found = told(model, batches, {n: Asked(right=x) for n, x in right.items()})
    require_all_near(found, {n: exact[n] @ right[n].double() for n in exact}, rounding)
    found = told(model, batches, {n: Asked(left=x) for n, x in left.items()})
    require_all_near(found, {n: exact[n].T @ left[n].double() for n in exact}, rounding)
    few = [*exact][-3:-1]  # some experts of a layer
    found = told(model, batches, {n: Asked(right=right[n]) for n in few})
    require_all_near(found, {n: exact[n] @ right[n].double() for n in few}, rounding)
    assert state_of(model) == before
    assert all(p.grad is None for p in model.parameters())


def require_all_near(found, exact, rounding):
    """As ``require_same``, of the largest of a model: a token or two come to some experts, or none."""
    assert set(found) == set(exact)
    largest = max(g.norm() for g in exact.values())
    for name, product in found.items():
        assert (product - exact[name]).norm() <= rounding * largest, name


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_under_gradient_checkpointing_a_batch_counts_once(reentrant):
    base, batches = made("Mixtral"), labelled(2)
    model = adapted(base)
    exact = whole(model, batches)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    require_same(whole(model, batches), exact)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", KEPT)
def test_experts_start_as_the_method_s_paper_says(kind, method, tmp_path):
    base, batches = made(kind), labelled(2)
    model = adapted(base, (*EXPERTS, "gate.weight") if kind == "Mixtral" else EXPERTS)
    exact = exact_of(base, batches)
    report = initialize(model, batches, method)
    root, compared = model.get_base_model(), 0
    for name, layer in report.layers.items():
        if "q_proj" in name:
            continue
        path = name.rpartition(".")[0]
        mine = root.get_submodule(path)
        while mine.parameter_name != name.rpartition(".")[2]:
            mine = mine.base_layer
        parts, r = mine.num_experts, layer.rank
        a = mine.lora_A["default"].weight.detach().double().view(parts, r, -1)
        b = mine.lora_B["default"].weight.detach().double().view(-1, r, parts)  # as PEFT lays it out
        for part in range(parts):
            g = exact[f"{name}[{part}]" if parts > 1 else name]
            if not g.any():
                continue
            mine_a, mine_b = a[part], b[..., part]
            its_b, its_a = FORMULAS[method](g, r, mine.scaling["default"], a=mine_a)
            if method == "gora":
                assert (mine_b - its_b).norm() <= 1e-4 * its_b.norm()
                continue
            values = svd(g)[1]
            if values[r] > (1 - GAP) * values[r - 1]:
                continue
            compared += 1
            torch.testing.assert_close((mine_b.norm(), mine_a.norm()), (its_b.norm(), its_a.norm()), rtol=1e-3, atol=0)
            assert cosine(mine_b, its_b) >= 0.99, (name, part)
            assert cosine(mine_a.T, its_a.T) >= 0.99, (name, part)
    assert method == "gora" or compared >= 8
    with torch.no_grad():
        wanted = [model(**batch).loss for batch in batches]
        assert report.losses[1] < report.losses[0]
        # The step that was looked at is the start that was written: losses differ by their own rounding alone.
        torch.testing.assert_close(float(sum(wanted) / 2), report.losses[1], rtol=1e-6, atol=0)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        torch.testing.assert_close([again(**batch).loss for batch in batches], wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", ["lora-one", "lora-ga", "lora-ga-a2r"])
def test_an_expert_that_no_row_came_to_begins_as_peft_has_it_begin(method):
    base = made("Mixtral")
    model, batches = adapted(base, EXPERTS, r=4, target_modules=[]), labelled(1, shape=(1, 3))
    exact = exact_of(base, batches)
    empty = {name for name, g in exact.items() if "experts" in name and not g.any()}
    assert empty
    report = initialize(model, batches, method)
    for name in empty:
        path, part = name.removesuffix("]").split("[")
        mine = model.get_base_model().get_submodule(path.rpartition(".")[0])
        while mine.parameter_name != path.rpartition(".")[2]:
            mine = mine.base_layer
        a, b = (dict(m["default"].named_parameters())["weight"] for m in (mine.lora_A, mine.lora_B))  # what is trained
        a, b = a.view(4, 4, -1)[int(part)], b.view(-1, 4, 4)[..., int(part)]
        assert not b.any()
        assert (a.abs() <= a.shape[1] ** -0.5).all()
        assert torch.linalg.matrix_rank(a) == 4
        (note,) = (note for note in report.notes if note.startswith(f"{path}:"))
        assert part in note
    assert report.losses[1] < report.losses[0]


def test_a_forward_that_ends_in_the_middle_leaves_the_experts_their_parameters():
    model = adapted(made("Mixtral"), EXPERTS)
    before = state_of(model)
    inside = model.get_base_model().model.layers[1].mlp.experts.get_base_layer()

    for error in (RuntimeError("no more"), KeyboardInterrupt()):

        def fail(*_, error=error):
            raise error

        def loss_fn(model, batch, fail=fail):
            handle = inside.register_forward_hook(fail)
            try:
                return model(**batch).loss
            finally:
                handle.remove()

        with pytest.raises(type(error)):
            initialize(model, labelled(1), "lora-one", loss_fn=loss_fn)
        assert state_of(model) == before


def test_gradients_of_one_parameter_are_there_at_a_time():
    """Beside the frozen model's backward: two of them, as each expert's is added to the parameter's."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=128, num_hidden_layers=8, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=8,
    )  # fmt: skip
    base = MixtralForCausalLM(config).requires_grad_(False).eval()
    base.set_experts_implementation("eager")
    model = adapted(base, EXPERTS)
    (batch,) = labelled(1, shape=(1, 8))
    names = [n for n in exact_of(base, [batch]) if "experts" in n]
    gate_up = base.model.layers[0].mlp.experts.gate_up_proj
    right = {n: Asked(right=torch.ones(32 if "gate" in n else 128, 1)) for n in names}
    last = {n: one for n, one in right.items() if ".7." in n}
    most, few = (tensor_bytes(lambda a=a: told(model, [batch], a))[0] for a in (right, last))
    products = sum(4 * (256 if "gate" in n else 32) for n in names)
    assert most <= few + 3 * gate_up.nbytes + products
    assert few + 3 * gate_up.nbytes + products < 8 * 1.5 * gate_up.nbytes / 2  # or holding half of all would do


@pytest.mark.parametrize("method", OF_GRADIENTS)
def test_quantised_experts_are_refused_by_name(method):
    model = adapted(made("Mixtral"), EXPERTS)
    experts = model.get_base_model().model.layers[1].mlp.experts.get_base_layer()
    experts.down_proj = torch.nn.Parameter(experts.down_proj.data.to(torch.int8), requires_grad=False)
    with pytest.raises(
        ValueError, match=r"layers\.1\.mlp\.experts\.down_proj: down_proj of its MixtralExperts is quant"
    ):
        initialize(model, labelled(1), method)
