"""One file holds tensors and facts: safetensors, with the facts as JSON in its header. Loading runs no code."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT_VERSION = 1


def save(path: str | Path, kind: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Path:
    """Write the file beside its place and move it there: a reader never sees half of it.

    Raises:
        IsADirectoryError: ``path`` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"path: expected a file name for the {kind}, got the folder {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"kind": kind, "format_version": str(FORMAT_VERSION), "facts": json.dumps(facts, allow_nan=False)}
    handle, staging = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, staging, metadata=header)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(staging, 0o666 & ~umask)
        os.replace(staging, path)
    except BaseException:
        Path(staging).unlink(missing_ok=True)
        raise
    return path


def load(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of another kind, or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        facts = json.loads(header.get("facts", "null"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"path: {path} is damaged or no {kind} file: {error}") from error
    if header.get("kind") != kind or not isinstance(facts, dict):
        raise ValueError(f"path: expected a {kind} file, {path} holds {header.get('kind', 'something else')!r}")
    if header.get("format_version") != str(FORMAT_VERSION):
        raise ValueError(
            f"path: {path} has format version {header.get('format_version')}, this version reads {FORMAT_VERSION}"
        )
    return tensors, facts
