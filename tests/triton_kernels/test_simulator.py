"""Whole passes through a simulator of the compiled kernels, where one is at hand: ``make simulate``.

``EVA_SIMULATOR`` names its folder, from the checkout's: a Python package whose ``driver`` takes the place of Triton's
and whose ``device`` has tensors that say they are on a GPU. Without it nothing is run.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SIMULATOR = Path(ROOT, os.environ.get("EVA_SIMULATOR", "none")).resolve()


@pytest.mark.slow
@pytest.mark.skipif(not (SIMULATOR / "driver.py").exists(), reason="no simulator of the compiled kernels at hand")
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_passes_with_simulated_kernels(capability):
    tests = Path(__file__).parent / "simulated"
    settings = {"EVA_SIMULATOR_OF_SESSION": str(SIMULATOR), "GPU_SIM_CAPABILITY": str(capability)}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", str(tests)],
        cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True,
    )  # fmt: skip
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-5_000:]
