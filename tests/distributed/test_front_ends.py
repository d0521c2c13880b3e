"""The launchers people use: torchrun with the command line, accelerate, Ray Train."""

import ast
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eva_lora import EvaPlan, EvaStatistics
from support.agreement import require_equal, rounding_of_scatters
from support.bounds import require_same_directions
from support.command import EVA_LORA, eva_lora
from support.files import paragraphs, save_tiny_model, write_jsonl
from support.models import lora, tiny_llama, token_batches

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.slow


def launch(*command, cwd):
    """What a Python command prints."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=900,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    save_tiny_model(folder / "base")
    write_jsonl(folder / "train.jsonl", [{"text": text} for text in paragraphs(32)])
    return folder


OPTIONS = ["--data", "train.jsonl", "--rank", "4", "--batch-size", "4", "--statistic", "gram", "--no-shuffle"]


def test_the_command_line_under_torchrun_finds_what_it_finds_alone(workplace):
    alone = eva_lora("init", "base", *OPTIONS, "--max-batches", "8", "--output", "alone", cwd=workplace)
    assert alone.returncode == 0, alone.stderr
    out = launch(
        "-m", "torch.distributed.run", "--nproc-per-node", 2, "--no-python", EVA_LORA, "init", "base", *OPTIONS,
        "--max-batches", "4", "--output", "together", "--json", cwd=workplace,
    )  # fmt: skip
    printed = json.loads(out)  # one object: only one rank speaks
    assert printed["report"]["num_batches"] == 4
    one, both = (EvaStatistics.load(workplace / name / "statistics.safetensors") for name in ("alone", "together"))
    rounding = rounding_of_scatters(lambda: lora(tiny_llama()), token_batches(count=-(-one.num_rows // (4 * 24))))
    require_equal(both, one, rounding)
    ours, theirs = (EvaPlan.load(workplace / name / "plan.safetensors").lora_a for name in ("alone", "together"))
    sources = {site.name: one.inputs[site.input] for site in one.sites}
    for name, a in ours.items():
        values, off = sources[name].eigenvalues, rounding * sources[name].total_scatter
        require_same_directions(theirs[name], a, values, off)
    saved = load_file(workplace / "together" / "adapter" / "adapter_model.safetensors")
    assert all(not value.any() for name, value in saved.items() if "lora_B" in name)


def test_a_process_that_is_refused_ends_the_command_under_torchrun(workplace):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python", EVA_LORA, "init",
         "base", "--data", "missing.jsonl", "--output", "refused"],
        cwd=workplace, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode != 0
    assert "data: there is no missing.jsonl" in done.stderr
    assert not (workplace / "refused").exists()


def test_the_accelerate_example_on_two_processes(tmp_path):
    out = launch(
        "-m", "accelerate.commands.launch", "--cpu", "--num_processes", 2, "--num_machines", 1,
        "--mixed_precision", "no", "--dynamo_backend", "no", EXAMPLES / "accelerate_loop.py", cwd=tmp_path,
    )  # fmt: skip
    ranks, *losses = out.strip().splitlines()
    assert len(set(ast.literal_eval(ranks).values())) > 1
    assert all(torch.tensor([float(loss) for loss in losses]).isfinite())
    assert len(losses) == 4


@pytest.mark.skipif(not find_spec("ray"), reason="no ray")
def test_the_ray_train_example_with_two_workers(tmp_path):
    out = launch(EXAMPLES / "ray_train.py", cwd=tmp_path)
    metrics = ast.literal_eval(out.strip().splitlines()[-1])
    assert metrics["rows"] == 2 * 4 * 4 * 24
    assert len(set(metrics["ranks"])) > 1
