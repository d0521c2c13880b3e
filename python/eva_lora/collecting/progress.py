"""The progress line of a pass: rows per second, layers converged, and about when it will end."""

import math
import os
import sys
import time
from types import TracebackType

import torch.distributed
from tqdm.auto import tqdm

from ..config import DEFAULT_MAX_BATCHES, EvaConfig
from ..planning import Trace

__all__ = ["Progress", "is_main_process", "predict_batches"]


class Progress:
    """One line on standard error; silent when that is no terminal (notebooks aside), and on all ranks but 0.

    Args:
        num_layers: LoRA layers in all.
        config: The options of the run, whose bounds the prediction respects.
        seen: Batches and rows that an earlier run, resumed now, has seen.
        enabled: False silences it.
    """

    def __init__(
        self, num_layers: int, config: EvaConfig, *, seen: tuple[int, int] = (0, 0), enabled: bool = True
    ) -> None:
        self._num_layers, self._config, self._seen = num_layers, config, seen
        shown = enabled and is_main_process()
        in_notebook = "ipykernel" in sys.modules
        self._bar = tqdm(
            desc="EVA", unit="batch", initial=seen[0], disable=(False if in_notebook else None) if shown else True,
            bar_format="{desc}: {n_fmt} batches in {elapsed}{postfix}",
        )  # fmt: skip
        self._started = time.perf_counter()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()

    def update(self, batches: int, rows: int, converged: int, trace: Trace) -> None:
        """After a batch: totals so far, and the trace up to here."""
        if self._bar.disable:
            return
        seconds = time.perf_counter() - self._started
        parts = [f"{(rows - self._seen[1]) / seconds:,.0f} rows/s", f"{converged}/{self._num_layers} layers converged"]
        remaining = predict_batches(batches, rows, trace, self._config) - batches
        if remaining > 0:
            parts.append(f"about {tqdm.format_interval(remaining * seconds / (batches - self._seen[0]))} left")
        self._bar.set_postfix_str(", ".join(parts), refresh=False)
        self._bar.update(batches - self._bar.n)


def predict_batches(batches: int, rows: int, trace: Trace, config: EvaConfig) -> int:
    """About how many batches the run will have seen at its end.

    What a refresh changes shrinks with the share of new rows, 1/t, and the share of the subspace that
    differs with its square. So the layer furthest from tau now is there after t √(defect / (1 − tau))
    batches, unless a bound of ``config`` ends the run before.
    """
    bounds = [config.max_batches or DEFAULT_MAX_BATCHES]
    if config.max_rows is not None and rows:
        bounds.append(math.ceil(batches * config.max_rows / rows))
    if trace.agreement and config.tau < 1:
        waiting = [
            agreement
            for agreement, converged in zip(trace.agreement[-1], trace.converged[-1], strict=True)
            if not converged
        ]
        if not waiting:
            bounds.append(batches)
        elif None not in waiting:
            defect = max(1.0 - agreement for agreement in waiting if agreement is not None)
            bounds.append(math.ceil(trace.batch[-1] * math.sqrt(max(defect / (1.0 - config.tau), 1.0))))
    return max(batches, min(bounds))


def is_main_process() -> bool:
    """Whether this is rank 0, of the initialised process group or as the launcher's ``RANK`` says."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"
