import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eva_lora import EvaConfig, eva_initialize
from support.files import paragraphs, save_tiny_model, write_jsonl
from support.models import lora, tiny_llama, token_batches

EVA_LORA = Path(sys.executable).with_name("eva-lora")


def eva_lora(*arguments, cwd=None, **environment):
    """The installed command, run as a user runs it."""
    return subprocess.run(
        [EVA_LORA, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment},
        timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="session")
def report():
    """Of a run that ends before every layer has converged."""
    with pytest.warns(UserWarning, match="EVA stopped at"):
        return eva_initialize(lora(tiny_llama()), token_batches(), EvaConfig(max_batches=4), progress=False)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder with a tiny model and a jsonl file."""
    folder = tmp_path_factory.mktemp("files")
    with contextlib.chdir(folder):
        save_tiny_model(folder / "base")
        write_jsonl(folder / "train.jsonl", [{"text": text} for text in paragraphs(48)])
    return folder


@pytest.fixture(scope="session")
def run_folder(files):
    """What ``eva-lora init`` leaves, and what it printed."""
    done = eva_lora(
        "init", "base", "--data", "train.jsonl", "--output", "run", "--rank", 4, "--alpha", 8, "--max-length", 64,
        "--rho", 1.5, "--seed", 3, "--json", cwd=files,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "EVA:" not in done.stderr  # no progress line off a terminal
    return files / "run", json.loads(done.stdout)
