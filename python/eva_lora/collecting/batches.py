"""From a loader's batches to a model call."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from eva_kernels.streaming_svd import sent

ForwardFn = Callable[[nn.Module, Any], Any]


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor in it on ``device``; the caller's batch is left alone.

    Mappings (as dicts), dataclasses, tuples and lists are gone through, packed sequences moved by their own
    ``to``; everything else is passed on as it is. To a GPU nothing waits, unless a tensor is large and not pinned.
    """
    if isinstance(batch, Tensor):
        return sent(batch, device)
    if isinstance(batch, PackedSequence):
        return batch.to(device)  # type: ignore[arg-type]
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
    fields = named_fields(batch)
    if fields is not None:
        return model(**fields)
    if isinstance(batch, (tuple, list)) and not isinstance(batch, PackedSequence):
        return model(*batch)
    return model(batch)


def named_fields(batch: Any) -> Mapping[str, Any] | None:
    """The fields of a mapping or dataclass, None for a batch without names."""
    if isinstance(batch, Mapping):
        return batch
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return None
