"""Switches of the whole process, which a user or another library may have set, change no bit of a result."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eva_lora import export_uniform
from eva_lora.reporting import load_directions
from support.tiny import tiny_model

TESTS = Path(__file__).parents[1]
SETTINGS = ["dtype=float32", "dtype=bfloat16", "dtype=float16", "dtype=float64", "device=meta"]


@pytest.fixture(scope="module")
def found():
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, "-m", "support.defaults", *SETTINGS]
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, timeout=300, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(SETTINGS), done.stderr[-2000:]
    return dict(zip(SETTINGS, lines, strict=True))


@pytest.mark.parametrize("setting", SETTINGS[1:])
def test_no_default_of_the_process_changes_a_bit(setting, found):
    """On the meta device whatever is made there without saying so has no content, and no pass gets to its end."""
    expected = found["dtype=float32"]
    assert len(expected) >= 34
    assert "exit" not in found[setting], "the process died"
    assert len(found[setting]) >= 34
    assert [name for name, digest in found[setting].items() if digest != expected[name]] == []


def test_no_default_device_changes_what_files_of_weights_hold(tmp_path):
    tiny_model(rank=2).save_pretrained(tmp_path)

    def read(out):
        weights = load_directions(export_uniform(tmp_path, tmp_path / out, rank=4))
        assert len(weights) == 10
        return {**{f"exported {name}": a for name, a in weights.items()}, **load_directions(tmp_path)}

    expected = read("plain")
    with torch.device("meta"):
        found = read("meta")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
