"""A simulator of the compiled kernels, where one is at hand.

It takes the place of Triton's driver for a whole process, so that these files are collected in a session of their own
only, which tests/triton_kernels/test_simulator.py starts and gives the simulator's folder.
"""

import os
import sys
from pathlib import Path

FOLDER = os.environ.get("EVA_SIMULATOR_OF_SESSION")
collect_ignore_glob = [] if FOLDER else ["test_*.py"]
if FOLDER:
    sys.path.insert(0, str(Path(FOLDER).parent))
