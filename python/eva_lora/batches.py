"""From a loader's batches to a model call, and which rows of it count."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .config import EvaConfig

ForwardFn = Callable[[nn.Module, Any], Any]
RowMaskFn = Callable[[Any], Tensor | None]


def first_batch(loader: Iterable[Any]) -> tuple[Any, Iterator[Any]]:
    """The loader's first batch, and an iterator that goes on with the second.

    Raises:
        TypeError: ``loader`` is not iterable.
        ValueError: it yields nothing.
    """
    try:
        iterator = iter(loader)
    except TypeError:
        raise TypeError(f"loader: expected an iterable of batches, got {type(loader).__name__}") from None
    try:
        return next(iterator), iterator
    except StopIteration:
        raise ValueError("loader: expected at least one batch, it is empty") from None


def endless(first: Any, rest: Iterator[Any], loader: Iterable[Any]) -> Iterator[Any]:
    """All batches, starting the loader again at its end for as long as it can start again."""
    yield first
    yield from rest
    if rest is loader:  # an iterator is its own iterator: it cannot start again
        return
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            return


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor in it on ``device``; the caller's batch is left alone."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        moved = {f.name: to_device(getattr(batch, f.name), device) for f in dataclasses.fields(batch) if f.init}
        return dataclasses.replace(batch, **moved)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def default_forward(model: nn.Module, batch: Any) -> Any:
    """Call the model as the batch's type suggests: keywords, positions, or one argument."""
    fields = _fields(batch)
    if fields is not None:
        return model(**{**fields, **_savings(model, fields)})
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def _fields(batch: Any) -> Mapping[str, Any] | None:
    if isinstance(batch, Mapping):
        return batch
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return None


def _savings(model: nn.Module, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords that spare a transformers model what nobody reads: its cache, its logits and its loss."""
    wrapper: Any = model
    base = wrapper.get_base_model() if hasattr(model, "get_base_model") else wrapper
    accepted = inspect.signature(base.forward).parameters
    savings: dict[str, Any] = {}
    if "use_cache" in accepted and "use_cache" not in fields:
        savings["use_cache"] = False
    if "logits_to_keep" in accepted and "logits_to_keep" not in fields:  # a decoder: labels serve its loss alone
        savings["logits_to_keep"] = 1
        if "labels" in fields:
            savings["labels"] = None
    return savings


@dataclass(frozen=True)
class RowMask:
    """Which rows of a batch count.

    Attributes:
        mask: (batch, tokens) bool, or None where every row counts.
        num_rows: How many rows count, None where only the layers' inputs can tell.
    """

    mask: Tensor | None
    num_rows: int | None

    def of(self, x: Tensor, site: str) -> tuple[Tensor | None, int]:
        """The mask of a layer input's rows, shape ``x.shape[:-1]``, and how many count; see :meth:`of_rows`."""
        return self.of_rows(tuple(x.shape[:-1]), x.device, site)

    def of_rows(self, rows: tuple[int, ...], device: torch.device, site: str) -> tuple[Tensor | None, int]:
        """The mask of rows laid out in shape ``rows``, and how many count.

        An input with one row per token takes the mask as it is, flattened or not; one with one row per
        sequence (a pooler's) counts the sequences with any unmasked token.

        Raises:
            ValueError: the input's rows match the mask in none of these ways.
        """
        if self.mask is None:
            return None, math.prod(rows)
        mask = self.mask.to(device)
        if rows == mask.shape:
            return mask, self._known(mask)
        if rows == (mask.numel(),):
            return mask.reshape(-1), self._known(mask)
        if rows == mask.shape[:1]:
            sequences = mask.any(1)
            return sequences, int(sequences.sum())
        raise ValueError(
            f"layer {site}: its input has rows in shape {rows}, which fits no row mask of shape "
            f"{tuple(mask.shape)} (batch, tokens); pass row_mask_fn to say which rows count"
        )

    def _known(self, mask: Tensor) -> int:
        return int(mask.sum()) if self.num_rows is None else self.num_rows


def row_mask(batch: Any, config: EvaConfig, row_mask_fn: RowMaskFn | None) -> RowMask:
    """attention_mask (default: all) and, where labels are per token, labels ≠ ``label_mask_value``.

    Raises:
        TypeError, ValueError: the mask, or what ``row_mask_fn`` returned, is no (batch, tokens) mask.
    """
    if row_mask_fn is not None:
        mask = row_mask_fn(batch)
        if mask is not None and not (isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.ndim >= 1):
            got = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"row_mask_fn: expected None or a bool tensor (batch, tokens), got {got}")
        return _counted(mask)
    fields = _fields(batch) or {}
    mask, labels, tokens = (fields.get(name) for name in ("attention_mask", "labels", "input_ids"))
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"attention_mask: expected shape (batch, tokens), got {shape}; pass row_mask_fn for another layout"
            )
        mask = mask != 0
    if config.use_label_mask and isinstance(labels, Tensor):
        like = mask if mask is not None else tokens
        if isinstance(like, Tensor) and labels.shape == like.shape:  # else labels are per sequence, not per token
            labelled = labels != config.label_mask_value
            mask = labelled if mask is None else mask & labelled
    return _counted(mask)


def _counted(mask: Tensor | None) -> RowMask:
    if mask is None or bool(mask.all()):
        return RowMask(None, None if mask is None else mask.numel())
    return RowMask(mask, int(mask.sum()))
