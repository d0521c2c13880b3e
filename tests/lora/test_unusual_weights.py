"""Methods on weights that something else holds too, that PEFT saves itself, that are of any size, or are not scaled."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from eva_lora import EvaConfig, export_plain, initialize, load_adapter
from support.models import tiny_llama

UNIT = 2.0**-24


class Net(nn.Module):
    """Two layers, and what may share memory with them."""

    def __init__(self, first, second, table=None):
        super().__init__()
        for name, weight in (("first", first), ("second", second)):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight = nn.Parameter(weight)
            setattr(self, name, layer)
        if isinstance(table, nn.Parameter):
            self.table = nn.Embedding(*table.shape)
            self.table.weight = table
        elif table is not None:
            self.register_buffer("table", table)

    def forward(self, x):
        return self.second(self.first(x))


def matrix(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slice_of_an_embedding():
    table = nn.Parameter(matrix(60, 24))
    return Net(table.data[36:], matrix(24, 24), table)


def overlapping_layers():
    both = matrix(40, 24)
    return Net(both[:24], both[16:])


def buffer_of_its_own():
    weight = matrix(24, 24)
    return Net(weight, matrix(24, 24), weight.detach())


def beyond_a_longer_one():
    """A slice that no neighbour in memory overlaps but one that began before."""
    table = nn.Parameter(matrix(90, 24))
    return Net(table.data[2:26], table.data[60:84], table)


def repeated_rows():
    return Net(matrix(24, 24), matrix(1, 24).expand(24, 24))


def overlapping_rows():
    return Net(matrix(24, 24), torch.as_strided(matrix(60), (24, 24), (1, 1)))


@pytest.mark.parametrize("method", ["pissa", "milora"])
@pytest.mark.parametrize(
    "make",
    [
        slice_of_an_embedding,
        overlapping_layers,
        buffer_of_its_own,
        beyond_a_longer_one,
        repeated_rows,
        overlapping_rows,
    ],
)
def test_a_weight_that_shares_memory_stays_as_it_is(make, method):
    net, x = make(), matrix(5, 24, seed=1)
    before, tables = net(x), [value.clone() for value in net.state_dict().values()]
    model = get_peft_model(net, LoraConfig(r=4, lora_alpha=4, target_modules=["first", "second"]))
    names = [n for n in model.state_dict() if "lora_" not in n]
    report = initialize(model, method=method)
    assert any("base weights stay as they are" in note for note in report.notes)
    assert [torch.equal(model.state_dict()[n], value) for n, value in zip(names, tables, strict=True)] == [True] * len(
        names
    )
    torch.testing.assert_close(model(x), before)
    assert torch.equal(model.get_submodule("base_model.model.first").base_layer.weight, net.first.base_layer.weight)


def test_weights_side_by_side_in_one_storage_are_moved():
    both = matrix(48, 24)
    model = get_peft_model(Net(both[:24], both[24:]), LoraConfig(r=4, lora_alpha=4, target_modules=["first", "second"]))
    report = initialize(model, method="pissa")
    assert not any("stay as they are" in note for note in report.notes)
    assert report.layers["first"].rounding is not None


@pytest.mark.parametrize("method", ["pissa", "mica"])
@pytest.mark.parametrize("save_embedding_layers", ["auto", False])
def test_an_output_head_comes_back(tmp_path, method, save_embedding_layers):
    """PEFT saves with the adapter what is left of its weight, which is not the base's."""
    base = tiny_llama()
    assert base.lm_head.weight is not base.model.embed_tokens.weight
    x = {"input_ids": torch.arange(12).reshape(2, 6)}
    whole = base(**x).logits.detach()
    targets = ["q_proj", "lm_head"]
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, lora_alpha=4, target_modules=targets))
    initialize(model, method=method)
    with torch.no_grad():
        for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter += 0.05 * matrix(*parameter.shape, seed=i)
    trained = model(**x).logits.detach()
    assert (trained - whole).norm() > 1e-3 * whole.norm()
    model.save_pretrained(tmp_path / "saved", save_embedding_layers=save_embedding_layers)
    found = [load_adapter(copy.deepcopy(base), tmp_path / "saved")]
    for name, source in (("model", model), ("folder", tmp_path / "saved")):
        export_plain(source, tmp_path / name)
        if method == "pissa":
            assert not [key for key in load_file(tmp_path / name / "adapter_model.safetensors") if "base_layer" in key]
        found.append(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name))
    for loaded in found:
        torch.testing.assert_close(loaded(**x).logits, trained, rtol=1e-4, atol=1e-5)
        with loaded.disable_adapter():
            torch.testing.assert_close(loaded(**x).logits, whole, rtol=1e-4, atol=1e-5)


def test_an_output_head_stays_as_it_was_where_loading_fails(tmp_path):
    """What PEFT loads before it meets a tensor of another shape is what is left of the head."""
    base = tiny_llama()
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "lm_head"]))
    initialize(model, method="pissa")
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    saved = load_file(file)
    (left,) = (value for key, value in saved.items() if key.endswith("lm_head.base_layer.weight"))
    key = next(key for key in saved if "q_proj" in key and "lora_A" in key)
    save_file(saved | {key: saved[key][:3].contiguous()}, file)
    head, whole = base.lm_head, base.lm_head.weight.detach().clone()
    assert not torch.equal(left, whole)
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_adapter(base, tmp_path)
    assert torch.equal(head.weight, whole)


def test_an_embedding_s_adapter_beside_a_started_one_is_named(tmp_path):
    targets = ["q_proj", "embed_tokens"]
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=4, target_modules=targets))
    initialize(model, method="pissa")
    with pytest.raises(ValueError, match=r"embed_tokens is an embedding's adapter, which is no sum"):
        export_plain(model, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize("alpha", [0, -4])
@pytest.mark.parametrize("method", ["pissa", "milora", "mica"])
def test_a_scaling_that_is_not_positive_is_refused(method, alpha):
    net = Net(matrix(24, 24), matrix(24, 24))
    model = get_peft_model(net, LoraConfig(r=4, lora_alpha=alpha, target_modules=["first", "second"]))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"^model: first has a scaling of {alpha / 4:g}: expected a positive one"):
        initialize(model, method=method)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("power", [-110, -70, -40, 40, 60])
@pytest.mark.parametrize("method", ["pissa", "milora"])
@pytest.mark.parametrize("shape", [(24, 24), (300, 200)], ids=str)
def test_weights_of_any_size_start_alike(shape, method, power):
    """Times a power of two B A is B A times it, to the bit where A and B are, which take its root each."""
    products, shares = [], []
    for factor in (0, power):
        net = Net(torch.ldexp(matrix(*shape), torch.tensor(factor)), matrix(24, shape[0]))
        model = get_peft_model(net, LoraConfig(r=4, lora_alpha=4, target_modules=["first"]))
        report = initialize(model, method=method)
        layer = model.get_submodule("base_model.model.first")
        b, a = (part["default"].weight.detach().double() for part in (layer.lora_B, layer.lora_A))
        assert b.isfinite().all()
        products.append(torch.ldexp(b @ a, torch.tensor(-factor)))
        shares.append(report.layers["first"].weight_share)
    assert (products[0] - products[1]).norm() <= 1e-6 * products[0].norm()
    assert shares[1] == pytest.approx(shares[0], rel=1e-6)


def inputs(strength):
    """Rows whose directions fall off slowly but for the first, of that standard deviation."""
    generator = torch.Generator().manual_seed(1)
    turn = torch.linalg.qr(torch.randn(96, 96, generator=generator, dtype=torch.float64)).Q
    lengths = torch.arange(1, 97, dtype=torch.float64) ** -0.7
    lengths[0] = strength
    rows = torch.randn(24, 64, 96, generator=generator, dtype=torch.float64) * lengths @ turn.T
    return [{"x": part.float()} for part in rows]


@pytest.mark.parametrize(
    ("strength", "keep_moments", "told"), [(10.0, False, False), (1000.0, False, True), (1000.0, True, False)]
)
def test_a_massive_direction_of_inputs_is_said_or_does_no_harm(strength, keep_moments, told):
    batches, weight = inputs(strength), matrix(80, 96)
    model = get_peft_model(Net(weight.clone(), matrix(8, 80)), LoraConfig(r=8, lora_alpha=8, target_modules=["first"]))
    config = EvaConfig(rho=1.0, tau=1.0, max_batches=len(batches), keep_moments=keep_moments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # not converged
        report = initialize(model, batches, "corda", config, progress=False)
    notes = [note for note in report.notes if "one direction of inputs" in note]
    assert bool(notes) == told
    assert not told or notes[0].startswith("1 layers, first the first,")
    if keep_moments:
        rows = torch.cat([batch["x"] for batch in batches]).double()
        u, s, _ = torch.linalg.svd(weight.double() @ (rows.T @ rows / len(rows)))
        assert s[7] - s[8] > 0.01 * s[7]
        layer = model.get_submodule("base_model.model.first")
        b, a = (part["default"].weight.detach().double() for part in (layer.lora_B, layer.lora_A))
        exact = u[:, :8] @ (u[:, :8].T @ weight.double())
        assert (b @ a - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize(("wrong", "error", "message"), [
    ({"method": ["pissa"]}, ValueError, r"method: expected one of \('eva', "),
    ({"method": "pissa", "budget": "8"}, TypeError, "budget: expected an integer or None, got '8'"),
    ({"method": "pissa", "budget": True}, TypeError, "budget: expected an integer or None, got True"),
])  # fmt: skip
def test_arguments_of_another_type_are_named(wrong, error, message):
    model = get_peft_model(Net(matrix(24, 24), matrix(24, 24)), LoraConfig(r=4, target_modules=["first"]))
    with pytest.raises(error, match=f"^{message}"):
        initialize(model, **wrong)
