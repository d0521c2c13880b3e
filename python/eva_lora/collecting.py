"""The pass over the data: forward passes of the frozen model, statistics folded in as they run."""

import itertools
import math
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn

from eva_kernels.allocation import candidate_components
from eva_kernels.convergence import ConvergenceTracker, Decision
from eva_kernels.streaming_svd import GramStatistic, Refreshed, Statistic, SubspaceStatistic, refresh_

from .adapters import LoraAdapter, LoraSite, find_adapter
from .batches import (
    ALL_ROWS,
    FITS_NO_MASK,
    ForwardFn,
    RowMask,
    RowMaskFn,
    default_forward,
    is_encoder_decoder,
    row_mask,
    to_device,
)
from .capture import Capture, Input
from .checkpoint import Checkpoint, identity
from .config import DEFAULT_MAX_BATCHES, DEFAULT_OVERSAMPLING, GRAM_MAX_WIDENING, REFRESH_PERIOD, EvaConfig
from .measurements import Trace, agreement, peak_memory
from .preflight import require_loaded
from .progress import Progress
from .restoring import borrowed, without_autocast
from .statistics import EvaStatistics, InputStatistics, SiteStatistics
from .streams import Stream

__all__ = ["collect"]


def collect(
    model: nn.Module,
    loader: Iterable[Any],
    config: Any = None,
    *,
    forward_fn: ForwardFn | None = None,
    row_mask_fn: RowMaskFn | None = None,
    sites: Sequence[LoraSite] | None = None,
    progress: bool = True,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
) -> EvaStatistics:
    """Run the frozen model over batches until every layer's components have converged (or a bound is met).

    Nothing of the model's is changed: adapters are disabled, modules are in eval mode and hooked only while
    it runs, and the global random generators are given back as they were (:mod:`eva_lora.restoring`). Arguments
    are those of :func:`eva_lora.eva_initialize`.

    Returns:
        The statistics of every distinct layer input: enough to plan ranks and write A.

    Raises:
        TypeError: ``model`` is no module, ``loader`` not iterable, ``config`` of another type, or a layer's
            input no floating-point tensor.
        ValueError: no LoRA layers, an empty loader, batches without a single unmasked row, a layer that the
            first batch does not reach, NaN or Inf in a layer's input (the layer, the batch and the rows are
            named), a checkpoint that is damaged or of another run, a loader that does not replay.
        OSError: the checkpoint cannot be written.
    """
    config = EvaConfig.of(config)
    if checkpoint is None and checkpoint_every is not None:
        raise ValueError("checkpoint_every: expected None without a checkpoint to write")
    adapter = find_adapter(model, sites)
    return collect_with(
        adapter, model, loader, config, forward_fn=forward_fn, row_mask_fn=row_mask_fn, progress=progress,
        checkpoint=checkpoint, checkpoint_every=checkpoint_every,
    )  # fmt: skip


def collect_with(
    adapter: LoraAdapter,
    model: nn.Module,
    loader: Iterable[Any],
    config: EvaConfig,
    *,
    forward_fn: ForwardFn | None = None,
    row_mask_fn: RowMaskFn | None = None,
    progress: bool = True,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
) -> EvaStatistics:
    """:func:`collect` for an adapter that is known already."""
    if adapter.skipped:
        named = "; ".join(f"{name}: {reason}" for name, reason in adapter.skipped.items())
        warnings.warn(f"EVA leaves these layers as they are: {named}", stacklevel=4)
    require_loaded(model)
    run = Run(adapter, config, head=_head(model, adapter))
    device = _input_device(model)
    saving = position = None
    if checkpoint is not None:
        known = identity(model, run, device, forward_fn=forward_fn, row_mask_fn=row_mask_fn)
        saving = Checkpoint(checkpoint, checkpoint_every, known)
        position = saving.load_into(run)
    early_stop = _may_stop_early(model, config, forward_fn)
    forward = forward_fn or default_forward
    two_sided = is_encoder_decoder(model)
    bar = Progress(len(adapter.sites), config, seen=(run.num_batches, run.num_rows), enabled=progress)
    with bar, borrowed(model), adapter.disabled(), run.capture.hooks():
        stream = Stream(loader, fingerprints=saving is not None, position=position)
        while not run.stop_reason:
            batch = next(stream, _END)
            if batch is _END:
                run.stop_reason = "end of the data"
            else:
                # The mask first: counted where the loader left it, no device has to be waited for.
                mask = row_mask(batch, config, row_mask_fn, encoder_decoder=two_sided).to(device)
                mask.sides = run.sides
                batch = to_device(batch, device)
                if mask.num_rows != 0:
                    tick = time.perf_counter()
                    with run.capture.batch(mask, early_stop=early_stop):
                        forward(model, batch)
                    run.seconds["forward"] += time.perf_counter() - tick
                    if run.nonfinite_inputs():
                        again = mask.counting()
                        if not _others_wait():
                            with run.capture.batch(again, early_stop=early_stop):
                                forward(model, batch)
                        run.fail_nonfinite(again.skipped)
                with without_autocast(device):
                    run.finish_batch(mask)
                bar.update(run.num_batches, run.num_rows, run.history[-1], run.trace)
            if saving is not None and (run.stop_reason or run.num_batches % saving.every == 0):
                saving.save(run, stream)
    with without_autocast(device):
        return run.result()


_END = object()


_KINDS: dict[str, type[GramStatistic] | type[SubspaceStatistic]] = {
    kind.kind: kind for kind in (GramStatistic, SubspaceStatistic)
}
SHOWN_INPUTS = 3


class Run:
    """The state of one pass: what the hooks fill, what the tracker decides, and when to stop."""

    def __init__(self, adapter: LoraAdapter, config: EvaConfig, *, head: nn.Module | None = None) -> None:
        self.config, self.sites, self.skipped = config, list(adapter.sites), dict(adapter.skipped)
        widths = [site.in_features for site in self.sites]
        self.members = list(range(len(self.sites)))  # sites the tracker follows: those that have data
        self.candidates = self._candidates(self.members, None)
        self.make_tracker(
            self.members, [0] * len(self.sites)
        )  # the widest sharing there is: demands fail here or never
        oversampling = config.oversampling or DEFAULT_OVERSAMPLING
        self.columns = [
            min(width, math.ceil(k * oversampling)) for width, k in zip(widths, self.candidates.tolist(), strict=True)
        ]
        self.capture = Capture(self.sites, self.columns, self._make_statistic, share=config.share_inputs, head=head)
        self.tracker: ConvergenceTracker | None = None
        self.decision: Decision | None = None
        self.gram_bytes = 0
        self.num_batches = self.num_rows = 0
        self.history: list[int] = []
        self.started = time.perf_counter()
        self.seconds = {"total": 0.0, "forward": 0.0, "statistics": 0.0, "refresh": 0.0}
        self.trace = Trace()
        self.stop_reason = ""
        self.rules: dict[str, set[str]] = {}  # layer -> what its rows were chosen by
        self.sides: dict[str, str] = {}  # layer of an encoder–decoder model -> which side its rows are of
        self.skipped_rows: dict[str, int] = {}  # layer -> rows left out for NaN or Inf
        self.latest: dict[int, Refreshed] = {}  # per stream

    def _make_statistic(self, stream: int) -> tuple[Statistic, str]:
        index = self.capture.site_of[stream]
        site, config = self.sites[index], self.config
        width, columns = site.in_features, self.columns[index]
        gram_bytes = GramStatistic.predict_nbytes(width, columns)
        kind: type[GramStatistic] | type[SubspaceStatistic] = SubspaceStatistic
        if config.statistic != "auto":
            kind, reason = (GramStatistic if config.statistic == "gram" else SubspaceStatistic), "asked for"
        elif width > GRAM_MAX_WIDENING * columns:
            reason = f"wider than {GRAM_MAX_WIDENING} times its {columns} columns"
        elif config.memory_budget is not None and self.gram_bytes + gram_bytes > config.memory_budget:
            reason = f"memory_budget of {config.memory_budget} bytes is spent"
        else:
            kind, reason = GramStatistic, f"at most {GRAM_MAX_WIDENING} times as wide as its {columns} columns"
        if kind is GramStatistic:
            self.gram_bytes += gram_bytes
        return self.new_statistic(stream, kind.kind, columns), reason

    def new_statistic(self, stream: int, kind: str, columns: int) -> Statistic:
        """An empty statistic of a layer's input."""
        site = self.sites[self.capture.site_of[stream]]
        return _KINDS[kind](
            site.in_features, columns, device=_device_of(site.module), seed=self.config.seed + stream,
            impl=self.config.impl, watch_gain=self.config.convergence == "captured",
        )  # fmt: skip

    def names(self, entry: Input) -> list[str]:
        """Of the layers fed by an input."""
        return list(dict.fromkeys(self.sites[self.capture.site_of[stream]].name for stream in entry.streams))

    def nonfinite_inputs(self) -> list[Input]:
        """The inputs that NaN or Inf has reached, found through their sums of squares: one synchronisation."""
        inputs = self.capture.inputs
        if not inputs:
            return []
        sums = torch.stack([entry.statistic.square_sum.to(inputs[0].statistic.square_sum.device) for entry in inputs])
        if bool(sums.sum().isfinite()):
            return []
        return [entry for entry, ok in zip(inputs, sums.isfinite().tolist(), strict=True) if not ok]

    def fail_nonfinite(self, counts: dict[str, int]) -> NoReturn:
        """Say where NaN or Inf is. ``counts``: rows that hold it in a second forward of the same batch, by layer."""
        reached = []
        for entry in self.nonfinite_inputs():
            names = self.names(entry)
            count = sum(counts.get(name, 0) for name in names)
            reached.append(f"{', '.join(names)} ({count or 'an unknown number of'} rows)")
        more = f" and {len(reached) - SHOWN_INPUTS} other inputs" if len(reached) > SHOWN_INPUTS else ""
        raise ValueError(
            f"batch {self.num_batches + 1}: NaN or Inf reached the input of {'; '.join(reached[:SHOWN_INPUTS])}{more}. "
            "Float16 overflows at 65504: bfloat16 or float32 may mend it; nonfinite='skip' leaves such rows out"
        )

    def finish_batch(self, mask: RowMask) -> None:
        """After a forward: refresh what has enough new rows, all layers together; decide; check the bounds."""
        self.num_batches += 1
        for name, rule in mask.rules.items():
            self.rules.setdefault(name, set()).add(rule)
        for entry in self.capture.inputs:  # what the first layer fed by an input found out holds for the others
            names = self.names(entry)
            rules = set[str]().union(*(self.rules.get(name, ()) for name in names))
            self.rules.update({name: set(rules) for name in names})
            side = next((self.sides[name] for name in names if name in self.sides), None)
            if side is not None:
                self.sides.update(dict.fromkeys(names, side))
        for name, count in mask.skipped.items():
            self.skipped_rows[name] = self.skipped_rows.get(name, 0) + count
        self.num_rows += self.capture.rows_in_batch
        self.capture.rows_in_batch = 0
        if self.num_rows:
            self._check_called()
            self._refresh([entry for entry in self.capture.inputs if self._is_due(entry)])
        self.history.append(int(self.decision.done.sum()) if self.decision else 0)
        limit = self.config.max_batches or DEFAULT_MAX_BATCHES
        if self.decision and self.decision.all_done:
            self.stop_reason = "all layers converged"
        elif self.num_batches >= limit:
            self.stop_reason = f"max_batches ({limit})"
        elif self.config.max_rows is not None and self.num_rows >= self.config.max_rows:
            self.stop_reason = f"max_rows ({self.config.max_rows})"

    def _is_due(self, entry: Input) -> bool:
        """Whether an input has enough new data for a refresh.

        A step from fewer rows than columns would pass the convergence test for being small. The paper's
        criterion and "captured" are defined batch by batch; otherwise refreshes come after 1, 2, 4, 8 batches
        and every ``REFRESH_PERIOD`` from then on, which is as accurate and costs a fraction.
        """
        statistic = entry.statistic
        if statistic.pending_rows < statistic.num_components:
            return False
        period = REFRESH_PERIOD if self.config.convergence == "subspace" else 1
        return entry.pending_batches >= min(2 ** max(statistic.num_refreshes - 1, 0), period)

    def _check_called(self) -> None:
        silent = self.silent()
        if silent and self.config.uncalled == "error":
            raise ValueError(
                f"model: {len(silent)} LoRA layers saw no input in the first batch: {', '.join(silent)}. Their "
                "statistics would stay empty; leave them out of target_modules, feed batches that reach them, or "
                'set uncalled="default", with which layers that see none keep their initial A.'
            )

    def silent(self) -> list[str]:
        """Names of the sites that have seen no input."""
        streams = [[self.capture.input_of[s] for s in self.capture.streams_of[i]] for i in range(len(self.sites))]
        return [self.sites[i].name for i, entries in enumerate(streams) if not any(entries)]

    def _rows_of(self, site: int) -> int | None:
        """Rows that a site's inputs hold; None where it was not called."""
        entries = [self.capture.input_of[stream] for stream in self.capture.streams_of[site]]
        counts = [entry.statistic.num_rows for entry in entries if entry is not None]
        return sum(counts) if counts else None

    def _refresh(self, inputs: list[Input]) -> None:
        if not inputs:
            return
        tick = time.perf_counter()
        refreshed = refresh_([entry.statistic for entry in inputs])
        for entry, result in zip(inputs, refreshed, strict=True):
            entry.pending_batches = 0
            if not result.finite:
                names = ", ".join(self.names(entry))
                raise ValueError(f"batch {self.num_batches}: the products of the input of {names} overflow float32")
            self.latest.update(dict.fromkeys(entry.streams, result))
        self._decide({self.capture.site_of[stream] for entry in inputs for stream in entry.streams})
        self.seconds["refresh"] += time.perf_counter() - tick

    def _decide(self, updated: set[int]) -> None:
        entries = enumerate(self.capture.input_of)
        called = sorted({self.capture.site_of[stream] for stream, entry in entries if entry is not None})
        if self.tracker is None or called != self.members:
            # Which layers are called, and which share an input, is known only now; a layer that is called for the
            # first time in a later batch starts the count anew for all.
            self.members, self.tracker = called, self.make_tracker(called, self.groups(called))
            updated = {self.capture.site_of[stream] for stream in self.latest}
        rows = len(called), int(self._candidates(called, self.groups(called)).max())
        cosines, overlaps, ratios, gains = (np.zeros(rows) for _ in range(4))
        for row, site in enumerate(called):
            parts = [s for s in self.capture.streams_of[site] if s in self.latest]
            weights = self._weights(parts)
            for stream, weight in zip(parts, weights, strict=True):
                result = self.latest[stream]
                k = min(rows[1], len(result.cosines))
                cosines[row, :k] += weight * result.cosines[:k]
                overlaps[row, :k] += weight * result.overlaps[:k]
                ratios[row, :k] += weight * result.explained_variance_ratio[:k]
                gains[row, :k] += weight * result.gains[:k]
        mask = np.isin(called, sorted(updated))
        self.decision = self.tracker.update(cosines, ratios, overlaps, gains, updated=mask)
        done = {site for site, is_done in zip(called, self.decision.done, strict=True) if is_done}
        self.capture.wanted = set(range(len(self.sites))) - (set() if self.config.equal_data else done)
        self._record(called, cosines, overlaps)

    def _record(self, called: list[int], cosines: np.ndarray[Any, Any], overlaps: np.ndarray[Any, Any]) -> None:
        """Add this refresh to the trace, for every site."""
        assert self.decision is not None
        agreements: list[float | None] = [None] * len(self.sites)
        converged = [0] * len(self.sites)
        for row, site in enumerate(called):
            converged[site] = int(self.decision.done[row])
            entries = [self.capture.input_of[stream] for stream in self.capture.streams_of[site]]
            if all(entry.statistic.num_refreshes > 1 for entry in entries if entry is not None):
                rank = int(self.decision.ranks[row])
                agreements[site] = agreement(cosines[row], overlaps[row], rank, self.config.convergence)
        self.trace.record(self.num_batches, self.num_rows, agreements, converged)

    def _weights(self, streams: list[int]) -> list[float]:
        """Each part's share of a site's rows: what its mean over parts is weighted with."""
        if len(streams) == 1:
            return [1.0]
        entries = [self.capture.input_of[stream] for stream in streams]
        rows = [entry.statistic.num_rows if entry is not None else 0 for entry in entries]
        return [count / max(1, sum(rows)) for count in rows]

    def groups(self, members: list[int]) -> list[int]:
        """Per site, a label of its input, equal where sites share it; a site of several parts shares none."""
        index = {id(entry): i for i, entry in enumerate(self.capture.inputs)}
        streams = [self.capture.streams_of[site] for site in members]
        return [
            index[id(self.capture.input_of[parts[0]])] if len(parts) == 1 else len(index) + parts[0]
            for parts in streams
        ]

    def _candidates(self, members: list[int], groups: list[int] | None) -> np.ndarray[Any, Any]:
        sites = [self.sites[i] for i in members]
        return candidate_components(
            [site.rank for site in sites], self.config.rho, widths=[site.in_features for site in sites],
            groups=groups, rank_multiple=self.config.rank_multiple, divisors=[site.rank_multiple for site in sites],
        )  # fmt: skip

    def make_tracker(self, members: list[int], groups: list[int]) -> ConvergenceTracker:
        """The tracker of some of the sites, given a label of each one's input."""
        config = self.config
        sites = [self.sites[i] for i in members]
        return ConvergenceTracker(
            self.candidates[members], groups=groups, budget=sum(site.rank for site in sites), tau=config.tau,
            criterion=config.convergence, min_rank=config.least_rank(s.removable for s in sites),
            max_rank=config.max_rank,
            rank_multiple=config.rank_multiple, divisors=[site.rank_multiple for site in sites],
        )  # fmt: skip

    def result(self) -> EvaStatistics:
        """Close the books: last refreshes, the exact eigensolve of every Gram, a warning if need be."""
        if self.num_rows == 0:
            raise ValueError(
                f"loader: {self.num_batches} batches held no unmasked row; check attention_mask, and labels "
                f"against label_mask_value ({self.config.label_mask_value}) or set use_label_mask=False"
            )
        empty = [site.name for i, site in enumerate(self.sites) if self._rows_of(i) == 0]
        if empty:
            raise ValueError(
                f"loader: {self.num_batches} batches held no row that counts for {', '.join(empty)}: all were masked, "
                "or left out for NaN or Inf"
            )
        self._refresh([e for e in self.capture.inputs if e.statistic.pending_rows])
        if self.decision is None:
            raise ValueError(f"model: none of its {len(self.sites)} LoRA layers saw an unmasked row: {self.silent()}")
        tick = time.perf_counter()
        for entry in self.capture.inputs:
            entry.statistic.finish_()
        self.seconds["refresh"] += time.perf_counter() - tick
        self.seconds["total"] = time.perf_counter() - self.started
        self.seconds["statistics"] = self.capture.seconds
        self.history[-1] = int(self.decision.done.sum())
        done = dict(zip(self.members, self.decision.done, strict=True))
        converged = dict(zip(self.members, self.decision.components_converged, strict=True))
        astray = [name for name, rules in self.rules.items() if FITS_NO_MASK in rules]
        if astray:
            warnings.warn(
                f"the inputs of {len(astray)} layers, the first is {astray[0]}, have rows that fit no mask of the "
                "batch; all of their rows counted, padding included; see report.statistic[name]['rows']",
                stacklevel=4,
            )
        pending = int((~self.decision.done).sum())
        if pending:
            warnings.warn(
                f"EVA stopped at {self.stop_reason}, after {self.num_batches} batches and {self.num_rows} rows, with "
                f"{pending} of {len(self.sites)} layers not converged; see report.converged",
                stacklevel=5,
            )
        return EvaStatistics(
            sites=[
                SiteStatistics(
                    name=site.name, inputs=self._inputs_of(i), rank=site.rank, in_features=site.in_features,
                    converged=bool(done.get(i, False)), components_converged=int(converged.get(i, 0)),
                    rank_multiple=site.rank_multiple, removable=site.removable, rows=self._rows(site.name),
                )
                for i, site in enumerate(self.sites)
            ],
            inputs=[self._input_statistics(entry) for entry in self.capture.inputs],
            config=self.config, num_batches=self.num_batches, num_rows=self.num_rows, seconds=self.seconds,
            history=self.history, stop_reason=self.stop_reason, notes=self._notes(), trace=self.trace,
            peak_memory=peak_memory(),
        )  # fmt: skip

    def _inputs_of(self, site: int) -> tuple[int, ...]:
        index = {id(entry): i for i, entry in enumerate(self.capture.inputs)}
        entries = [self.capture.input_of[stream] for stream in self.capture.streams_of[site]]
        return tuple(-1 if entry is None else index[id(entry)] for entry in entries)

    def _rows(self, name: str) -> str:
        rules = self.rules.get(name, set())
        return "; ".join(sorted(rules - {ALL_ROWS} or rules))

    def _notes(self) -> tuple[str, ...]:
        skipped = [f"{name} is not initialised by EVA: {reason}" for name, reason in self.skipped.items()]
        return (*skipped, *(f"{name} saw no input: it keeps its rank and its initial A" for name in self.silent()))

    def _input_statistics(self, entry: Input) -> InputStatistics:
        statistic = entry.statistic
        return InputStatistics(
            kind=statistic.kind, num_rows=statistic.num_rows, total_scatter=float(statistic.total_scatter()),
            nbytes=statistic.nbytes(), reason=entry.reason,
            skipped_rows=sum(self.skipped_rows.get(name, 0) for name in self.names(entry)),
            eigenvalues=statistic.eigenvalues.cpu(), components=statistic.basis.T.float().cpu().contiguous(),
        )  # fmt: skip


def _device_of(module: nn.Module) -> torch.device:
    """The device of the first parameter or buffer that is on one."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in tensors if tensor.device.type != "meta"), torch.device("cpu"))


def _may_stop_early(model: nn.Module, config: EvaConfig, forward_fn: ForwardFn | None) -> bool:
    """Whether leaving a forward by an exception is safe: nobody waits for its end."""
    if config.early_stop != "auto":
        return config.early_stop
    if forward_fn is not None:
        return False
    wrappers = ("OptimizedModule", "DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")
    return not any(
        hasattr(module, "_hf_hook") or type(module).__name__ in wrappers or hasattr(module, "_get_fsdp_state")
        for module in model.modules()
    )


def _head(model: nn.Module, adapter: LoraAdapter) -> nn.Module | None:
    """The LM head of a transformers model, unless a LoRA layer is in it."""
    find: Any = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if not isinstance(head, nn.Module) or {*head.modules()} & {site.module for site in adapter.sites}:
        return None
    return head


def _others_wait() -> bool:
    """Whether other processes would wait in vain if this one ran a forward of its own."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _input_device(model: nn.Module) -> torch.device:
    """Where batches go: the device of the first parameter that is on one."""
    for parameter in model.parameters():
        if parameter.device.type != "meta":
            return parameter.device
    raise ValueError("model: every parameter is on the meta device; load the base model's weights first")
