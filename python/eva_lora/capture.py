"""Forward hooks that fold each distinct layer input into its statistic, once, while it is alive."""

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from eva_kernels.streaming_svd import Statistic

from .adapters import LoraSite
from .batches import RowMask

MakeStatistic = Callable[[int], tuple[Statistic, str]]  # site index -> its statistic, and why this kind


class ForwardComplete(Exception):
    """Raised from the last hook of a forward to end it there."""


@dataclass
class Call:
    """One tensor that an input was called with in the current forward."""

    tensor: "weakref.ref[Tensor]"
    version: int | None
    held: Tensor | None  # kept alive only until every layer that shares the input has been called with it

    def is_same(self, x: Tensor) -> bool:
        return self.tensor() is x and self.version is not None and self.version == _version(x)


@dataclass
class Input:
    """One distinct layer input: the layers fed by it, their shared statistic, and this forward's calls."""

    statistic: Statistic
    reason: str
    sites: list[int]
    calls: list[Call] = field(default_factory=list)
    taken: dict[int, int] = field(default_factory=dict)  # site -> how many of the calls it has made
    is_new: bool = True  # made in the current batch: others may still join it
    pending_batches: int = 0  # batches folded in since the last refresh


class Capture:
    """Statistics of the inputs of LoRA layers, fed by forward pre-hooks.

    Layers called with the same live tensor (same object, same version) share one statistic. Where layers
    that shared part ways in a later batch, the one that leaves takes a copy from which the rows it did not
    see are taken out again.

    Args:
        sites: The LoRA layers.
        columns: Columns that each layer needs its statistic's basis to have.
        make: Makes the statistic of a layer's input when it is first called.
        share: Whether layers may share.
    """

    def __init__(self, sites: list[LoraSite], columns: list[int], make: MakeStatistic, *, share: bool = True) -> None:
        self.sites, self._columns, self._make, self._share = sites, columns, make, share
        self.inputs: list[Input] = []
        self.input_of: list[Input | None] = [None] * len(sites)
        self.wanted = set(range(len(sites)))  # sites still accumulating; the others' hooks do nothing
        self.rows_in_batch = 0
        self.seconds = 0.0  # on the host, folding rows in; on a GPU, launching the work
        self._mask = RowMask(None, None)
        self._live: dict[int, tuple[Input, int]] = {}  # id of a tensor in this forward -> input, index of the call
        self._num_calls = [0] * len(sites)
        self._expected: list[int] | None = None  # calls per site in the last whole forward
        self._may_stop = False

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Within it every site's module is hooked."""
        handles = [
            site.module.register_forward_pre_hook(self._hook(i), with_kwargs=True) for i, site in enumerate(self.sites)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def batch(self, mask: RowMask, *, early_stop: bool) -> Iterator[None]:
        """Within it one forward runs; its rows are in the statistics afterwards.

        Raises:
            RuntimeError: a shared input was edited in place between the layers that share it.
        """
        self._mask, self.rows_in_batch = mask, mask.num_rows or 0
        self._num_calls = [0] * len(self.sites)
        self._may_stop = early_stop and self._expected is not None
        complete = False
        try:
            yield
            complete = True
        except ForwardComplete:
            pass
        finally:
            if complete:
                self._expected = self._num_calls
            self._live.clear()
        for entry in list(self.inputs):
            for site in [s for s in entry.sites if s in self.wanted and entry.taken[s] < len(entry.calls)]:
                self._split(entry, site)
        for entry in self.inputs:
            entry.is_new = False
            entry.pending_batches += bool(entry.calls)
            entry.calls.clear()
            entry.taken = dict.fromkeys(entry.sites, 0)

    def _hook(self, site: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if site not in self.wanted:
                return
            self._fold(site, _input_of_call(self.sites[site], args, kwargs))
            self._num_calls[site] += 1
            if self._may_stop and self._satisfied(site):
                raise ForwardComplete

        return hook

    def _satisfied(self, site: int) -> bool:
        assert self._expected is not None
        if self._num_calls[site] < self._expected[site]:
            return False
        return all(self._num_calls[s] >= self._expected[s] for s in self.wanted)

    def _fold(self, site: int, x: Tensor) -> None:
        entry = self.input_of[site]
        if entry is None:
            entry = self._join_or_create(site, x)
        index = entry.taken[site]
        if index < len(entry.calls) and not entry.calls[index].is_same(x):
            entry = self._split(entry, site)
        if index == len(entry.calls):
            self._accumulate(entry, site, x)
            version = _version(x)
            shared = len(entry.sites) > 1
            entry.calls.append(Call(weakref.ref(x), version, x if shared else None))
            self._live[id(x)] = (entry, index)
        entry.taken[site] = index + 1
        self._release(entry)

    def _join_or_create(self, site: int, x: Tensor) -> Input:
        other, index = self._live.get(id(x), (None, -1))
        if (
            self._share
            and other is not None
            and other.is_new
            and index == 0
            and len(other.calls) == 1
            and other.calls[0].is_same(x)
        ):
            self._widen(other, site, x)
            other.sites.append(site)
            entry = other
        else:
            statistic, reason = self._make(site)
            entry = Input(statistic, reason, [site])
            self.inputs.append(entry)
        entry.taken[site] = 0
        self.input_of[site] = entry
        return entry

    def _widen(self, entry: Input, site: int, x: Tensor) -> None:
        """A layer that joins with more candidates needs a wider basis; the one call so far is made again."""
        if self._columns[site] > entry.statistic.num_components:
            entry.statistic, entry.reason = self._make(site)
            self._accumulate(entry, site, x)

    def _accumulate(self, entry: Input, site: int, x: Tensor, *, sign: int = 1) -> None:
        expected = self.sites[site].in_features
        if x.shape[-1:] != (expected,):
            raise ValueError(
                f"layer {self.sites[site].name}: expected an input of width {expected}, got shape {tuple(x.shape)}"
            )
        mask, num_rows = self._mask.of(x, self.sites[site].name)
        if self._mask.num_rows is None:
            self.rows_in_batch = max(self.rows_in_batch, num_rows)
        tick = time.perf_counter()
        entry.statistic.accumulate_(x.detach(), mask, num_rows=num_rows, sign=sign)
        self.seconds += time.perf_counter() - tick

    def _split(self, entry: Input, site: int) -> Input:
        """Give ``site`` a statistic of its own, without the calls it did not share."""
        taken = entry.taken[site]
        own = Input(
            entry.statistic.clone(), entry.reason, [site], entry.calls[:taken], {site: taken}, entry.is_new,
            entry.pending_batches,
        )  # fmt: skip
        for call in entry.calls[taken:]:
            if call.held is None or call.version != _version(call.held):
                other = next(s for s in entry.sites if s != site)
                raise RuntimeError(
                    f"layers {self.sites[site].name} and {self.sites[other].name} shared their input until now, "
                    "but it was edited in place between them; run with share_inputs=False"
                )
            self._accumulate(own, site, call.held, sign=-1)
        entry.sites.remove(site)
        del entry.taken[site]
        self.inputs.append(own)
        self.input_of[site] = own
        self._release(entry)
        return own

    def _release(self, entry: Input) -> None:
        """Let go of the tensors that every layer still wanted has been called with."""
        for call in entry.calls[: min((entry.taken[s] for s in entry.sites if s in self.wanted), default=None)]:
            call.held = None


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version  # inference tensors keep no version, so they are never shared


def _input_of_call(site: LoraSite, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    candidates = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if not candidates or not candidates[0].dtype.is_floating_point:
        kinds = [type(value).__name__ for value in (*args, *kwargs.values())]
        raise TypeError(f"layer {site.name}: expected a floating-point tensor as its first input, got {kinds}")
    return candidates[0]
