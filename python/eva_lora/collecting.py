"""The pass over the data: forward passes of the frozen model, statistics folded in as they run."""

import math
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from eva_kernels.allocation import candidate_components
from eva_kernels.convergence import ConvergenceTracker, Decision
from eva_kernels.streaming_svd import GramStatistic, Refreshed, Statistic, SubspaceStatistic, refresh_

from .adapters import LoraAdapter, find_adapter
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
from .preflight import require_loaded
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
    sites: None = None,
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
    if sites is not None:
        raise ValueError("sites: not available yet; supported values: None")
    if checkpoint is None and checkpoint_every is not None:
        raise ValueError("checkpoint_every: expected None without a checkpoint to write")
    adapter = find_adapter(model)
    require_loaded(model)
    run = Run(adapter, config)
    device = _input_device(model)
    saving = position = None
    if checkpoint is not None:
        known = identity(model, run, device, forward_fn=forward_fn, row_mask_fn=row_mask_fn)
        saving = Checkpoint(checkpoint, checkpoint_every, known)
        position = saving.load_into(run)
    early_stop = _may_stop_early(model, config, forward_fn)
    forward = forward_fn or default_forward
    two_sided = is_encoder_decoder(model)
    bar = tqdm(total=None, initial=run.num_batches, desc="EVA", unit="batch", disable=None if progress else True)
    with bar, borrowed(model), adapter.disabled(), run.capture.hooks():
        stream = Stream(loader, fingerprints=saving is not None, position=position)
        while not run.stop_reason:
            batch = next(stream, _END)
            if batch is _END:
                run.stop_reason = "end of the data"
            else:
                batch = to_device(batch, device)
                mask = row_mask(batch, config, row_mask_fn, encoder_decoder=two_sided)
                mask.sides = run.sides
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
                bar.update()
                bar.set_postfix_str(f"{run.history[-1]}/{len(adapter.sites)} layers converged, {run.num_rows} rows")
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

    def __init__(self, adapter: LoraAdapter, config: EvaConfig) -> None:
        self.config, self.sites = config, adapter.sites
        widths = [site.in_features for site in self.sites]
        self.ranks = [site.rank for site in self.sites]
        self.candidates = candidate_components(
            self.ranks, config.rho, widths=widths, rank_multiple=config.rank_multiple
        )
        self.make_tracker(groups=[0] * len(self.sites))  # the widest sharing there can be: demands fail here or never
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
        self.rules: dict[str, set[str]] = {}  # layer -> what its rows were chosen by
        self.sides: dict[str, str] = {}  # layer of an encoder–decoder model -> which side its rows are of
        self.skipped: dict[str, int] = {}  # layer -> rows left out for NaN or Inf
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
        return self.new_statistic(index, kind.kind, columns), reason

    def new_statistic(self, index: int, kind: str, columns: int) -> Statistic:
        """An empty statistic of a layer's input."""
        site = self.sites[index]
        device = next(site.module.parameters()).device
        return _KINDS[kind](
            site.in_features, columns, device=device, seed=self.config.seed + index, impl=self.config.impl
        )

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
            names = [self.sites[site].name for site in entry.sites]
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
            names = [self.sites[site].name for site in entry.sites]
            rules = set[str]().union(*(self.rules.get(name, ()) for name in names))
            self.rules.update({name: set(rules) for name in names})
            side = next((self.sides[name] for name in names if name in self.sides), None)
            if side is not None:
                self.sides.update(dict.fromkeys(names, side))
        for name, count in mask.skipped.items():
            self.skipped[name] = self.skipped.get(name, 0) + count
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
                raise ValueError(f"batch {self.num_batches}: the products of the input of {names} overflow float32")
            self._latest.update(dict.fromkeys(entry.sites, result))
        self._decide({site for entry in inputs for site in entry.sites})
        self.seconds["refresh"] += time.perf_counter() - tick

    def _decide(self, updated: set[int]) -> None:
        if self.tracker is None:  # which layers share an input is known only after the first batch
            self.tracker = self.make_tracker(self.groups())
        rows = len(self.sites), int(self.tracker_candidates().max())
        cosines, overlaps, ratios = np.zeros(rows), np.zeros(rows), np.zeros(rows)
        for site, result in self._latest.items():
            k = min(rows[1], len(result.cosines))
            cosines[site, :k] = result.cosines[:k]
            overlaps[site, :k] = result.overlaps[:k]
            ratios[site, :k] = result.explained_variance_ratio[:k]
        mask = np.isin(np.arange(rows[0]), sorted(updated))
        self.decision = self.tracker.update(cosines, ratios, overlaps, updated=mask)
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

    def make_tracker(self, groups: list[int]) -> ConvergenceTracker:
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
        empty = [site.name for site, entry in zip(self.sites, self.capture.input_of, strict=True)
                 if entry is not None and entry.statistic.num_rows == 0]  # fmt: skip
        if empty:
            raise ValueError(
                f"loader: {self.num_batches} batches held no row that counts for {', '.join(empty)}: all were masked, "
                "or left out for NaN or Inf"
            )
        self._refresh([e for e in self.capture.inputs if e.statistic.pending_rows])
        tick = time.perf_counter()
        for entry in self.capture.inputs:
            entry.statistic.finish_()
        self.seconds["refresh"] += time.perf_counter() - tick
        self.seconds["total"] = time.perf_counter() - self.started
        assert self.decision is not None
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
                stacklevel=4,
            )
        return EvaStatistics(
            sites=[
                SiteStatistics(
                    name=site.name, input=group, rank=site.rank, in_features=site.in_features,
                    converged=bool(self.decision.done[i]),
                    components_converged=int(self.decision.components_converged[i]),
                    rows=self._rows(site.name),
                )
                for i, (site, group) in enumerate(zip(self.sites, self.groups(), strict=True))
            ],
            inputs=[self._input_statistics(entry) for entry in self.capture.inputs],
            config=self.config, num_batches=self.num_batches, num_rows=self.num_rows, seconds=self.seconds,
            history=self.history, stop_reason=self.stop_reason,
        )  # fmt: skip

    def _rows(self, name: str) -> str:
        rules = self.rules.get(name, set())
        return "; ".join(sorted(rules - {ALL_ROWS} or rules))

    def _input_statistics(self, entry: Input) -> InputStatistics:
        statistic = entry.statistic
        return InputStatistics(
            kind=statistic.kind, num_rows=statistic.num_rows, total_scatter=float(statistic.total_scatter()),
            nbytes=statistic.nbytes(), reason=entry.reason,
            skipped_rows=sum(self.skipped.get(self.sites[site].name, 0) for site in entry.sites),
            eigenvalues=statistic.eigenvalues.cpu(), components=statistic.basis.T.float().cpu().contiguous(),
        )  # fmt: skip


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


def _others_wait() -> bool:
    """Whether other processes would wait in vain if this one ran a forward of its own."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _input_device(model: nn.Module) -> torch.device:
    """Where batches go: the device of the first parameter that is on one."""
    for parameter in model.parameters():
        if parameter.device.type != "meta":
            return parameter.device
    raise ValueError("model: every parameter is on the meta device; load the base model's weights first")
