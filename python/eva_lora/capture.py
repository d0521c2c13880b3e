"""Forward hooks that fold each distinct layer input into its statistic, once, while it is alive."""

import itertools
import time
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from eva_kernels.streaming_svd import Sketch, Statistic, SubspaceStatistic

from .adapters import LoraSite, Rows, Taken
from .batches import RowMask
from .restoring import without_autocast

if TYPE_CHECKING:
    from .distributed import TensorParallel

MakeStatistic = Callable[[int], tuple[Statistic, str]]  # stream -> its statistic, and why this kind


class ForwardComplete(Exception):
    """Raised from the last hook of a forward to end it there."""


@dataclass
class Call:
    """One tensor that an input was called with in the current forward."""

    tensor: "weakref.ref[Tensor]"
    version: int | None
    held: Taken | None  # kept alive only until every layer that shares the input has been called with it

    def is_same(self, x: Tensor) -> bool:
        return self.tensor() is x and self.version is not None and self.version == _version(x)


@dataclass
class Input:
    """One distinct layer input: the streams it feeds, their shared statistic, and this forward's calls."""

    statistic: Statistic
    reason: str
    streams: list[int]
    calls: list[Call] = field(default_factory=list)
    taken: dict[int, int] = field(default_factory=dict)  # stream -> how many of the calls it has made
    is_new: bool = True  # made in the current batch: others may still join it
    pending_batches: int = 0  # batches folded in since the last refresh
    # Of a pass that several ranks make together:
    owner: int = -1  # the rank that does its algebra
    known_rows: int = 0  # of all ranks, at the end of the last batch
    sketch: Sketch | None = None  # of this rank's first rows, until all have started from the sketch of everybody's


@dataclass(frozen=True)
class Portion:
    """What of a batch that several ranks share is run here: so many samples, after those of the ranks before."""

    before: int
    own: int

    def first_row(self, num_rows: int) -> int:
        """How many rows come before these, where every sample has as many."""
        return num_rows * self.before // max(1, self.own)


class Capture:
    """Statistics of the inputs of LoRA layers, fed by forward pre-hooks.

    Every part of every site is a stream of rows; a site with one part is one stream, so where no site has
    more, streams are numbered as sites are. Layers called with the same live tensor (same object, same
    version) that make rows of it in the same way share one statistic. Where layers that shared part ways in a
    later batch, the one that leaves takes a copy from which the rows it did not see are taken out again.

    Args:
        sites: The LoRA layers.
        columns: Columns that each site needs its statistics' bases to have.
        make: Makes the statistic of a stream when it gets its first rows.
        share: Whether layers may share.
        head: A module that is called after every layer, if there is one: where a first forward may end.
    """

    def __init__(
        self,
        sites: list[LoraSite],
        columns: list[int],
        make: MakeStatistic,
        *,
        share: bool = True,
        head: nn.Module | None = None,
    ) -> None:
        self.sites, self._columns, self._make, self._share, self._head = sites, columns, make, share, head
        self.site_of = [i for i, site in enumerate(sites) for _ in range(site.parts)]  # stream -> site
        starts = itertools.accumulate([site.parts for site in sites], initial=0)
        self.streams_of = [range(start, start + site.parts) for start, site in zip(starts, sites, strict=False)]
        self.inputs: list[Input] = []
        self.input_of: list[Input | None] = [None] * len(self.site_of)  # of each stream
        self.wanted = set(range(len(sites)))  # sites still accumulating; the others' hooks do nothing
        self.rows_in_batch = 0
        self.seconds = 0.0  # on the host, folding rows in; on a GPU, launching the work
        self.portion: Portion | None = None  # of a batch that other ranks share; statistics then start together
        self.parallel: TensorParallel | None = None  # the ranks that layers are split over
        self._mask = RowMask(None, None)
        self._only: Collection[int] | None = None
        self._live: dict[tuple[int, Rows | None], tuple[Input, int]] = {}  # a tensor's id -> input, index of the call
        self._num_calls = [0] * len(sites)
        self._expected: list[int] | None = None  # most calls per site in any whole forward
        self._may_stop = False
        self._last_awaited = 0  # the site that a forward was last seen to go on for

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Within it every site's module is hooked."""
        handles = [
            site.module.register_forward_pre_hook(self._hook(i), with_kwargs=True) for i, site in enumerate(self.sites)
        ]
        if self._head is not None:
            handles.append(self._head.register_forward_pre_hook(self._before_head))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def batch(self, mask: RowMask, *, early_stop: bool, only: Collection[int] | None = None) -> Iterator[None]:
        """Within it one forward runs; its rows are in the statistics afterwards.

        ``only``: the streams whose rows count, where not all do; none at all leaves the statistics as they are.

        Raises:
            RuntimeError: a shared input was edited in place between the layers that share it.
        """
        self._mask, self.rows_in_batch = mask, mask.num_rows or 0
        self._num_calls = [0] * len(self.sites)
        self._may_stop, self._only = early_stop, only
        try:
            yield
            self._learn_calls()
        except ForwardComplete as done:
            done.__traceback__ = None  # from Python 3.12 on a cycle through contextlib would keep its frames' tensors
        finally:
            self._live.clear()
        for entry in list(self.inputs):
            for stream in [s for s in entry.streams if self._is_wanted(s) and entry.taken[s] < len(entry.calls)]:
                self._split(entry, stream)
        for entry in self.inputs:
            entry.is_new = False
            if self.portion is None:  # else the ranks count together
                entry.pending_batches += bool(entry.calls)
            entry.calls.clear()
            entry.taken = dict.fromkeys(entry.streams, 0)

    def _hook(self, site: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if site not in self.wanted or (self._only is not None and not self._only):
                return
            for taken in self.sites[site].taken(args, kwargs):
                stream = self.streams_of[site][taken.part]
                if self._only is None or stream in self._only:
                    self._fold(stream, taken)
            self._num_calls[site] += 1
            if self._may_stop and self._satisfied(site):
                raise ForwardComplete

        return hook

    def _before_head(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._may_stop and None not in self.input_of:
            self._learn_calls()
            raise ForwardComplete

    def _learn_calls(self) -> None:
        """How often a whole forward calls each site, at most."""
        earlier = self._expected or self._num_calls
        self._expected = [max(pair) for pair in zip(earlier, self._num_calls, strict=True)]

    def _is_wanted(self, stream: int) -> bool:
        return self.site_of[stream] in self.wanted

    def _satisfied(self, site: int) -> bool:
        if self._expected is None or self._num_calls[site] < self._expected[site]:
            return False
        if self._is_awaited(self._last_awaited):  # most calls end here
            return False
        awaited = [s for s in self.wanted if self._is_awaited(s)]
        self._last_awaited = max(awaited, default=site)
        return not awaited

    def _is_awaited(self, site: int) -> bool:
        assert self._expected is not None
        # A site that was never called may be called yet: only a whole forward can tell.
        return site in self.wanted and self._num_calls[site] < max(1, self._expected[site])

    def _fold(self, stream: int, taken: Taken) -> None:
        x = taken.tensor
        entry = self.input_of[stream]
        if entry is None:
            entry = self._join_or_create(stream, taken)
        index = entry.taken[stream]
        if index < len(entry.calls) and not entry.calls[index].is_same(x):
            entry = self._split(entry, stream)
        if index == len(entry.calls):
            self._accumulate(entry, stream, taken)
            shared = len(entry.streams) > 1
            entry.calls.append(Call(weakref.ref(x), _version(x), taken if shared else None))
            self._live[self._key(stream, x)] = (entry, index)
        entry.taken[stream] = index + 1
        if entry.calls[index].held is not None:
            self._release(entry)

    def _key(self, stream: int, x: Tensor) -> tuple[int, Rows | None]:
        return id(x), self.sites[self.site_of[stream]].rows

    def _join_or_create(self, stream: int, taken: Taken) -> Input:
        other, index = self._live.get(self._key(stream, taken.tensor), (None, -1))
        if (
            self._share
            and other is not None
            and other.is_new
            and index == 0
            and len(other.calls) == 1
            and other.calls[0].is_same(taken.tensor)
        ):
            self._widen(other, stream, taken)
            other.streams.append(stream)
            entry = other
        else:
            statistic, reason = self._make(stream)
            entry = Input(statistic, reason, [stream])
            self.inputs.append(entry)
        entry.taken[stream] = 0
        self.input_of[stream] = entry
        return entry

    def _widen(self, entry: Input, stream: int, taken: Taken) -> None:
        """A layer that joins with more candidates needs a wider basis; the one call so far is made again."""
        if self._columns[self.site_of[stream]] > entry.statistic.num_components:
            entry.statistic, entry.reason = self._make(stream)
            entry.sketch = None
            self._accumulate(entry, stream, taken)

    def _accumulate(self, entry: Input, stream: int, taken: Taken, *, sign: int = 1) -> None:
        site, rows_mask, kind = self.sites[self.site_of[stream]], self._mask, ""
        x, rows = taken.tensor, site.rows
        if x.requires_grad:
            x = x.detach()
        if self.parallel is not None:
            x, kind = self.parallel.part(site, x) if rows is None and taken.tokens is None else (x, "replica")
            if kind == "block" and (self._mask.skip_nonfinite or not isinstance(entry.statistic, SubspaceStatistic)):
                # A Gram matrix needs every two features together, and a row is left out for any of them.
                x, kind = self.parallel.whole(x), "replica"
            if kind == "replica" and self.parallel.rank:
                return
            rows_mask = self.parallel.tokens(rows_mask) if kind == "tokens" else rows_mask
        shape = tuple(x.shape)
        width = rows.width if rows is not None else shape[-1] if shape else 0
        if width != site.in_features and kind != "block":
            raise ValueError(f"layer {site.name}: expected an input of width {site.in_features}, got shape {shape}")
        layout = taken.batch or (shape[:-1] if rows is None else rows.shape(x))
        mask, num_rows = rows_mask.of_rows(layout, x.device, site.name)
        if self._mask.num_rows is None:
            self.rows_in_batch = max(self.rows_in_batch, num_rows)
        tick = time.perf_counter()
        with without_autocast(x.device):
            for piece, part, count in _pieces(x, rows, mask, num_rows, taken.tokens):
                part, count = self._mask.finite(piece, part, count, site.name)
                self._take_in(entry, piece, part, count, sign, kind)
        self.seconds += time.perf_counter() - tick

    def _take_in(self, entry: Input, x: Tensor, mask: Tensor | None, count: int, sign: int, kind: str) -> None:
        """Rows that count, into an input's statistic, or into the sketch from which all ranks' will start."""
        statistic = entry.statistic
        if self.portion is None or (statistic.shift is not None and kind != "block"):
            statistic.accumulate_(x, mask, num_rows=count, sign=sign)
        elif statistic.shift is not None:
            assert isinstance(statistic, SubspaceStatistic)
            assert self.parallel is not None
            statistic.accumulate_block_(
                x, mask, num_rows=count, start=self.parallel.rank * x.shape[-1], add_up_=self.parallel.add_up_,
                counts=self.parallel.rank == 0, sign=sign,
            )  # fmt: skip
        elif entry.sketch is None and count and sign > 0:
            first = self.portion.first_row(x.numel() // x.shape[-1])
            entry.sketch = statistic.sketch(x, mask, num_rows=count, first=first)
            if kind == "block" and self.parallel is not None:
                start, counts = self.parallel.rank * x.shape[-1], self.parallel.rank == 0
                entry.sketch = entry.sketch.block_of(statistic.num_features, start, counts=counts)

    def _split(self, entry: Input, stream: int) -> Input:
        """Give ``stream`` a statistic of its own, without the calls it did not share."""
        taken = entry.taken[stream]
        own = Input(
            entry.statistic.clone(), entry.reason, [stream], entry.calls[:taken], {stream: taken}, entry.is_new,
            entry.pending_batches, entry.owner, entry.known_rows, entry.sketch,
        )  # fmt: skip
        for call in entry.calls[taken:]:
            if call.held is None or call.version != _version(call.held.tensor):
                other = next(s for s in entry.streams if s != stream)
                names = [self.sites[self.site_of[s]].name for s in (stream, other)]
                raise RuntimeError(
                    f"layers {names[0]} and {names[1]} shared their input until now, "
                    "but it was edited in place between them; run with share_inputs=False"
                )
            self._accumulate(own, stream, call.held, sign=-1)
        entry.streams.remove(stream)
        del entry.taken[stream]
        self.inputs.append(own)
        self.input_of[stream] = own
        self._release(entry)
        return own

    def part_(self, entry: Input, streams: list[int]) -> None:
        """Give some of an input's streams a statistic of their own between two batches, as :meth:`_split` does."""
        own = Input(
            entry.statistic.clone(), entry.reason, streams, [], dict.fromkeys(streams, 0), entry.is_new,
            entry.pending_batches, entry.owner, entry.known_rows, entry.sketch,
        )  # fmt: skip
        for stream in streams:
            entry.streams.remove(stream)
            del entry.taken[stream]
            self.input_of[stream] = own
        self.inputs.append(own)

    def _release(self, entry: Input) -> None:
        """Let go of the tensors that every layer still wanted has been called with."""
        counts = [count for stream, count in entry.taken.items() if self._is_wanted(stream)]
        for call in entry.calls[: min(counts, default=None)]:
            call.held = None


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version  # inference tensors keep no version, so they are never shared


def _pieces(
    x: Tensor,
    rows: Rows | None,
    mask: Tensor | None,
    num_rows: int,
    tokens: Tensor | None,
) -> Iterator[tuple[Tensor, Tensor | None, int]]:
    """What of an input is folded in at a time, the mask of its rows, and how many count."""
    if rows is None and tokens is None:
        yield x, mask, num_rows
        return
    start = 0
    for piece in [x] if rows is None else rows.pieces(x):
        part = None
        if mask is not None:
            part = mask.reshape(-1)
            part = part[tokens] if tokens is not None else part[start : start + len(piece)]
        yield piece, part, len(piece) if part is None else int(part.sum())
        start += len(piece)
