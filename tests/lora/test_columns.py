"""How many columns a statistic keeps for its candidates."""

import math

import pytest

from eva_lora import EvaConfig, collect
from eva_lora.config import COLUMNS_AT_ONCE, DEFAULT_OVERSAMPLING, EXTRA_COLUMNS
from support.models import lora, tiny_llama, token_batches

pytestmark = pytest.mark.filterwarnings("ignore:EVA stopped at")


@pytest.mark.parametrize(
    ("convergence", "candidates", "columns"),
    [
        ("subspace", 1, 48),
        ("subspace", 16, 48),
        ("subspace", 17, 64),
        ("subspace", 32, 80),
        ("subspace", 64, 160),
        ("component", 4, 48),
        ("component", 32, 64),
        ("captured", 64, 128),
    ],
)
def test_the_default(convergence, candidates, columns):
    assert EvaConfig(convergence=convergence).columns_for(candidates) == columns
    assert EvaConfig(convergence=convergence, oversampling=1.3).columns_for(candidates) == math.ceil(1.3 * candidates)


@pytest.mark.parametrize("convergence", DEFAULT_OVERSAMPLING)
def test_the_default_wastes_less_than_what_kernels_multiply_at_once(convergence):
    for candidates in range(1, 300):
        wanted = max(DEFAULT_OVERSAMPLING[convergence] * candidates, candidates + EXTRA_COLUMNS)
        columns = EvaConfig(convergence=convergence).columns_for(candidates)
        assert columns % COLUMNS_AT_ONCE == 0
        assert 0 <= columns - wanted < COLUMNS_AT_ONCE


@pytest.mark.parametrize(("oversampling", "columns"), [(None, {32, 48}), (2.5, {20})])
def test_a_pass_keeps_them_and_no_more_than_an_input_is_wide(oversampling, columns):
    config = EvaConfig(statistic="subspace", oversampling=oversampling, max_batches=2)
    collected = collect(lora(tiny_llama()), token_batches(), config, progress=False)  # rank 4, widths 32 and 48
    assert {len(entry.components) for entry in collected.inputs} == columns
