"""Forward passes of the frozen model, whose rows are folded into a run's statistics."""

import time
from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import nn

from ..adapters import ModelOutline, waits_for_others
from .batches import ForwardFn, default_forward, to_device
from .making import device_of
from .masks import INSIDE, RowMask, RowMaskFn, row_mask, sides_of
from .run import Run

__all__ = ["Forwards"]


class Forwards:
    """Forward passes of the frozen model, whose rows are folded into a run's statistics.

    Attributes:
        device: Where batches go.
        in_step: Whether a forward waits for those of other ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        outline: ModelOutline,
        run: Run,
        forward_fn: ForwardFn | None,
        row_mask_fn: RowMaskFn | None,
    ) -> None:
        self._model, self._run, self._row_mask_fn = model, run, row_mask_fn
        self._forward = forward_fn or default_forward
        self._two_sided, inside = sides_of(outline.modules, run.sites)
        run.row_rules.memory.sides.update(dict.fromkeys(inside, INSIDE))
        self.device, self.in_step = _input_device(outline), waits_for_others(outline)

    def fold(self, batch: Any, *, only: Collection[int] | None = None) -> RowMask:
        """Run one batch; ``only`` as in :meth:`Capture.batch`. Returns which rows counted.

        Raises:
            ValueError: NaN or Inf has reached a layer, and no refresh comes that will tell.
        """
        run = self._run
        # The mask first: counted where the loader left it, no device has to be waited for.
        mask = row_mask(
            batch, run.config, self._row_mask_fn, encoder_decoder=self._two_sided, invocation=run.invocation,
            memory=run.row_rules.memory,
        ).to(self.device)  # fmt: skip
        if mask.num_rows == 0:
            if self.in_step:
                self.idle(batch)
            return mask
        batch = to_device(batch, self.device)
        tick = time.perf_counter()
        with run.capture.batch(mask, only=only):
            self._forward(self._model, batch)
        run.seconds["forward"] += time.perf_counter() - tick
        if not run.refresh_tells_nonfinite():
            run.require_finite(run.num_batches + 1, partial(self.count_nonfinite, batch, mask, only=only))
        return mask

    def count_nonfinite(self, batch: Any, mask: RowMask, *, only: Collection[int] | None = None) -> dict[str, int]:
        """Rows of a batch that hold NaN or Inf, by layer: a second forward, unless other ranks would wait for it."""
        again = mask.counting()
        if not self.in_step:
            with self._run.capture.batch(again, only=only):
                self._forward(self._model, to_device(batch, self.device))
        return again.skipped

    def idle(self, batch: Any) -> None:
        """Run a batch of which nothing counts, for the ranks that would wait for this one."""
        with self._run.capture.batch(RowMask(None, 0), only=()):
            self._forward(self._model, to_device(batch, self.device))


def _input_device(outline: ModelOutline) -> torch.device:
    """Where batches go: where the first of its modules computes."""
    device = device_of(outline.modules)
    if device is None:
        raise ValueError("model: every parameter is on the meta device; load the base model's weights first")
    return device
