"""A newcomer's whole path, step by step: install, init on their own jsonl, train with TRL, export, load."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from support.bounds import gamma, require_as_near
from support.files import paragraphs, save_tiny_model, write_jsonl

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

TRAIN = """
from datasets import load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from eva_lora import EvaReport
from eva_lora.integrations.transformers import EvaReportCallback

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "run/adapter", is_trainable=True)
SFTTrainer(
    model,
    SFTConfig("out", max_steps=8, learning_rate=1e-2, max_length=64, report_to="none", use_cpu=True, bf16=False),
    train_dataset=load_dataset("json", data_files="mine.jsonl", split="train"),
    processing_class=AutoTokenizer.from_pretrained("base"),
    callbacks=[EvaReportCallback(EvaReport.load("run/report"))],
).train()
model.save_pretrained("out/adapter")
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The package as pip installs it from a clone, in a place of its own, and a way to run things with it alone."""
    source, site = tmp_path_factory.mktemp("clone") / "eva", tmp_path_factory.mktemp("site")
    left_out = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__", "_build_record.json")
    shutil.copytree(ROOT, source, ignore=left_out)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", site, source], check=True, timeout=900)
    environment = {**os.environ, "PYTHONPATH": str(site)}

    def run(*command, cwd):
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, cwd=cwd, env=environment, timeout=600
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return site, run


def logits(adapter, base, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.to(dtype).eval()(torch.arange(5, 45)[None]).logits


@pytest.mark.filterwarnings("ignore")  # the libraries' own
def test_from_install_to_a_served_adapter(installed, tmp_path):
    site, run = installed
    eva_lora = site / "bin" / "eva-lora"
    assert json.loads(run(eva_lora, "report", "--schema", cwd=tmp_path))["title"] == "EVA report"
    save_tiny_model(tmp_path / "base")
    texts = paragraphs(32)
    chats = [[{"role": "user", "content": "what is"}, {"role": "assistant", "content": text}] for text in texts]
    write_jsonl(tmp_path / "mine.jsonl", [{"messages": chat} for chat in chats])

    where = run(sys.executable, "-c", "import eva_lora; print(eva_lora.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(site)  # what runs is what pip installed
    run(eva_lora, "init", "base", "--data", "mine.jsonl", "--output", "run", "--rank", 4, cwd=tmp_path)
    assert torch.equal(logits(tmp_path / "run" / "adapter", tmp_path / "base"), logits(None, tmp_path / "base"))

    run(sys.executable, "-c", TRAIN, cwd=tmp_path)
    stored = json.loads((tmp_path / "out" / "eva_report" / "report.json").read_text())
    assert stored["run"]["data"].startswith("32 records of mine.jsonl")
    trained = logits(tmp_path / "out" / "adapter", tmp_path / "base")
    difference = (trained - logits(None, tmp_path / "base")).abs().max()
    assert difference > 0  # it has learned something: what has not gives the same bits, above

    run(eva_lora, "export", "out/adapter", "--output", "served", "--vllm", cwd=tmp_path)
    served = json.loads((tmp_path / "served" / "adapter_config.json").read_text())
    assert (served["r"], served["lora_alpha"], served["rank_pattern"]) == (8, 8, {})
    exact = logits(tmp_path / "out" / "adapter", tmp_path / "base", torch.float64)
    rounding = gamma(2 * 8) * float(exact.abs().max())  # ΔW of rank 8, written anew to a rounding of its factors
    require_as_near(logits(tmp_path / "served", tmp_path / "base"), trained, exact, rounding)
