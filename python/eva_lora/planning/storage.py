"""One file holds tensors and facts: safetensors, with the facts as JSON in its header. Loading runs no code."""

import dataclasses
import hashlib
import json
import os
import tempfile
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, Union

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT_VERSION = 4

D = TypeVar("D")


def save(path: str | Path, kind: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Path:
    """Write the file beside its place, push it to the disk and move it there: a reader never sees half of it.

    Raises:
        IsADirectoryError: ``path`` is a folder.
        OSError: it cannot be written there; what was there before still is.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"path: expected a file name for the {kind}, got the folder {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    written = json.dumps(facts, allow_nan=False)
    tensors = _apart({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    header = {
        "kind": kind,
        "format_version": str(FORMAT_VERSION),
        "facts": written,
        "digest": digest(kind, tensors, written),
    }
    handle, staging = tempfile.mkstemp(prefix=_staging_prefix(path), dir=path.parent)
    os.close(handle)
    try:
        save_file(tensors, staging, metadata=header)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(staging, 0o666 & ~umask)
        _push_to_disk(staging)
        os.replace(staging, path)
        if os.name == "posix":  # the move itself is an entry of the folder
            _push_to_disk(path.parent)
    except BaseException:
        Path(staging).unlink(missing_ok=True)
        raise
    return path


def load(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what ``save`` wrote, whole and as it was written, or not at all.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of another kind, or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: there is no file {path}")
    try:
        with torch.device("cpu"), safe_open(path, framework="pt") as file:  # whatever the process's default is
            header = file.metadata() or {}
            if header.get("kind") != kind:
                raise ValueError(f"path: expected a {kind} file, {path} holds {header.get('kind', 'something else')!r}")
            if header.get("format_version") != str(FORMAT_VERSION):
                raise ValueError(
                    f"path: {path} has format version {header.get('format_version')}, "
                    f"this version reads {FORMAT_VERSION}"
                )
            # Copies: what a mapped file gives changes with the file.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(f"path: {path} is damaged or no {kind} file: {error}") from error
    written = header.get("facts", "")
    if header.get("digest") != digest(kind, tensors, written):
        raise ValueError(f"path: {path} is damaged or no {kind} file: its content does not match its digest")
    try:
        facts = json.loads(written, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"path: {path} is damaged or no {kind} file: {error}") from error
    if not isinstance(facts, dict):
        raise ValueError(f"path: {path} is damaged or no {kind} file: expected named facts")
    return tensors, facts


def remove_leftovers(path: str | Path) -> None:
    """Delete what a process that was killed while it wrote ``path`` has left beside it."""
    path = Path(path)
    for staging in path.parent.glob(f"{_staging_prefix(path)}*"):
        staging.unlink(missing_ok=True)


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, each in memory of its own: safetensors writes no two from one."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return result


def _staging_prefix(path: Path) -> str:
    return f".{path.name}-"


def _push_to_disk(path: str | Path) -> None:
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")


def digest(kind: str, tensors: Mapping[str, Tensor], facts: str) -> str:
    """A hash of everything a file holds: against damage, not against forgery."""
    total = hashlib.blake2b(f"{kind}\n{facts}\n".encode("utf-8", "surrogatepass"), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode("utf-8", "surrogatepass"))
        total.update(raw_bytes(tensor))
    return total.hexdigest()


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's elements, in order; copied only from another device or layout."""
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def checked(cls: type[D], values: Any, **others: Any) -> D:
    """``cls(**values, **others)`` for a dataclass, where ``values`` comes from a file.

    Raises:
        TypeError: ``values`` is no mapping, lacks a field, has one too many, or one of another type.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"expected the fields of a {cls.__name__}, got {type(values).__name__}")
    declared = typing.get_type_hints(cls)
    fields = {field.name for field in dataclasses.fields(cls)} - set(others)  # type: ignore[arg-type]
    if set(values) != fields:
        raise TypeError(f"{cls.__name__}: expected the fields {sorted(fields)}, got {sorted(values)}")
    return cls(**{name: _as(declared[name], value, name) for name, value in values.items()}, **others)


def _as(expected: Any, value: Any, name: str) -> Any:
    """``value``, read from JSON, as the declared type; JSON knows lists alone where a type may be a tuple."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any:
        return value
    if expected is float and type(value) is int and abs(value) < 2**63:
        return float(value)
    if origin in (Union, types.UnionType):
        for option in arguments:
            try:
                return _as(option, value, name)
            except TypeError:
                continue
    elif origin is typing.Literal:
        if value in arguments:
            return value
    elif origin in (list, tuple):
        if isinstance(value, list):
            return origin(_as(arguments[0], entry, name) for entry in value)
    elif origin is dict:
        if isinstance(value, dict):
            return {key: _as(arguments[1], entry, name) for key, entry in value.items()}
    elif type(value) is expected and not (expected is int and abs(value) >= 2**63):
        return value
    raise TypeError(f"{name}: expected {getattr(expected, '__name__', expected)}, got {type(value).__name__}")
