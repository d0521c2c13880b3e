"""The installed command line."""

import os
import subprocess
import sys
from pathlib import Path

EVA_LORA = Path(sys.executable).with_name("eva-lora")


def eva_lora(*arguments, cwd=None, **environment):
    """The installed command, run as a user runs it."""
    return subprocess.run(
        [EVA_LORA, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment},
        timeout=300,
    )  # fmt: skip
