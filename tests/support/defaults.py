"""A program: small runs of everything numeric under defaults of the process, and a hash of what each gave.

``python -m support.defaults dtype=bfloat16 device=meta`` prints a line for each, or the status that its process died
with. Inputs and models are made before the default is changed, as those of a user are.
"""

import hashlib
import json
import os
import sys
import tempfile
import warnings
from dataclasses import fields
from pathlib import Path

import torch

from eva_kernels import GramStatistic, SubspaceStatistic, orthonormalize, refresh_
from eva_kernels.symmetric_eigen import symmetric_eigen
from eva_lora import EvaConfig, EvaStatistics, apply, collect, plan
from support.models import lora_a_of
from support.tiny import fingerprint_of, tiny_batches, tiny_model


def hash_of(values):
    """To the last bit, dtypes and devices included."""
    total = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.Tensor):
            total.update(f"{value.dtype} {value.device} {tuple(value.shape)}".encode())
            value = value.detach().contiguous().view(-1).view(torch.uint8).numpy()
        total.update(value.tobytes() if hasattr(value, "tobytes") else repr(value).encode())
    return total.hexdigest()


def stream(kind, dtype, impl, batches):
    """Two statistics of halves of the batches, merged: every step that a statistic can take."""
    halves = []
    for half in (batches[::2], batches[1::2]):
        statistic = kind(24, 8, dtype=dtype, impl=impl, watch_gain=True)
        refreshed = []
        for rows, mask in half:
            statistic.accumulate_(rows, mask)
            refreshed += refresh_([statistic])
        halves.append(statistic)
    whole, other = halves
    whole.merge_(other)
    refreshed += refresh_([whole])
    whole.finish_()
    seen = [getattr(r, field.name) for r in refreshed for field in fields(r)]
    return hash_of([*whole.state().values(), *seen, whole.explained_variance_ratio()])


def inputs():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(90, 24, generator=generator) * 0.7 ** torch.arange(24) + 2 for _ in range(4)]
    masks = [torch.rand(90, generator=generator) < 0.8, None] * 2
    columns = torch.randn(40, 6, generator=generator)
    return {
        "float32": list(zip(rows, masks, strict=True)),
        "bfloat16": [(x.bfloat16(), mask) for x, mask in zip(rows, masks, strict=True)],
        "few directions": [(x[:3].repeat(30, 1), mask) for x, mask in zip(rows, masks, strict=True)],
        "constant": [(x[:1].repeat(90, 1), mask) for x, mask in zip(rows, masks, strict=True)],
    }, [columns, columns[:, [0, 1, 1, 2]], columns.double()]


def passes(models, batches, folder):
    """(name, hash) of whole passes: every criterion and statistic, ranks that move, what is random where rows lack."""
    for (name, options), model in models.items():
        statistics = collect(model, batches, EvaConfig(max_batches=6, **dict(options)), progress=False)
        again = EvaStatistics.load(statistics.save(folder / f"{name}.safetensors"))
        made = plan(again)
        apply(model, made)
        weights = [value for pair in sorted(lora_a_of(model).items()) for value in pair]
        yield name, hash_of([fingerprint_of(again), made.ranks, *weights])


def results_under(switch, value):
    streams, matrices = inputs()
    settings = {
        **{f"{c}, {s}": {"convergence": c, "statistic": s} for c in ("component", "subspace", "captured")
           for s in ("gram", "subspace")},
        "whitened": {"whiten": True},
        "one rank, gram": {"rho": 1, "statistic": "gram"},
        "one rank, subspace": {"rho": 1, "statistic": "subspace"},
        "whole budget": {"rho": 3.0},
    }  # fmt: skip
    if switch == "device":  # PEFT makes a layer of another rank on the default device
        settings = {name: options for name, options in settings.items() if name.startswith("one rank")}
    models = {(name, tuple(options.items())): tiny_model(rank=4) for name, options in settings.items()}
    batches = tiny_batches(6)
    if switch == "dtype":
        torch.set_default_dtype(getattr(torch, value))
    else:
        torch.set_default_device(value)
    result = {}
    for kind in (GramStatistic, SubspaceStatistic):
        for dtype in (torch.float32, torch.float64):
            for impl in ("auto", "reference"):
                for name, rows in streams.items():
                    result[f"{kind.kind} {dtype} {impl} {name}"] = stream(kind, dtype, impl, rows)
    result["orthonormal"] = hash_of([orthonormalize(matrix) for matrix in matrices])
    result["eigenpairs"] = hash_of([x for matrix in matrices for x in symmetric_eigen(matrix.mT @ matrix)])
    with tempfile.TemporaryDirectory() as folder:
        result.update(passes(models, batches, Path(folder)))
    return result


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for setting in sys.argv[1:]:  # in a fork each: this process has imported, and computed nothing
        child = os.fork()
        if child == 0:
            print(json.dumps(results_under(*setting.split("="))), flush=True)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            print(json.dumps({"exit": status}), flush=True)
