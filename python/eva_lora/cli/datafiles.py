"""Data files as records: jsonl, text, csv, parquet or a ``datasets`` folder, and where in them a record stands."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .running import reason

__all__ = ["Place", "describe_files", "read_records"]

#: Reader of the ``datasets`` library by file ending.
FORMATS = {
    ".jsonl": "json",
    ".json": "json",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}


def read_records(paths: Sequence[str | Path], *, split: str = "train", limit: int | None = None) -> Any:
    """The records of all files together, as one ``datasets.Dataset``.

    Args:
        paths: Files with a known ending, all of one format, or one folder that ``datasets`` saved.
        split: Which part of a saved ``DatasetDict``.
        limit: Use only so many records, the first ones.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: another format, a damaged file (the line is named where there are lines), files with different
            fields, no such split, or no records.
        ImportError: ``datasets`` is not installed.
    """
    try:
        import datasets  # noqa: F401 - whether it is there
    except ImportError as error:
        raise ImportError("data: reading it needs the datasets library: pip install datasets") from error
    files = [Path(path) for path in paths]
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"data: there is no {file}")
    records = _saved_dataset(files[0], split) if len(files) == 1 and files[0].is_dir() else _read_files(files)
    if limit is not None:
        records = records.select(range(min(limit, len(records))))
    if len(records) == 0:
        raise ValueError(f"data: {_names(files)} holds no records")
    return records


def _read_files(files: Sequence[Path]) -> Any:
    kinds = {FORMATS.get(file.suffix.lower()) for file in files}
    kind = kinds.pop()
    if kinds or kind is None:
        expected = ", ".join(FORMATS)
        raise ValueError(f"data: expected files of one format ({expected}) or one folder, got {_names(files)}")
    for file in files:
        if not file.is_file():
            raise ValueError(f"data: expected a file, {file} is a folder")
        if not file.stat().st_size:
            raise ValueError(f"data: {file} holds no records")
    try:
        return _load(kind, files)
    except Exception as error:  # readers raise as they please
        if kind == "json":
            _require_objects(files)
        if len(files) > 1:
            _require_equal_fields(kind, files)
        raise ValueError(
            f"data: {_names(files)} cannot be read as {kind}: {reason(error.__cause__ or error)}"
        ) from error


def _load(kind: str, files: Sequence[Path]) -> Any:
    import datasets

    options = {"delimiter": "\t"} if files[0].suffix.lower() == ".tsv" else {}
    return datasets.load_dataset(kind, data_files=[str(file) for file in files], split="train", **options)


def _require_objects(files: Sequence[Path]) -> None:
    """Raises ValueError naming the first line that is no JSON object, or the first file without any."""
    for file in files:
        text = file.read_bytes().strip()
        if not text:
            raise ValueError(f"data: {file} holds no records")
        if file.suffix.lower() == ".json" and _is_json(text):
            continue
        for number, line in enumerate(text.splitlines(), 1):
            try:
                value = json.loads(line) if line.strip() else {}
            except ValueError as error:
                raise ValueError(f"data: {file}, line {number}: expected a JSON object, got {_cut(line)}") from error
            if not isinstance(value, dict):
                raise ValueError(f"data: {file}, line {number}: expected a JSON object, got {_cut(line)}")


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _cut(line: bytes) -> str:
    text = line.decode("utf-8", "replace").strip()
    return text if len(text) <= 60 else f"{text[:59]}…"


def _require_equal_fields(kind: str, files: Sequence[Path]) -> None:
    """Raises ValueError naming the first file that cannot be read alone, or has other fields than the first."""
    fields: list[str] = []
    for file in files:
        try:
            found = sorted(_load(kind, [file]).column_names)
        except Exception as error:
            raise ValueError(f"data: {file} cannot be read as {kind}: {reason(error.__cause__ or error)}") from error
        fields = fields or found
        if found != fields:
            raise ValueError(
                f"data: expected files of the same fields, {files[0]} has {', '.join(fields)}, "
                f"{file} has {', '.join(found)}"
            )


def _saved_dataset(folder: Path, split: str) -> Any:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except FileNotFoundError as error:
        raise ValueError(f"data: {folder} is no folder saved by datasets' save_to_disk") from error
    except Exception as error:
        raise ValueError(f"data: {folder} cannot be read: {reason(error)}") from error
    if not isinstance(loaded, Mapping):
        return loaded
    if split not in loaded:
        raise ValueError(f"data: {folder} has no split {split!r}; it has {sorted(loaded)}")
    return loaded[split]


@dataclass(frozen=True)
class Place:
    """Where a record stands; its text is made, and files are counted, only when a message needs it.

    Attributes:
        index: Among the records of all files together, from 0.
        paths: As given to :func:`read_records`; empty: the message names no file.
    """

    index: int
    paths: tuple[Path, ...] = ()

    def __str__(self) -> str:
        *named, number = self._parts()
        return ", ".join([*named, f"record {number}"])

    def _parts(self) -> Iterator[str]:
        number = self.index
        for path in self.paths:
            size = number + 1 if path == self.paths[-1] else len(_load(FORMATS[path.suffix.lower()], [path]))
            if number < size:
                yield str(path)
                break
            number -= size
        yield str(number + 1)


def describe_files(paths: Sequence[str | Path], num_records: int) -> str:
    """Names, sizes and digests, by which data can be recognised again."""
    described = []
    for path in map(Path, paths):
        if path.is_file():
            digest = hashlib.sha256()
            with path.open("rb") as file:
                for block in iter(lambda: file.read(1 << 20), b""):
                    digest.update(block)
            described.append(f"{path} ({path.stat().st_size:,} bytes, sha256 {digest.hexdigest()[:16]}…)")
        else:
            described.append(str(path))
    return f"{num_records:,} records of {', '.join(described)}"


def _names(files: Sequence[Path]) -> str:
    return ", ".join(str(file) for file in files)
