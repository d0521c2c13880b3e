"""Plain records of a pass: its distinct inputs, what a forward calls them with, and what of a batch is run here."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from eva_kernels.streaming_svd import Sketch, Statistic

from ..adapters import LayerInput

__all__ = ["UNSHARED", "BatchShare", "Call", "DistinctInput", "version_of"]


def version_of(x: Tensor) -> int | None:
    """Which edit of a tensor this is; None of inference tensors, which keep no version and so are never shared."""
    return None if x.is_inference() else x._version


@dataclass(slots=True)
class Call:
    """One tensor that an input was called with in the current forward."""

    tensor: "Callable[[], Tensor | None]"  # a weak reference
    version: int | None
    waiting: int = 0  # layers that share the input, are wanted and have not been called with it yet
    held: LayerInput | None = None  # kept alive as long as there are such layers

    def is_same(self, x: Tensor) -> bool:
        return self.tensor() is x and self.version is not None and self.version == version_of(x)

    def taken(self) -> None:
        """One of the layers that were waited for has been called with it, or shares the input no longer."""
        self.waiting -= 1
        if self.waiting <= 0:
            self.held = None


UNSHARED = Call(lambda: None, None)  # stands for a tensor that no other layer will ask after


@dataclass
class DistinctInput:
    """One distinct layer input: the streams it feeds, their shared statistic, and this forward's calls."""

    statistic: Statistic
    reason: str
    streams: list[int]
    calls: list[Call] = field(default_factory=list)
    calls_made: dict[int, int] = field(default_factory=dict)  # stream -> how many of the calls
    is_new: bool = True  # made in the current batch: others may still join it
    pending_batches: int = 0  # batches folded in since the last refresh
    batch_rows: int = 0  # of the current batch, all calls together
    # Of a pass that several ranks make together:
    owner: int = -1  # the rank that does its algebra
    known_rows: int = 0  # of all ranks, at the end of the last batch
    sketch: Sketch | None = None  # of this rank's first rows, until all have started from the sketch of everybody's

    def forget_calls(self) -> None:
        """A forward begins or is over."""
        self.calls.clear()
        self.calls_made = dict.fromkeys(self.streams, 0)


@dataclass(frozen=True)
class BatchShare:
    """What of a batch that several ranks share is run here: so many samples, after those of the ranks before."""

    before: int
    own: int

    def first_row(self, num_rows: int) -> int:
        """How many rows come before these, where every sample has as many."""
        return num_rows * self.before // max(1, self.own)
