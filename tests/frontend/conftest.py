import json
import os

import pytest

from eva_lora import EvaConfig, eva_initialize
from support.browser import launched
from support.command import eva_lora
from support.files import paragraphs, save_tiny_model, write_jsonl
from support.models import lora, tiny_llama, token_batches


@pytest.fixture(scope="session")
def report():
    """Of a run that ends before every layer has converged."""
    with pytest.warns(UserWarning, match="EVA stopped at"):
        return eva_initialize(lora(tiny_llama()), token_batches(), EvaConfig(max_batches=4), progress=False)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder with a tiny model and a jsonl file."""
    folder = tmp_path_factory.mktemp("files")
    before = os.getcwd()
    os.chdir(folder)
    try:
        save_tiny_model(folder / "base")
        write_jsonl(folder / "train.jsonl", [{"text": text} for text in paragraphs(48)])
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(scope="session")
def run_folder(files):
    """What ``eva-lora init`` leaves, and what it printed."""
    done = eva_lora(
        "init", "base", "--data", "train.jsonl", "--output", "run", "--rank", 4, "--alpha", 8, "--max-length", 64,
        "--rho", 1.5, "--oversampling", 2.5, "--seed", 3, "--json", cwd=files,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "EVA:" not in done.stderr  # no progress line off a terminal
    return files / "run", json.loads(done.stdout)


@pytest.fixture(scope="session")
def browser():
    yield from launched()
