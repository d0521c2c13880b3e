"""A pass whose forwards somebody else's function makes of the batches: the model is called as it is in a training."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ..adapters import ModelOutline
from ..config import DEFAULT_MAX_BATCHES, EvaConfig
from ..distributed import ProcessGroup, joined
from ..planning import EvaStatistics
from .masks import RowMaskFn
from .reader import END, BatchReader
from .restoring import borrowed
from .watcher import watching

__all__ = ["collect_calls"]


def collect_calls(
    model: nn.Module,
    loader: Iterable[Any],
    forward: Callable[[Any], object],
    config: EvaConfig,
    *,
    row_mask_fn: RowMaskFn | None = None,
    process_group: ProcessGroup = None,
) -> EvaStatistics:
    """As :func:`eva_lora.collect`, but ``forward(batch)`` calls the model, how and how often it likes.

    Which rows count is read from these calls, as :func:`eva_lora.watching` does. Of several ranks a round through the
    loaders ends where the first of them does.

    Raises:
        Exception: as :func:`eva_lora.watching` and :func:`eva_lora.collect`.
    """
    ranks = joined(process_group)
    size = 1 if ranks is None else ranks.size

    def everywhere(number: bool) -> bool:
        return number if ranks is None else ranks.agree([int(number)])[0] == size

    with (
        borrowed(ModelOutline(model)),
        watching(
            model, config, row_mask_fn=row_mask_fn, without_adapter=True, process_group=process_group
        ) as watch,
    ):  # fmt: skip
        reader = BatchReader(loader)
        for _ in range(config.max_batches or DEFAULT_MAX_BATCHES):
            batch = reader.take()
            if not everywhere(batch is not END):
                if not everywhere(reader.again()):
                    break
                batch = reader.take()
                if not everywhere(batch is not END):
                    break
            forward(batch)
            if everywhere(bool(watch.stop_reason)):
                break
    return watch.statistics()
