"""Whole passes on devices that are simulated: what A captures, against the same pass on the CPU.

One lacks float64, and every operator that MPS lacks; the other is a CUDA device.
"""

import copy

import pytest
import torch

from eva_kernels._double import home_of
from eva_lora import EvaConfig, collect, compare, eva_initialize
from support.bounds import EXACT_CAPTURES, SUMMARY_CAPTURES, gamma, orthonormality
from support.captures import exactly, require_as_much
from support.models import (
    captured_share,
    initialise,
    load_minilm,
    lora,
    lora_a_of,
    minilm_text_batches,
    scatter,
    tiny_llama,
    token_batches,
)
from support.peft_kinds import KINDS
from support.simulated_cuda import SimulatedCuda
from support.simulated_device import SimulatedDevice, not_on

LINEARS = r".*layer\.\d\.(attention\.self\.query|attention\.output\.dense|intermediate\.dense)"
RANK = 8
ON_CUDA = [
    "DoRA",
    "two adapters",
    "bfloat16 base",
    "Conv2d",
    "MultiheadAttention",
    "experts of Mixtral",
    "encoder with a pooler",
]


@pytest.fixture(params=["without float64", "cuda"])
def simulated(request):
    home_of.cache_clear()
    with SimulatedCuda() if request.param == "cuda" else SimulatedDevice(operators=not_on("MPS")) as device:
        yield device
    home_of.cache_clear()


def plain_attention(model):
    """With attention of operations that a device without kernels of its own has."""
    model.set_attn_implementation("eager")
    return model


def llama():
    return plain_attention(tiny_llama())


@pytest.fixture(scope="module")
def minilm():
    """The model with adapters, real text, and of every layer the exact scatter and the best that A can hold."""
    torch.manual_seed(0)
    model = lora(plain_attention(load_minilm()), r=RANK, target_modules=LINEARS)
    batches = [{name: tensor[:8, :64] for name, tensor in batch.items()} for batch in minilm_text_batches()[:3]]
    return model, batches, exactly(model, batches, RANK)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"statistic": "gram"}, marks=pytest.mark.slow),
        {"statistic": "subspace"},
        pytest.param({"statistic": "subspace", "convergence": "captured"}, marks=pytest.mark.slow),
    ],
    ids=lambda options: "-".join(options.values()),
)
def test_a_pass_on_minilm_misses_no_more_than_twice_what_it_misses_on_the_cpu(options, minilm, simulated):
    model, batches, exact = minilm
    config = EvaConfig(max_batches=3, rho=1, impl="reference", **options)
    here, there = copy.deepcopy(model), copy.deepcopy(model).to(simulated.device)
    eva_initialize(here, batches, config, progress=False)
    report = eva_initialize(there, batches, config, progress=False)
    assert all(a.device == simulated.device for a in lora_a_of(there).values())
    assert report.num_batches == 3
    require_as_much(lora_a_of(there), lora_a_of(here), exact, RANK)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nonfinite": "skip"},
        {"share_inputs": False},
        pytest.param({"whiten": True}, marks=pytest.mark.slow),
        {"statistic": "gram"},
    ],
    ids=str,
)
def test_options_work_there(options, simulated):
    model = lora(llama().to(simulated.device))
    report = initialise(model, **options)
    plain = initialise(lora(llama()), **options)
    assert report.ranks == plain.ranks


@pytest.mark.parametrize("kind", [kind.parameter() for kind in KINDS if kind.name in ON_CUDA])
def test_every_kind_of_layer_is_captured_on_a_gpu(kind):
    expected, batches = kind.record(kind.base(), kind.batches()), kind.batches()
    model = kind.model()
    if hasattr(model.get_base_model(), "set_attn_implementation"):
        plain_attention(model.get_base_model())
    with SimulatedCuda() as device:
        model.to(device.device)
        config = EvaConfig(max_batches=len(batches), tau=1.0, **kind.config)
        report = eva_initialize(model, batches, config, progress=False)
        matrices = {name: [a.cpu() for a in parts] for name, parts in kind.matrices(model).items()}
    assert {name for name, rank in report.ranks.items() if rank} == set(matrices)
    for name, parts in matrices.items():
        bar = EXACT_CAPTURES if report.statistic[name]["kind"] == "gram" else SUMMARY_CAPTURES
        for a, rows in zip(parts, expected[name], strict=True):
            assert len(rows) <= len(a) or captured_share(a, scatter(rows)) >= bar, name


def test_the_reference_is_chosen(simulated):
    """Not compiled code, which would read the memory of another device."""
    model = lora(llama().to(simulated.device))
    statistics = collect(model, token_batches(), EvaConfig(max_batches=1), progress=False)
    assert {entry.eigenvalues.device.type for entry in statistics.inputs} == {"cpu"}


def test_rows_that_are_not_finite_are_named(simulated):
    model = lora(llama().to(simulated.device))
    with torch.no_grad():
        model.get_base_model().model.layers[1].self_attn.o_proj.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"NaN or Inf reached the input of model\.layers\.1\.mlp\.gate_proj"):
        initialise(model)


def test_a_pass_that_was_cut_off_goes_on_to_the_bit(tmp_path, simulated):
    def a_pass(batches, **options):
        model = lora(llama().to(simulated.device))
        eva_initialize(model, batches, EvaConfig(max_batches=6), progress=False, **options)
        return lora_a_of(model)

    def cut_off():
        yield from token_batches()[:3]
        raise KeyboardInterrupt

    saving = {"checkpoint": tmp_path / "state", "checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        a_pass(cut_off(), **saving)
    resumed, whole = a_pass(token_batches(), **saving), a_pass(token_batches())
    assert all(torch.equal(resumed[name].cpu(), whole[name].cpu()) for name in whole)


def test_directions_there_can_be_compared(simulated):
    model = lora(llama().to(simulated.device))
    initialise(model, max_batches=1, min_rank=1)
    directions = lora_a_of(model)
    overlaps = compare(directions, directions).overlap
    assert overlaps.keys() == directions.keys()
    for name, a in directions.items():  # the mean square of what the columns of an orthonormal basis have in common
        rank, width = a.shape
        assert abs(overlaps[name] - 1) <= 2 * (orthonormality(width, rank) + gamma(width))
