"""The three convergence criteria, through the one call."""

import pytest

from eva_lora import EvaConfig, eva_initialize
from support.models import captured_share, layer_inputs, lora, lora_a_of, scatter, tiny_llama, token_batches

TAU = 0.95  # once bases agree to that, they capture as much
CRITERIA = ["component", "subspace", "captured"]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_run_ends_once_every_layer_has_converged(criterion):
    model, batches = lora(tiny_llama()), token_batches(4)
    rows = layer_inputs(model, batches)
    report = eva_initialize(model, batches, EvaConfig(convergence=criterion, tau=TAU), progress=False)
    assert report.stop_reason == "all layers converged"
    assert all(report.converged.values())
    for name, a in lora_a_of(model).items():
        assert captured_share(a, scatter(rows[name])) >= TAU


def test_a_captured_gain_has_to_be_small_three_times_in_a_row():
    report = eva_initialize(
        lora(tiny_llama()), token_batches(), EvaConfig(convergence="captured", tau=0.0), progress=False
    )
    assert report.num_batches == 2  # asked for nothing
    report = eva_initialize(
        lora(tiny_llama()), token_batches(), EvaConfig(convergence="captured", tau=1e-9), progress=False
    )
    assert report.num_batches >= 4  # the first gain is known at the second refresh


@pytest.mark.parametrize("criterion", CRITERIA)
def test_reruns_are_bit_equal(criterion):
    config = EvaConfig(convergence=criterion, tau=0.9)
    first, second = lora(tiny_llama()), lora(tiny_llama())
    reports = [eva_initialize(model, token_batches(), config, progress=False) for model in (first, second)]
    assert reports[0].ranks == reports[1].ranks
    assert reports[0].num_batches == reports[1].num_batches
    ours, theirs = lora_a_of(first), lora_a_of(second)
    assert all((ours[name] == theirs[name]).all() for name in ours)
