"""Tools that make the trainer themselves, run as their users run them: in a process, a folder and an environment."""

import json
import os
import subprocess
import sys

import peft
from transformers import AutoModelForCausalLM

from eva_lora import EvaPlan
from eva_lora.integrations.beginning import PLAN

from .pages import ROOT, blocks
from .texts import causal, tokenizer, words

LIMIT = 600  # seconds; the slowest takes 30 alone
QUIET = {
    "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1",
    "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), str(ROOT)]),
}  # fmt: skip


def write_files(folder, page):
    """A model, data in the forms that tools read, and a page's blocks, each under the name in its first line."""
    causal().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    texts = [(words(i, 4), words(50 + i, 6 + i % 5)) for i in range(12)]
    alpaca = [{"instruction": asked, "input": "", "output": answer} for asked, answer in texts]
    (folder / "data.json").write_text(json.dumps(alpaca), encoding="utf-8")
    shown = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
        for asked, answer in texts
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in shown), encoding="utf-8")
    (folder / "text").mkdir()
    plain = [{"text": f"{asked} {answer}"} for asked, answer in texts]
    (folder / "text" / "train.json").write_text(json.dumps(plain), encoding="utf-8")
    (folder / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "data.json"}}), encoding="utf-8")
    for block in blocks(page):
        first, _, rest = block.code.partition("\n")
        if block.language in ("python", "yaml") and first.startswith("# "):
            (folder / first.removeprefix("# ")).write_text(rest, encoding="utf-8")


def run(folder, *command, **environment):
    """A command in ``folder``, with Python's own before it."""
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env={**os.environ, **QUIET, **environment}, capture_output=True,
        text=True, timeout=LIMIT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def require_begun_with_eva(folder, adapter="."):
    """In ``folder`` is what one step left of an adapter that EVA began: PEFT loads it, A is the plan's, B has moved.

    As B was zero, A's first gradient is, too.
    """
    plan = EvaPlan.load(folder / PLAN)
    base = AutoModelForCausalLM.from_pretrained(folder.parent / "model")
    model = peft.PeftModel.from_pretrained(base, folder / adapter)
    found = {n: m for n, m in model.base_model.model.named_modules() if getattr(m, "lora_A", None)}
    assert len(set(plan.ranks.values())) > 1
    assert set(found) == {name for name, rank in plan.ranks.items() if rank}
    for name, layer in found.items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert a.shape[0] == b.shape[1] == plan.ranks[name]
        assert a.equal(plan.lora_a[name].to(a.dtype))
        assert b.any()
