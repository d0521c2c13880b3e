"""docs/quick-start.md, followed word by word in a fresh environment."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from eva_lora import EvaReport
from support.pages import ROOT, blocks

pytestmark = pytest.mark.slow

PAGE = "docs/quick-start.md"


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The files of this tree, none of what was built of it."""
    target = tmp_path_factory.mktemp("clone") / "eva-kernels"
    left_out = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__", "_build_record.json")
    shutil.copytree(ROOT, target, ignore=left_out)
    return target


def script(folder):
    """The page's shell blocks, one after another; a Python block that names a file is saved as that."""
    lines = ["set -euo pipefail"]
    for block in blocks(PAGE):
        if block.language == "python":
            name = block.code.splitlines()[0].removeprefix("# ")
            (folder / name).write_text(block.code, encoding="utf-8")
        else:
            lines.append(block.code)
    return "\n".join(lines)


def test_a_stranger_who_copies_every_block_arrives(clone, tmp_path):
    left_behind = ("PYTHON", "EVA_", "VIRTUAL_ENV", "CONDA", "OMP_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(left_behind)}
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to(Path(sys.base_prefix) / "bin" / "python3")
    environment |= {"HOME": str(tmp_path), "PATH": f"{tmp_path / 'bin'}:/usr/local/bin:/usr/bin:/bin"}
    done = subprocess.run(
        ["bash", "-c", script(clone)], cwd=clone, env=environment, capture_output=True, text=True, timeout=2700
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "logits bit-identical to the base model's" in done.stdout
    assert (clone / "demo" / "eva_report" / "report.html").is_file()
    report = EvaReport.load(clone / "run" / "report")
    assert len(report.ranks) == 210
    assert report.num_batches == 8
    assert len([line for line in done.stdout.splitlines() if line.startswith("step ")]) == 4
    assert (clone / "trained" / "adapter_model.safetensors").is_file()
    assert EvaReport.load(clone / "report").num_batches == 8
    assert (clone / "adapter" / "adapter_model.safetensors").is_file()
