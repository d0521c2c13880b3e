"""Forward passes of the frozen model, whose rows are folded into a run's statistics."""

import time
import warnings
from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..adapters import ModelOutline, is_partitioned, waits_for_others
from .batches import ForwardFn, default_forward, named_fields, to_device
from .ending import WHOLE_AT_FIRST
from .making import device_of
from .masks import RowMaskFn, frame_mask_of, origins_of, row_mask
from .origins import Origins
from .rerunning import ForwardState
from .rows import INSIDE, RowMask, sides_of
from .run import Run

__all__ = ["Forwards", "input_device"]


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
        self._frame_mask = frame_mask_of(outline.modules)
        self._can_look = not any(map(is_partitioned, outline.parameters))
        self.device, self.in_step = input_device(outline), waits_for_others(outline)
        # What waits for others gathers its parameters in a forward, which is no edit.
        parameters = [] if self.in_step else outline.parameters
        self._state = ForwardState(outline.modules, parameters, {p.device for p in outline.parameters})

    def fold(self, batch: Any, *, only: Collection[int] | None = None) -> RowMask:
        """Run one batch; ``only`` as in :meth:`Capture.batch`. Returns which rows counted.

        Raises:
            ValueError: NaN or Inf has reached a layer, and no refresh comes that will tell.
            RuntimeError: the forward has to be run again, and has edited a tensor, or reads what it kept.
        """
        run = self._run
        # The mask first: counted where the loader left it, no device has to be waited for.
        mask = self.mask_of(batch)
        if mask.num_rows == 0:
            if self.in_step:
                self.idle(batch)
            return mask
        tick = time.perf_counter()
        if self._can_look and mask.leaves_rows_out and mask.memory.is_unsure():
            mask.origins = origins_of(batch, mask, run.config)
        with run.capture.batch(mask, only=only):
            if mask.origins is None:
                self._run_forward(batch)
            else:
                self._look(batch, mask, mask.origins)
        run.seconds["forward"] += time.perf_counter() - tick
        if not run.refresh_tells_nonfinite():
            run.require_finite(run.num_batches + 1, partial(self.count_nonfinite, batch, mask, only=only))
        return mask

    def mask_of(self, batch: Any) -> RowMask:
        """Which rows of a batch count."""
        return row_mask(
            batch, self._run.config, self._row_mask_fn, encoder_decoder=self._two_sided,
            invocation=self._run.invocation, frame_mask=self._frame_mask, memory=self._run.row_rules.memory,
        ).to(self.device)  # fmt: skip

    def _look(self, batch: Any, mask: RowMask, origins: Origins) -> None:
        """One forward, looked at operation by operation; again without that, where an operation cannot be looked at."""
        unknown = self.note(batch)
        try:
            # What compiled code does is not seen: it runs as it was written, this once.
            with torch.compiler.set_stance("force_eager"), origins:
                self._run_forward(batch)
        except NotImplementedError:  # PyTorch's word for an operator that has no rule for a mode
            if unknown or not self._state.restore():
                raise
            mask.origins, self._can_look = None, False
            self._run.capture.again()
            self._run_forward(batch)

    def _run_forward(self, batch: Any) -> None:
        """One forward, spared its rest where that is safe; where it turns out not to be, again, and whole."""
        number, end = self._run.num_batches, self._run.capture.end
        spared = end.spares
        # What cannot be put back, after a forward that may have to be run again, has to be left alone: it runs whole.
        whole = spared and (not _is_plain(batch) or bool(self.note(batch)))
        again = end.run(lambda: self._forward(self._model, to_device(batch, self.device)), number, whole=whole)
        if spared and not end.spares and number >= WHOLE_AT_FIRST:
            warnings.warn(
                f"batch {number + 1}: {end.reason}, as in no batch before; no row is missed, but from here on every "
                "forward runs whole",
                stacklevel=5,
            )
        if again:
            if not self._state.restore():
                raise RuntimeError(
                    f"batch {number + 1}: {end.reason}, so its forward has to be run again, but it has edited the "
                    "batch, a parameter, a buffer or another tensor that the model holds; run with early_stop=False"
                )
            self._run.capture.again()
            try:
                self._forward(self._model, to_device(batch, self.device))
            except Exception as error:
                if not end.kept:
                    raise
                raise RuntimeError(
                    f"batch {number + 1}: {end.reason}, so its forward has to be run again, but it reads what was "
                    "kept; run with early_stop=False"
                ) from error

    def note(self, batch: Any, *, contents: bool = False) -> str:
        """Note all that a forward with a batch may change; :meth:`restore` puts it back. See :class:`ForwardState`."""
        return self._state.note(_leaves(batch), contents=contents)

    def restore(self) -> bool:
        """Put back what was noted. Returns whether that was possible."""
        return self._state.restore()

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


def _leaves(batch: Any) -> list[Any]:
    fields = named_fields(batch)
    return tree_leaves(batch if fields is None else dict(fields))


def _is_plain(batch: Any) -> bool:
    """Whether there is nothing in a batch but tensors, numbers and text, and containers of them."""
    return all(leaf is None or isinstance(leaf, (Tensor, str, bytes, int, float, complex)) for leaf in _leaves(batch))


def input_device(outline: ModelOutline) -> torch.device:
    """Where batches go: where the first of its modules computes."""
    device = device_of(outline.modules)
    if device is None:
        raise ValueError("model: every parameter is on the meta device; load the base model's weights first")
    return device
