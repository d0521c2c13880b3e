"""Where a result comes from: the command that made it, and the versions it depends on."""

import importlib.metadata
import platform
import shlex
import sys
from pathlib import Path

from eva_kernels._build import cpu_form

__all__ = ["command_line", "versions"]


def command_line() -> str:
    """The command this process was started with; "" in a notebook or at a prompt, where none says anything."""
    program = Path(sys.argv[0]).name if sys.argv else ""
    if program in ("", "-c") or "ipykernel" in program:
        return ""
    start = ["python", *sys.argv] if program.endswith(".py") else [program, *sys.argv[1:]]
    return shlex.join(start)


def versions() -> dict[str, str]:
    """The installed versions that a result depends on, and which form of the compiled code for a CPU runs."""
    versions = {"python": platform.python_version()}
    for name in ("eva-kernels", "torch", "triton", "peft", "transformers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**versions, "cpu_form": cpu_form() or "none"}
