"""Forward hooks that fold each distinct layer input into its statistic, once, while it is alive."""

import itertools
import time
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from eva_kernels.streaming_svd import Statistic, SubspaceStatistic

from ..adapters import LayerInput, LoraSite, Rows
from .ending import ForwardEnd
from .inputs import UNSHARED, BatchShare, Call, DistinctInput, version_of
from .restoring import without_autocast
from .rows import RowMask, rows_of
from .tensor_parallel import TensorParallel

MakeStatistic = Callable[[int], tuple[Statistic, str]]  # stream -> its statistic, and why this kind


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
        end: What forwards are spared; it is told of every call. None: nothing.
        parallel: The ranks that layers are split over, if they are.
    """

    def __init__(
        self,
        sites: list[LoraSite],
        columns: list[int],
        make: MakeStatistic,
        *,
        share: bool = True,
        end: ForwardEnd | None = None,
        parallel: TensorParallel | None = None,
    ) -> None:
        self.sites, self._columns, self._make, self._share, self.parallel = sites, columns, make, share, parallel
        self.end = end or ForwardEnd()
        self.site_of = [i for i, site in enumerate(sites) for _ in range(site.parts)]  # stream -> site
        starts = itertools.accumulate([site.parts for site in sites], initial=0)
        self.streams_of = [range(start, start + site.parts) for start, site in zip(starts, sites, strict=False)]
        self.inputs: list[DistinctInput] = []
        self.input_of: list[DistinctInput | None] = [None] * len(self.site_of)  # of each stream
        self.wanted = set(range(len(sites)))  # sites still accumulating; the others' hooks do nothing
        self.rows_in_batch = 0
        self.seconds = 0.0  # on the host, folding rows in; on a GPU, launching the work
        self.batch_share: BatchShare | None = None  # of a batch that other ranks share; statistics then start together
        self._mask = RowMask(None, None)
        self._only: Collection[int] | None = ()  # outside of a batch no call counts
        self._num_calls = self._num_repeated = 0  # of layers in this forward; those of it that were folded in before
        self._live: dict[
            tuple[int, Rows | None], tuple[DistinctInput, int]
        ] = {}  # a tensor's id -> input, index of the call

    @contextmanager
    def hooks(
        self, within: Callable[[], AbstractContextManager[object]] | None = None
    ) -> Iterator[list[RemovableHandle]]:
        """Within it every site's module is hooked, with these hooks; ``within`` is entered for each of its calls."""
        hooks = [self._hook(i) if within is None else _entering(within, self._hook(i)) for i in range(len(self.sites))]
        handles = [
            site.module.register_forward_pre_hook(hook, with_kwargs=True)
            for site, hook in zip(self.sites, hooks, strict=True)
        ]
        if self.end.head is not None:
            handles.append(self.end.head.register_forward_pre_hook(self.end.reached_head, with_kwargs=True))
        try:
            yield handles[: len(self.sites)]
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def batch(self, mask: RowMask, *, only: Collection[int] | None = None) -> Iterator[None]:
        """Within it one forward runs; its rows are in the statistics afterwards.

        ``only``: the streams whose rows count, where not all do; none at all leaves the statistics as they are.

        Raises:
            RuntimeError: a shared input was edited in place between the layers that share it.
        """
        self.begin_batch(mask, only=only)
        try:
            yield
        except BaseException:
            self.close_batch()
            raise
        self.end_batch()

    def begin_batch(self, mask: RowMask, *, only: Collection[int] | None = None) -> None:
        """A forward begins, as :meth:`batch` says; :meth:`end_batch` or :meth:`close_batch` has to follow."""
        self._mask, self.rows_in_batch = mask, mask.num_rows or 0
        self._only = only
        self._num_calls = self._num_repeated = 0

    def close_batch(self) -> bool:
        """Until the next one begins no call of a layer counts. Returns whether any did since the last began."""
        self._live.clear()
        self._only = ()
        return self._num_calls > 0

    def end_batch(self) -> None:
        """The forward is over. Raises as :meth:`batch`."""
        self.close_batch()
        for entry in [entry for entry in self.inputs if len(entry.streams) > 1]:
            count = len(entry.calls)
            for stream in [s for s, made in entry.calls_made.items() if made < count and self._is_wanted(s)]:
                self._split(entry, stream)
        for entry in self.inputs:
            entry.is_new = False
            if self._mask.num_rows is None:
                self.rows_in_batch = max(self.rows_in_batch, entry.batch_rows)
            entry.batch_rows = 0
            if self.batch_share is None:  # else the ranks count together
                entry.pending_batches += bool(entry.calls)
            entry.forget_calls()

    def again(self) -> None:
        """The batch's forward begins anew: what it has brought so far is not folded in a second time."""
        self._num_repeated, self._num_calls = self._num_calls, 0
        self._live.clear()
        for entry in self.inputs:
            entry.forget_calls()

    def _hook(self, site: int) -> Callable[..., None]:
        name, inputs, first = self.sites[site].name, self.sites[site].inputs, self.streams_of[site].start

        # Called for every layer of every batch: on a GPU its time, and that of what it calls, is the host's.
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            only = self._only
            if site not in self.wanted or (only is not None and not only):
                return
            self.end.called(name)
            self._num_calls += 1
            for given in inputs(args, kwargs):
                stream = first + given.part
                if only is None or stream in only:
                    self._fold(stream, given)

        return hook

    def _is_wanted(self, stream: int) -> bool:
        return self.site_of[stream] in self.wanted

    def _fold(self, stream: int, given: LayerInput) -> None:
        x = given.tensor
        entry = self.input_of[stream]
        if entry is None:
            entry = self._join_or_create(stream, given)
        index = entry.calls_made[stream]
        if index < len(entry.calls):
            call = entry.calls[index]
            if call.is_same(x):
                entry.calls_made[stream] = index + 1
                call.taken()
                return
            entry = self._split(entry, stream)
        if self._num_calls > self._num_repeated:
            self._accumulate(entry, stream, given)
        if entry.is_new or len(entry.streams) > 1:
            all_wanted = len(self.wanted) == len(self.sites)
            waiting = (len(entry.streams) if all_wanted else sum(map(self._is_wanted, entry.streams))) - 1
            call = Call(weakref.ref(x), version_of(x), waiting, given if waiting > 0 else None)
        else:
            call = UNSHARED
        entry.calls.append(call)
        entry.calls_made[stream] = index + 1
        if entry.is_new:
            self._live[self._key(stream, x)] = (entry, index)

    def _key(self, stream: int, x: Tensor) -> tuple[int, Rows | None]:
        return id(x), self.sites[self.site_of[stream]].rows

    def _join_or_create(self, stream: int, given: LayerInput) -> DistinctInput:
        other, index = self._live.get(self._key(stream, given.tensor), (None, -1))
        if (
            self._share
            and other is not None
            and other.is_new
            and index == 0
            and len(other.calls) == 1
            and other.calls[0].is_same(given.tensor)
        ):
            self._widen(other, stream, given)
            other.streams.append(stream)
            entry = other
        else:
            statistic, reason = self._make(stream)
            entry = DistinctInput(statistic, reason, [stream])
            self.inputs.append(entry)
        entry.calls_made[stream] = 0
        self.input_of[stream] = entry
        return entry

    def _widen(self, entry: DistinctInput, stream: int, given: LayerInput) -> None:
        """A layer that joins with more candidates needs a wider basis; the one call so far is made again."""
        if self._columns[self.site_of[stream]] > entry.statistic.num_components:
            entry.statistic, entry.reason = self._make(stream)
            entry.sketch, entry.batch_rows = None, 0
            self._accumulate(entry, stream, given)

    def _accumulate(self, entry: DistinctInput, stream: int, given: LayerInput, *, sign: int = 1) -> None:
        site, rows_mask, kind = self.sites[self.site_of[stream]], self._mask, ""
        x, rows, tokens = given.tensor, site.rows, given.tokens
        if x.requires_grad:
            x = x.detach()
        nested = x.is_nested
        if nested:
            x = rows_of(x, site.name)
        if self.parallel is not None:
            x, kind = self.parallel.part(site, x) if rows is None and tokens is None else (x, "replica")
            if kind == "block" and (self._mask.skip_nonfinite or not isinstance(entry.statistic, SubspaceStatistic)):
                # A Gram matrix needs every two features together, and a row is left out for any of them.
                x, kind = self.parallel.whole(x), "replica"
            if kind == "replica" and self.parallel.rank:
                return
            rows_mask = self.parallel.tokens(rows_mask) if kind == "tokens" else rows_mask
        shape, device = tuple(x.shape), x.device
        width = rows.width if rows is not None else shape[-1] if shape else 0
        if width != site.in_features and kind != "block":
            raise ValueError(f"layer {site.name}: expected an input of width {site.in_features}, got shape {shape}")
        layout = given.batch or (shape[:-1] if rows is None else rows.shape(x))
        made = x if tokens is None else given.of
        mask, num_rows = rows_mask.of_rows(layout, device, site.name, nested=nested, made=made)
        entry.batch_rows += sign * num_rows
        tick = time.perf_counter()
        with without_autocast(device):
            if rows is None and tokens is None:
                mask, num_rows = self._mask.finite(x, mask, num_rows, site.name)
                self._take_in(entry, x, mask, num_rows, sign, kind)
            else:
                for piece, part, count in _pieces(x, rows, mask, tokens):
                    part, count = self._mask.finite(piece, part, count, site.name)
                    self._take_in(entry, piece, part, count, sign, kind)
        self.seconds += time.perf_counter() - tick

    def _take_in(self, entry: DistinctInput, x: Tensor, mask: Tensor | None, count: int, sign: int, kind: str) -> None:
        """Rows that count, into an input's statistic, or into the sketch from which all ranks' will start."""
        statistic = entry.statistic
        if self.batch_share is None or (statistic.shift is not None and kind != "block"):
            statistic.accumulate_(x, mask, num_rows=count, sign=sign)
        elif statistic.shift is not None:
            assert isinstance(statistic, SubspaceStatistic)
            assert self.parallel is not None
            statistic.accumulate_block_(
                x, mask, num_rows=count, start=self.parallel.rank * x.shape[-1], add_up_=self.parallel.add_up_,
                counts=self.parallel.rank == 0, sign=sign,
            )  # fmt: skip
        elif entry.sketch is None and count and sign > 0:
            first = self.batch_share.first_row(x.numel() // x.shape[-1])
            entry.sketch = statistic.sketch(x, mask, num_rows=count, first=first)
            if kind == "block" and self.parallel is not None:
                start, counts = self.parallel.rank * x.shape[-1], self.parallel.rank == 0
                entry.sketch = entry.sketch.block_of(statistic.num_features, start, counts=counts)

    def _split(self, entry: DistinctInput, stream: int) -> DistinctInput:
        """Give ``stream`` a statistic of its own, without the calls it did not share."""
        made = entry.calls_made[stream]
        own = DistinctInput(
            entry.statistic.clone(), entry.reason, [stream], entry.calls[:made], {stream: made}, entry.is_new,
            entry.pending_batches, entry.batch_rows, entry.owner, entry.known_rows, entry.sketch,
        )  # fmt: skip
        for call in entry.calls[made:]:
            if call.held is None or call.version != version_of(call.held.tensor):
                other = next(s for s in entry.streams if s != stream)
                names = [self.sites[self.site_of[s]].name for s in (stream, other)]
                raise RuntimeError(
                    f"layers {names[0]} and {names[1]} shared their input until now, "
                    "but it was edited in place between them; run with share_inputs=False"
                )
            self._accumulate(own, stream, call.held, sign=-1)
            call.taken()
        entry.streams.remove(stream)
        del entry.calls_made[stream]
        self.inputs.append(own)
        self.input_of[stream] = own
        return own

    def part_(self, entry: DistinctInput, streams: list[int]) -> None:
        """Give some of an input's streams a statistic of their own between two batches, as :meth:`_split` does."""
        own = DistinctInput(
            entry.statistic.clone(), entry.reason, streams, [], dict.fromkeys(streams, 0), entry.is_new,
            entry.pending_batches, entry.batch_rows, entry.owner, entry.known_rows, entry.sketch,
        )  # fmt: skip
        for stream in streams:
            entry.streams.remove(stream)
            del entry.calls_made[stream]
            self.input_of[stream] = own
        self.inputs.append(own)


class StayingHook:
    """A hook that stays with the model it was hung on: on one that is copied or pickled meanwhile, it does nothing."""

    def __init__(self, hook: Callable[..., None]) -> None:
        self._hook = hook

    def __call__(self, *call: Any) -> None:
        self._hook(*call)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return no_hook

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        return _made_no_hook, ()


def no_hook(*call: Any) -> None:
    """What is left of a :class:`StayingHook` elsewhere."""


def _made_no_hook() -> Callable[..., None]:
    return no_hook


def _entering(within: Callable[[], AbstractContextManager[object]], hook: Callable[..., None]) -> Callable[..., None]:
    def entering(*call: Any) -> None:
        with within():
            hook(*call)

    return StayingHook(entering)


def _pieces(
    x: Tensor,
    rows: Rows | None,
    mask: Tensor | None,
    tokens: Tensor | None,
) -> Iterator[tuple[Tensor, Tensor | None, int]]:
    """What of an input is folded in at a time, the mask of its rows, and how many count."""
    start = 0
    for piece in [x] if rows is None else rows.pieces(x):
        part = None
        if mask is not None:
            part = mask.reshape(-1)
            part = part[tokens] if tokens is not None else part[start : start + len(piece)]
        yield piece, part, len(piece) if part is None else int(part.sum())
        start += len(piece)
