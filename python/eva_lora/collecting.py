"""The pass over the data: forward passes of the frozen model, statistics folded in as they run."""

import itertools
import math
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from eva_kernels.allocation import candidate_components
from eva_kernels.convergence import ConvergenceTracker, Decision
from eva_kernels.streaming_svd import GramStatistic, Refreshed, Statistic, SubspaceStatistic, refresh_

from .adapters import LoraAdapter, LoraSite, find_adapter
from .batches import ForwardFn, RowMaskFn, default_forward, endless, first_batch, row_mask, to_device
from .capture import Capture, Input
from .config import DEFAULT_MAX_BATCHES, DEFAULT_OVERSAMPLING, GRAM_MAX_WIDENING, REFRESH_PERIOD, EvaConfig
from .statistics import EvaStatistics, InputStatistics, SiteStatistics

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
    checkpoint: None = None,
    checkpoint_every: None = None,
) -> EvaStatistics:
    """Run the frozen model over batches until every layer's components have converged (or a bound is met).

    Nothing of the model's is changed: adapters are disabled, modules are in eval mode and hooked only while
    it runs, and the global random generators are left alone. Arguments are those of
    :func:`eva_lora.eva_initialize`.

    Returns:
        The statistics of every distinct layer input: enough to plan ranks and write A.

    Raises:
        TypeError: ``model`` is no module, ``loader`` not iterable, ``config`` of another type, or a layer's
            input no floating-point tensor.
        ValueError: no LoRA layers, an empty loader, batches without a single unmasked row, a layer that the
            first batch does not reach, NaN or Inf in a layer's input (the layer and the batch are named).
    """
    config = EvaConfig.of(config)
    for name, value in (("checkpoint", checkpoint), ("checkpoint_every", checkpoint_every)):
        if value is not None:
            raise ValueError(f"{name}: not available yet; supported values: None")
    adapter = find_adapter(model, sites)
    return collect_with(
        adapter, model, loader, config, forward_fn=forward_fn, row_mask_fn=row_mask_fn, progress=progress
    )


def collect_with(
    adapter: LoraAdapter,
    model: nn.Module,
    loader: Iterable[Any],
    config: EvaConfig,
    *,
    forward_fn: ForwardFn | None = None,
    row_mask_fn: RowMaskFn | None = None,
    progress: bool = True,
) -> EvaStatistics:
    """:func:`collect` for an adapter that is known already."""
    if adapter.skipped:
        named = "; ".join(f"{name}: {reason}" for name, reason in adapter.skipped.items())
        warnings.warn(f"EVA leaves these layers as they are: {named}", stacklevel=4)
    run = _Run(adapter, config)
    first, rest = first_batch(loader)
    early_stop = _may_stop_early(model, config, forward_fn)
    forward = forward_fn or default_forward
    device = _input_device(model)
    bar = tqdm(total=None, desc="EVA", unit="batch", disable=None if progress else True)
    with bar, _frozen(model), adapter.disabled(), run.capture.hooks():
        for batch in endless(first, rest, loader):
            batch = to_device(batch, device)
            mask = row_mask(batch, config, row_mask_fn)
            if mask.num_rows != 0:
                tick = time.perf_counter()
                with run.capture.batch(mask, early_stop=early_stop):
                    forward(model, batch)
                run.seconds["forward"] += time.perf_counter() - tick
            run.finish_batch()
            bar.update()
            bar.set_postfix_str(f"{run.history[-1]}/{len(adapter.sites)} layers converged, {run.num_rows} rows")
            if run.stop_reason:
                break
        else:
            run.stop_reason = "end of the data"
    return run.result()


class _Run:
    """The state of one pass: what the hooks fill, what the tracker decides, and when to stop."""

    def __init__(self, adapter: LoraAdapter, config: EvaConfig) -> None:
        self.config, self.sites, self.skipped = config, list(adapter.sites), dict(adapter.skipped)
        widths = [site.in_features for site in self.sites]
        self.members = list(range(len(self.sites)))  # sites the tracker follows: those that have data
        self.candidates = self._candidates(self.members, None)
        self._make_tracker(
            self.members, [0] * len(self.sites)
        )  # the widest sharing there can be: demands fail here or never
        oversampling = config.oversampling or DEFAULT_OVERSAMPLING
        self.columns = [
            min(width, math.ceil(k * oversampling)) for width, k in zip(widths, self.candidates.tolist(), strict=True)
        ]
        self.capture = Capture(self.sites, self.columns, self._make_statistic, share=config.share_inputs)
        self.tracker: ConvergenceTracker | None = None
        self.decision: Decision | None = None
        self.gram_bytes = 0
        self.num_batches = self.num_rows = 0
        self.history: list[int] = []
        self.started = time.perf_counter()
        self.seconds = {"total": 0.0, "forward": 0.0, "refresh": 0.0}
        self.stop_reason = ""
        self._latest: dict[int, Refreshed] = {}  # per stream

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
        device = _device_of(site.module)
        return kind(width, columns, device=device, seed=config.seed + stream, impl=config.impl), reason

    def finish_batch(self) -> None:
        """After a forward: refresh what has enough new rows, all layers together; decide; check the bounds."""
        self.num_batches += 1
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
        criterion is defined batch by batch; otherwise refreshes come after 1, 2, 4, 8 batches and every
        ``REFRESH_PERIOD`` from then on, which is as accurate and costs a fraction.
        """
        statistic = entry.statistic
        if statistic.pending_rows < statistic.num_components:
            return False
        period = 1 if self.config.convergence == "component" else REFRESH_PERIOD
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

    def _refresh(self, inputs: list[Input]) -> None:
        if not inputs:
            return
        tick = time.perf_counter()
        refreshed = refresh_([entry.statistic for entry in inputs])
        for entry, result in zip(inputs, refreshed, strict=True):
            entry.pending_batches = 0
            if not result.finite:
                names = ", ".join(dict.fromkeys(self.sites[self.capture.site_of[s]].name for s in entry.streams))
                raise ValueError(f"batch {self.num_batches}: NaN or Inf reached the input of {names}")
            self._latest.update(dict.fromkeys(entry.streams, result))
        self._decide({self.capture.site_of[stream] for entry in inputs for stream in entry.streams})
        self.seconds["refresh"] += time.perf_counter() - tick

    def _decide(self, updated: set[int]) -> None:
        entries = enumerate(self.capture.input_of)
        called = sorted({self.capture.site_of[stream] for stream, entry in entries if entry is not None})
        if self.tracker is None or called != self.members:
            # Which layers are called, and which share an input, is known only now; a layer that is called for the
            # first time in a later batch starts the count anew for all.
            self.members, self.tracker = called, self._make_tracker(called, self.groups(called))
            updated = {self.capture.site_of[stream] for stream in self._latest}
        rows = len(called), int(self._candidates(called, self.groups(called)).max())
        cosines, overlaps, ratios = np.zeros(rows), np.zeros(rows), np.zeros(rows)
        for row, site in enumerate(called):
            parts = [s for s in self.capture.streams_of[site] if s in self._latest]
            weights = self._weights(parts)
            for stream, weight in zip(parts, weights, strict=True):
                result = self._latest[stream]
                k = min(rows[1], len(result.cosines))
                cosines[row, :k] += weight * result.cosines[:k]
                overlaps[row, :k] += weight * result.overlaps[:k]
                ratios[row, :k] += weight * result.explained_variance_ratio[:k]
        mask = np.isin(called, sorted(updated))
        self.decision = self.tracker.update(cosines, ratios, overlaps, updated=mask)
        done = {site for site, is_done in zip(called, self.decision.done, strict=True) if is_done}
        self.capture.wanted = set(range(len(self.sites))) - (set() if self.config.equal_data else done)

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

    def _make_tracker(self, members: list[int], groups: list[int]) -> ConvergenceTracker:
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
        self._refresh([e for e in self.capture.inputs if e.statistic.pending_rows])
        if self.decision is None:
            raise ValueError(f"model: none of its {len(self.sites)} LoRA layers saw an unmasked row: {self.silent()}")
        tick = time.perf_counter()
        for entry in self.capture.inputs:
            entry.statistic.finish_()
        self.seconds["refresh"] += time.perf_counter() - tick
        self.seconds["total"] = time.perf_counter() - self.started
        done = dict(zip(self.members, self.decision.done, strict=True))
        converged = dict(zip(self.members, self.decision.components_converged, strict=True))
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
                    rank_multiple=site.rank_multiple, removable=site.removable,
                )
                for i, site in enumerate(self.sites)
            ],
            inputs=[_input_statistics(entry.statistic, entry.reason) for entry in self.capture.inputs],
            config=self.config, num_batches=self.num_batches, num_rows=self.num_rows, seconds=self.seconds,
            history=self.history, stop_reason=self.stop_reason, notes=self._notes(),
        )  # fmt: skip

    def _inputs_of(self, site: int) -> tuple[int, ...]:
        index = {id(entry): i for i, entry in enumerate(self.capture.inputs)}
        entries = [self.capture.input_of[stream] for stream in self.capture.streams_of[site]]
        return tuple(-1 if entry is None else index[id(entry)] for entry in entries)

    def _notes(self) -> tuple[str, ...]:
        skipped = [f"{name} is not initialised by EVA: {reason}" for name, reason in self.skipped.items()]
        return (*skipped, *(f"{name} saw no input: it keeps its rank and its initial A" for name in self.silent()))


def _device_of(module: nn.Module) -> torch.device:
    """The device of the first parameter or buffer that is on one."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in tensors if tensor.device.type != "meta"), torch.device("cpu"))


def _input_statistics(statistic: Statistic, reason: str) -> InputStatistics:
    return InputStatistics(
        kind=statistic.kind, num_rows=statistic.num_rows, total_scatter=float(statistic.total_scatter()),
        nbytes=statistic.nbytes(), reason=reason, eigenvalues=statistic.eigenvalues.cpu(),
        components=statistic.basis.T.float().cpu().contiguous(),
    )  # fmt: skip


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients; afterwards every module's training flag is what it was."""
    training = [module for module in model.modules() if module.training]
    # In eval mode these would pack padded batches into nested tensors, which have no rows of a common shape.
    nesting: list[Any] = [module for module in model.modules() if getattr(module, "use_nested_tensor", False)]
    model.eval()
    try:
        for module in nesting:
            module.use_nested_tensor = False
        with torch.no_grad():
            yield
    finally:
        for module in nesting:
            module.use_nested_tensor = True
        for module in training:
            module.training = True


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


def _input_device(model: nn.Module) -> torch.device:
    """Where batches go: the device of the first parameter that is on one."""
    for parameter in model.parameters():
        if parameter.device.type != "meta":
            return parameter.device
    raise ValueError("model: every parameter is on the meta device; load the base model's weights first")
