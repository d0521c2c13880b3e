"""The pass over the data: forward passes of the frozen model, statistics folded in as they run."""

import math
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from eva_kernels.allocation import candidate_components
from eva_kernels.convergence import ConvergenceTracker, Decision
from eva_kernels.streaming_svd import GramStatistic, Refreshed, Statistic, SubspaceStatistic, refresh_

from .adapters import LoraAdapter, find_adapter
from .batches import ForwardFn, RowMaskFn, default_forward, endless, first_batch, row_mask, to_device
from .capture import Capture, Input
from .config import DEFAULT_MAX_BATCHES, DEFAULT_OVERSAMPLING, GRAM_MAX_WIDENING, REFRESH_PERIOD, EvaConfig
from .measurements import Trace, peak_memory
from .progress import Progress
from .statistics import EvaStatistics, InputStatistics, SiteStatistics

__all__ = ["collect"]


def collect(
    model: nn.Module,
    loader: Iterable[Any],
    config: Any = None,
    *,
    forward_fn: ForwardFn | None = None,
    row_mask_fn: RowMaskFn | None = None,
    sites: None = None,
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
    for name, value in (("sites", sites), ("checkpoint", checkpoint), ("checkpoint_every", checkpoint_every)):
        if value is not None:
            raise ValueError(f"{name}: not available yet; supported values: None")
    adapter = find_adapter(model)
    run = _Run(adapter, config)
    first, rest = first_batch(loader)
    early_stop = _may_stop_early(model, config, forward_fn)
    forward = forward_fn or default_forward
    device = _input_device(model)
    bar = Progress(len(adapter.sites), config, enabled=progress)
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
            bar.update(run.num_batches, run.num_rows, run.history[-1], run.trace)
            if run.stop_reason:
                break
        else:
            run.stop_reason = "end of the data"
    return run.result()


class _Run:
    """The state of one pass: what the hooks fill, what the tracker decides, and when to stop."""

    def __init__(self, adapter: LoraAdapter, config: EvaConfig) -> None:
        self.config, self.sites = config, adapter.sites
        widths = [site.in_features for site in self.sites]
        self.ranks = [site.rank for site in self.sites]
        self.candidates = candidate_components(
            self.ranks, config.rho, widths=widths, rank_multiple=config.rank_multiple
        )
        self._make_tracker(groups=[0] * len(self.sites))  # the widest sharing there can be: demands fail here or never
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
        self.seconds = {"total": 0.0, "forward": 0.0, "statistics": 0.0, "refresh": 0.0}
        self.trace = Trace()
        self.stop_reason = ""
        self._latest: dict[int, Refreshed] = {}  # per site

    def _make_statistic(self, index: int) -> tuple[Statistic, str]:
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
        device = next(site.module.parameters()).device
        return kind(width, columns, device=device, seed=config.seed + index, impl=config.impl), reason

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
        silent = [site.name for site, entry in zip(self.sites, self.capture.input_of, strict=True) if entry is None]
        if silent:
            raise ValueError(
                f"model: {len(silent)} LoRA layers saw no input in the first batch: {', '.join(silent)}. Their "
                "statistics would stay empty; leave them out of target_modules, or feed batches that reach them."
            )

    def _refresh(self, inputs: list[Input]) -> None:
        if not inputs:
            return
        tick = time.perf_counter()
        refreshed = refresh_([entry.statistic for entry in inputs])
        for entry, result in zip(inputs, refreshed, strict=True):
            entry.pending_batches = 0
            if not result.finite:
                names = ", ".join(self.sites[s].name for s in entry.sites)
                raise ValueError(f"batch {self.num_batches}: NaN or Inf reached the input of {names}")
            self._latest.update(dict.fromkeys(entry.sites, result))
        self._decide({site for entry in inputs for site in entry.sites})
        self.seconds["refresh"] += time.perf_counter() - tick

    def _decide(self, updated: set[int]) -> None:
        if self.tracker is None:  # which layers share an input is known only after the first batch
            self.tracker = self._make_tracker(self.groups())
        rows = len(self.sites), int(self.tracker_candidates().max())
        cosines, overlaps, ratios = np.zeros(rows), np.zeros(rows), np.zeros(rows)
        for site, result in self._latest.items():
            k = min(rows[1], len(result.cosines))
            cosines[site, :k] = result.cosines[:k]
            overlaps[site, :k] = result.overlaps[:k]
            ratios[site, :k] = result.explained_variance_ratio[:k]
        mask = np.isin(np.arange(rows[0]), sorted(updated))
        self.decision = self.tracker.update(cosines, ratios, overlaps, updated=mask)
        compared = [
            self._latest.get(site) if entry is not None and entry.statistic.num_refreshes > 1 else None
            for site, entry in enumerate(self.capture.input_of)
        ]
        self.trace.record(self.num_batches, self.num_rows, self.decision, compared, self.config.convergence)
        everyone = set(range(rows[0]))
        if self.config.equal_data:
            self.capture.wanted = everyone
        else:
            self.capture.wanted = {i for i in everyone if not self.decision.done[i]}

    def groups(self) -> list[int]:
        """Per site, the index of its input."""
        index = {id(entry): i for i, entry in enumerate(self.capture.inputs)}
        return [index[id(entry)] for entry in self.capture.input_of]

    def tracker_candidates(self) -> np.ndarray[Any, Any]:
        widths = [site.in_features for site in self.sites]
        return candidate_components(
            self.ranks, self.config.rho, widths=widths, groups=self.groups(), rank_multiple=self.config.rank_multiple
        )

    def _make_tracker(self, groups: list[int]) -> ConvergenceTracker:
        config = self.config
        return ConvergenceTracker(
            self.candidates, groups=groups, budget=sum(self.ranks), tau=config.tau,
            criterion=config.convergence, min_rank=config.min_rank, max_rank=config.max_rank,
            rank_multiple=config.rank_multiple,
        )  # fmt: skip

    def result(self) -> EvaStatistics:
        """Close the books: last refreshes, the exact eigensolve of every Gram, a warning if need be."""
        if self.num_rows == 0:
            raise ValueError(
                f"loader: {self.num_batches} batches held no unmasked row; check attention_mask, and labels "
                f"against label_mask_value ({self.config.label_mask_value}) or set use_label_mask=False"
            )
        self._refresh([e for e in self.capture.inputs if e.statistic.pending_rows])
        tick = time.perf_counter()
        for entry in self.capture.inputs:
            entry.statistic.finish_()
        self.seconds["refresh"] += time.perf_counter() - tick
        self.seconds["total"] = time.perf_counter() - self.started
        self.seconds["statistics"] = self.capture.seconds
        assert self.decision is not None
        self.history[-1] = int(self.decision.done.sum())
        pending = int((~self.decision.done).sum())
        if pending:
            warnings.warn(
                f"EVA stopped at {self.stop_reason}, after {self.num_batches} batches and {self.num_rows} rows, with "
                f"{pending} of {len(self.sites)} layers not converged; see report.converged",
                stacklevel=4,
            )
        return EvaStatistics(
            sites=[
                SiteStatistics(
                    name=site.name, input=group, rank=site.rank, in_features=site.in_features,
                    converged=bool(self.decision.done[i]),
                    components_converged=int(self.decision.components_converged[i]),
                )
                for i, (site, group) in enumerate(zip(self.sites, self.groups(), strict=True))
            ],
            inputs=[_input_statistics(entry.statistic, entry.reason) for entry in self.capture.inputs],
            config=self.config, num_batches=self.num_batches, num_rows=self.num_rows, seconds=self.seconds,
            history=self.history, stop_reason=self.stop_reason, trace=self.trace, peak_memory=peak_memory(),
        )  # fmt: skip


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
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
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
