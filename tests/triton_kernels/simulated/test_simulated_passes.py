"""Whole passes on a simulated GPU that executes the kernels as they are compiled for it."""

import itertools
import os
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest
import torch

from eva_lora import EvaConfig, eva_initialize
from support.captures import exactly, require_as_much
from support.models import lora, lora_a_of, tiny_llama, token_batches

NAME = Path(os.environ["EVA_SIMULATOR_OF_SESSION"]).name
device, driver = (import_module(f"{NAME}.{part}") for part in ("device", "driver"))

RANK = 4
WELL_CONDITIONED = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
PRODUCTS = {
    "gram": {"_totals_kernel", "_gram_kernel", "_mirror_kernel"},
    "subspace": {"_project_kernel", "_lift_kernel"},
}
# Where the model's own operations are called, or are looked at by the package.
OF_THE_MODEL = ("collecting/batches.py", "collecting/origins.py", "collecting/ending.py")


def llama(dtype):
    base = tiny_llama().to(dtype)
    base.set_attn_implementation("eager")
    return lora(base, r=RANK, target_modules=WELL_CONDITIONED)


def padded(count):
    batches = token_batches(count)
    for batch in batches:
        mask = torch.ones_like(batch["input_ids"])
        mask[1, 17:] = 0
        batch["attention_mask"] = mask
    return batches


def own_waits():
    """By file of the package, how often the host has waited so far."""
    found = Counter()
    for (_, where), times in device.SYNCS.items():
        package, _, file = where.partition("/")
        if package in ("eva_kernels", "eva_lora") and not file.startswith(OF_THE_MODEL):
            found[file.partition(":")[0]] += times
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("statistic", ["gram", "subspace"])
def test_a_pass(statistic, dtype, masked):
    batches = padded(4) if masked else token_batches(4)
    # So few columns that both miss what a summary misses, beside which rounding of 16-bit operands is small.
    options = {"rho": 1, "max_batches": len(batches), "statistic": statistic, "oversampling": 2.5}
    here, there = llama(dtype), llama(dtype)
    exact = exactly(here, batches, RANK)
    eva_initialize(here, batches, EvaConfig(impl="reference", **options), progress=False)
    driver.SIMULATOR.launches.clear()
    device.SYNCS.clear()
    marks = []

    def loader():
        for batch in batches:
            marks.append(own_waits())
            yield batch

    with device.Device():
        driver.install(real_device=True)
        there = device.to_device(there)
        eva_initialize(there, loader(), EvaConfig(**options), progress=False)
        found = {name: a.cpu() for name, a in lora_a_of(there).items()}
    require_as_much(found, lora_a_of(here), exact, RANK)
    assert {*PRODUCTS[statistic], "_jacobi_kernel"} <= set(driver.SIMULATOR.counts)
    waits = [dict(after - before) for before, after in itertools.pairwise(marks)]
    assert waits == [{"streaming_svd/refresh.py": 1}, {"streaming_svd/refresh.py": 1}, {"collecting/run.py": 1}]
    print(f"{statistic}, {dtype}, {'masked' if masked else 'all rows'}: {dict(driver.SIMULATOR.counts)}")
