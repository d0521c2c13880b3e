"""A loader's batches one after the other, what they held, and how to stand at the same place again."""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..planning import raw_bytes

__all__ = ["DIGEST_BYTES", "END", "BatchReader", "Position", "fingerprint"]

DIGEST_BYTES = 8
END = object()  # in the place of a batch, where a round through the loader is over
_NO_BATCH = bytes(DIGEST_BYTES)  # in the place of a fingerprint, where only other ranks had a batch


@dataclass(frozen=True)
class Position:
    """A place in a stream.

    Attributes:
        digests: The fingerprint of every batch before it; zeros where only other ranks of the pass had one.
        loader_state: The loader's own ``state_dict()`` there, None if it has none.
    """

    digests: list[bytes]
    loader_state: Any | None


class BatchReader:
    """All batches of a loader, which is started again at its end for as long as it can start again.

    Args:
        loader: Any iterable; an iterator cannot start again.
        fingerprints: Whether to keep the fingerprint of every batch, so that :meth:`position` can be asked for.
        position: Where to go on. A loader with ``state_dict()`` and ``load_state_dict()`` is set there; another
            is read again from its start, and each batch compared with what was seen.
        may_be_empty: Whether a loader without a single batch will do: other ranks may have some.
        may_be_none: Whether None may stand for a batch, as for a ``forward_fn`` that makes its own.

    Raises:
        TypeError: ``loader`` is not iterable, or is a text or one batch.
        ValueError: it yields nothing, or does not yield what it did before ``position``; from the methods, too:
            it yields None.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        *,
        fingerprints: bool = False,
        position: Position | None = None,
        may_be_empty: bool = False,
        may_be_none: bool = False,
    ) -> None:
        self._loader, self._fingerprints, self._may_be_none = loader, fingerprints, may_be_none
        self.digests: list[bytes] = []
        self._num_read = 0
        positioned = position is not None and position.loader_state is not None and _has_position(loader)
        if positioned:
            loader.load_state_dict(position.loader_state)  # type: ignore[union-attr,attr-defined]
        try:
            self._current = iter(None if isinstance(loader, (str, bytes, Mapping)) else loader)  # type: ignore[arg-type]
        except TypeError:
            raise TypeError(f"loader: expected an iterable of batches, got {type(loader).__name__}") from None
        self._ahead: list[Any] = []
        self._empty = True  # nothing has come of this round through the loader
        if position is None:
            if not may_be_empty:
                self._look_ahead()
        elif positioned:
            self.digests, self._empty = list(position.digests), False
            self._num_read = len(self.digests)
        else:
            self._replay(position.digests)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        batch = self.take()
        if batch is END and self.again():
            batch = self.take()
        if batch is END:
            raise StopIteration
        return batch

    def take(self) -> Any:
        """The next batch of this round through the loader, :data:`END` where it is over."""
        batch = self._ahead.pop() if self._ahead else self._read()
        if self._fingerprints and batch is not END:
            self.digests.append(fingerprint(batch))
        return batch

    def again(self) -> bool:
        """Begin another round; False where the loader cannot start again, or the last round was empty."""
        if self._empty or self._current is self._loader:
            return False
        self._current, self._empty = iter(self._loader), True
        return True

    def pass_over(self) -> None:
        """Note that only other ranks had a batch."""
        if self._fingerprints:
            self.digests.append(_NO_BATCH)

    def position(self) -> Position:
        """The place before the next batch."""
        return Position(self.digests, _state_of(self._loader))

    def _read(self) -> Any:
        for batch in self._current:
            self._empty = False
            self._num_read += 1
            if batch is None and not self._may_be_none:
                raise ValueError(
                    f"loader: expected batches, batch {self._num_read} is None; a collate function that drops samples "
                    "may be left with none"
                )
            return batch
        return END

    def _look_ahead(self) -> None:
        self._ahead.append(self._read())
        if self._ahead[0] is END:
            raise ValueError("loader: expected at least one batch, it is empty")

    def _replay(self, digests: list[bytes]) -> None:
        for number, seen in enumerate(digests, 1):
            batch = self._read()
            if batch is END and seen != _NO_BATCH and self.again():
                batch = self._read()
            if batch is END and seen != _NO_BATCH:
                raise ValueError(
                    f"loader: expected the {len(digests)} batches that the checkpoint has seen, it ended after "
                    f"{number - 1}; pass a loader that starts over, or delete the checkpoint to begin again"
                )
            if batch is not END and fingerprint(batch) != seen:
                raise ValueError(
                    f"loader: batch {number} of {len(digests)} differs from the one that the checkpoint has seen; pass "
                    "a loader that yields the same batches in the same order (seed what shuffles them), or delete "
                    "the checkpoint to begin again"
                )
            self.digests.append(seen)


def _has_position(loader: Any) -> bool:
    return callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None))


def _state_of(loader: Any) -> Any | None:
    """The loader's place, None if it keeps none: it is then read again from its start."""
    if not _has_position(loader):
        return None
    try:
        return loader.state_dict()
    except (AttributeError, NotImplementedError):  # accelerate's wrapper has the methods whether or not its loader does
        return None


def fingerprint(batch: Any) -> bytes:
    """A hash of a batch: structure, tensors, arrays, numbers and text. Other objects count by their type alone."""
    total = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for piece in _pieces(batch):
        total.update(piece)
    return total.digest()


def _pieces(value: Any) -> Iterator[bytes | memoryview]:
    if isinstance(value, Tensor) and value.is_nested:
        yield f"nested {value.dim()};".encode()
        yield from _pieces(list(value.unbind()))
    elif isinstance(value, Tensor):
        if value.is_quantized or value.layout.__repr__() != "torch.strided":
            value = value.dequantize() if value.is_quantized else value.to_dense()
        yield f"tensor {value.dtype} {tuple(value.shape)};".encode()
        yield raw_bytes(value)
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        yield f"array {value.dtype} {value.shape};".encode()
        yield value.tobytes()
    elif isinstance(value, Mapping) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
        entries = value if isinstance(value, Mapping) else {f.name: getattr(value, f.name) for f in _fields_of(value)}
        yield f"mapping {len(entries)};".encode()
        for name, entry in entries.items():
            yield f"{name!r}:".encode("utf-8", "surrogatepass")
            yield from _pieces(entry)
    elif isinstance(value, (list, tuple)):
        yield f"sequence {len(value)};".encode()
        for entry in value:
            yield from _pieces(entry)
    elif value is None or isinstance(value, (str, bytes, int, float, complex, np.generic)):
        yield f"{type(value).__name__} {value!r};".encode("utf-8", "surrogatepass")
    else:
        yield f"{type(value).__name__};".encode()


def _fields_of(value: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(value)
