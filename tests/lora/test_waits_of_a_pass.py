"""How often the host waits for a GPU in a pass, counted on a simulated one."""

import itertools
from collections import Counter

import pytest
import torch

from eva_lora import EvaConfig, eva_initialize
from eva_lora.config import REFRESH_PERIOD
from support.models import lora, tiny_llama, token_batches
from support.peft_kinds import bert
from support.simulated_cuda import SimulatedCuda

REFRESH, NONFINITE, CLOSING = "streaming_svd/refresh.py", "collecting/run.py", "collecting/closing.py"
# Without the attentions' outputs: means over tokens, so nearly alike that bases of them are straightened.
WELL_CONDITIONED = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]


def padded(batches):
    masks = torch.ones(len(batches), *batches[0]["input_ids"].shape, dtype=torch.int64)
    masks[:, 1, 17:] = 0
    masks[:, 3, 9:] = 0
    return [{**batch, "attention_mask": mask} for batch, mask in zip(batches, masks, strict=True)]


def pinned(batches):
    """As a loader with ``pin_memory=True`` gives them."""
    return [{name: x.pin_memory() for name, x in batch.items()} for batch in batches]


def llama(device, **options):
    base = tiny_llama()
    base.set_attn_implementation("eager")
    return lora(base.to(device.device), **options)


def waits_of_pass(model, batches, device, **options):
    """Of each batch, how often the host waited, by the file of the package where it did; the last with all after it."""
    marks = []

    def loader():
        for batch in batches:
            marks.append(Counter(device.places))
            yield batch

    config = EvaConfig(max_batches=len(batches), **options)
    eva_initialize(model, loader(), config, progress=False)
    marks.append(Counter(device.places))
    found = []
    for before, after in itertools.pairwise(marks):
        files = Counter()
        for place, times in (after - before).items():
            files[place.partition(":")[0]] += times
        found.append(dict(files))
    return found


def waits_of_batches(model, batches, device, **options):
    """Of each batch but the last."""
    return waits_of_pass(model, batches, device, **options)[:-1]


@pytest.mark.parametrize("form", [list, padded, pytest.param(pinned, marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", [{}, {"statistic": "gram"}, {"convergence": "captured"}, {"share_inputs": False}])
def test_a_batch_waits_once(options, form):
    """In a refresh, which comes after 1, 2, 4 … batches, or to tell NaN; nowhere else, and no start of any input."""
    with SimulatedCuda() as device:
        model = llama(device, target_modules=WELL_CONDITIONED)
        found = waits_of_batches(model, form(token_batches(6)), device, **options)
    period = REFRESH_PERIOD[options.get("convergence", EvaConfig().convergence)]
    refreshes = [batch in (1, 2, 4) or period == 1 for batch in range(1, 6)]
    assert found == [{REFRESH: 1} if refresh else {NONFINITE: 1} for refresh in refreshes]


def test_a_refresh_that_straightens_bases_waits_once_more():
    with SimulatedCuda() as device:
        found = waits_of_batches(llama(device), token_batches(4), device)
    assert found == [{REFRESH: 2}, {REFRESH: 2}, {NONFINITE: 1}]


def test_batches_on_the_device_wait_once_more_to_count_their_rows():
    with SimulatedCuda() as device:
        model = llama(device, target_modules=WELL_CONDITIONED)
        there = [{name: x.to(device.device) for name, x in batch.items()} for batch in padded(token_batches(4))]
        found = waits_of_batches(model, there, device)
    assert found == [{REFRESH: 1, "collecting/masks.py": 1}] * 2 + [{NONFINITE: 1, "collecting/masks.py": 1}]


def test_rows_of_sequences_are_counted_on_the_host():
    """A pooler's, one of each sequence; here never enough of them for a refresh."""
    with SimulatedCuda() as device:
        base = bert()
        base.set_attn_implementation("eager")
        model = lora(base.to(device.device), target_modules=["query", "pooler.dense"])
        found = waits_of_batches(model, padded(token_batches(4)), device, oversampling=2.0)
    assert found == [{REFRESH: 1, NONFINITE: 1}, {REFRESH: 1, NONFINITE: 1}, {NONFINITE: 1}]


@pytest.mark.parametrize(
    ("statistic", "finishing"),
    [("subspace", "orthonormal/__init__.py"), ("gram", "streaming_svd/gram_statistic.py")],
)
def test_the_end_waits_twice_for_each_basis_and_once_for_all_else(statistic, finishing):
    """Each is made orthonormal, or solved for, and fetched. Adapters are written without a wait."""
    with SimulatedCuda() as device:
        model = llama(device, target_modules=WELL_CONDITIONED)
        waits = waits_of_pass(model, token_batches(3), device, statistic=statistic)
    inputs = 3 * 3  # each block's attention, gate and up, down
    assert waits[-1] == {NONFINITE: 1, REFRESH: 1, finishing: inputs, CLOSING: inputs + 1}
