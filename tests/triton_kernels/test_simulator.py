"""Whole passes through a simulator of the compiled kernels, where one is at hand: ``make simulate``.

``EVA_SIMULATOR`` names its folder, from the checkout's: a Python package whose ``driver`` takes the place of Triton's
and whose ``device`` has tensors that say they are on a GPU. Without it nothing is run, nor with one that cannot take
that place: a simulator knows of the kernels' launches, and is made for some of their versions.
"""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SIMULATOR = Path(ROOT, os.environ.get("EVA_SIMULATOR", "none")).resolve()


INSTALL = """
import sys
from importlib import import_module
folder, name = sys.argv[1:]
sys.path.insert(0, folder)
import_module(f"{name}.device")
import_module(f"{name}.driver").install(real_device=True)
"""


@cache
def unfit(simulator: Path) -> str:
    """Why a simulator cannot take the driver's place in this tree; nothing where it can."""
    if not (simulator / "driver.py").exists():
        return "no simulator of the compiled kernels at hand"
    result = subprocess.run(
        [sys.executable, "-c", INSTALL, str(simulator.parent), simulator.name], cwd=ROOT, capture_output=True, text=True
    )
    if result.returncode == 0:
        return ""
    return f"the simulator in {simulator} does not fit these kernels: {result.stderr.strip().splitlines()[-1]}"


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
def test_passes_with_simulated_kernels(capability):
    if reason := unfit(SIMULATOR):
        pytest.skip(reason)
    tests = Path(__file__).parent / "simulated"
    settings = {"EVA_SIMULATOR_OF_SESSION": str(SIMULATOR), "GPU_SIM_CAPABILITY": str(capability)}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", str(tests)],
        cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True,
    )  # fmt: skip
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-5_000:]


def test_a_simulator_of_other_kernels_is_named(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "device.py").touch()
    (other / "driver.py").write_text("def install(*, real_device):\n    raise AttributeError('address_table')\n")
    assert unfit(other) == f"the simulator in {other} does not fit these kernels: AttributeError: address_table"
    assert unfit(tmp_path / "none") == "no simulator of the compiled kernels at hand"
