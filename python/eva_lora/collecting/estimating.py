"""What a run will take, from a copy of the model without weights: nothing of size is computed or kept."""

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from eva_kernels.streaming_svd import Statistic

from ..adapters import find_adapter
from ..config import DEFAULT_MAX_BATCHES, EvaConfig
from .batches import default_forward, to_device
from .ending import ForwardEnd, output_head
from .making import StatisticMaker
from .rows import RowMask
from .run import Run

__all__ = ["Estimate", "estimate", "matmul_rate"]


@dataclass(frozen=True)
class Estimate:
    """The result of :func:`estimate`.

    Attributes:
        ranks: Layer → configured rank.
        in_features: Layer → width of its input.
        inputs: The layers of each distinct input.
        statistic: Per distinct input, "gram" or "subspace".
        weight_bytes: The model's parameters and buffers, the adapter's included.
        statistics_bytes: The states of all statistics.
        forward_flops: Of one batch's forward, products only: up to the output head, where no layer comes after it.
        statistics_flops: Of folding one batch into the statistics, products only.
        rows: Rows (tokens) of the batch, padding included.
        max_batches: The bound on the batches of a run.
    """

    ranks: dict[str, int]
    in_features: dict[str, int]
    inputs: list[list[str]]
    statistic: list[str]
    weight_bytes: int
    statistics_bytes: int
    forward_flops: int
    statistics_flops: int
    rows: int
    max_batches: int

    def seconds_per_batch(self, rate: float) -> float:
        """Seconds a batch takes where products run at ``rate`` FLOP/s and all else is free."""
        return (self.forward_flops + self.statistics_flops) / rate


class _SizesOnly(StatisticMaker):
    """Makes statistics that have their size, but take in nothing."""

    def make(self, stream: int) -> tuple[Statistic, str]:
        statistic, reason = super().make(stream)
        vars(statistic)["accumulate_"] = lambda *_, **__: None
        return statistic, reason


def estimate(model: nn.Module, batch: Any, config: Any = None) -> Estimate:
    """Find layers, shared inputs, memory and work of a run by a forward that computes shapes only.

    Args:
        model: With LoRA layers, on the meta device (``with torch.device("meta"): ...``).
        batch: One batch as the loader would yield it; its values matter to nothing but its shapes.
        config: Ours or PEFT's ``EvaConfig``.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: no LoRA layers, ones that EVA cannot initialise, layers that a forward does not reach, or a
            parameter that is not on the meta device.
        RuntimeError: the model's forward needs values, not only shapes.
    """
    config = EvaConfig.of(config)
    adapter = find_adapter(model)
    real = [name for name, parameter in model.named_parameters() if parameter.device.type != "meta"]
    if real:
        raise ValueError(f"model: expected every parameter on the meta device, {real[0]} is not")
    end = ForwardEnd(output_head(model, adapter.sites))
    run = Run(adapter, config, end=end, maker=_SizesOnly)
    counter = FlopCounterMode(display=False)
    up_to_head: list[int] = []
    at_head: AbstractContextManager[object] = nullcontext()
    if end.head is not None:
        at_head = end.head.register_forward_pre_hook(lambda *_: up_to_head.append(counter.get_total_flops()))
    model.eval()
    rehearsed = FakeTensorMode(allow_non_fake_inputs=True)
    with at_head, rehearsed, run.capture.hooks(), adapter.disabled(), torch.no_grad():
        shapes = to_device(batch, torch.device("meta"))
        try:
            with counter, run.capture.batch(RowMask(None, None)):
                end.run(lambda: default_forward(model, shapes), 0)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise RuntimeError(f"model: its forward cannot be rehearsed without values: {reason}") from error
    run.require_called()
    entries = run.capture.inputs
    rows = run.capture.rows_in_batch
    return Estimate(
        ranks={site.name: site.rank for site in run.sites},
        in_features={site.name: site.in_features for site in run.sites},
        inputs=[run.names(entry) for entry in entries],
        statistic=[entry.statistic.kind for entry in entries],
        weight_bytes=sum(_nbytes(tensor) for tensor in (*model.parameters(), *model.buffers())),
        statistics_bytes=sum(entry.statistic.nbytes() for entry in entries),
        forward_flops=up_to_head[0] if up_to_head and not end.reason else counter.get_total_flops(),
        statistics_flops=sum(_flops(entry.statistic, rows) for entry in entries),
        rows=rows,
        max_batches=config.max_batches or DEFAULT_MAX_BATCHES,
    )


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _flops(statistic: Statistic, rows: int) -> int:
    """Of the products with ``rows`` rows: XᵀX, or Xᵀ(XS)."""
    d, q = statistic.num_features, statistic.num_components
    return 2 * rows * d * (d if statistic.kind == "gram" else 2 * q)


def matmul_rate(device: torch.device | str, dtype: torch.dtype, *, width: int = 1024) -> float:
    """FLOP/s of a matrix product of this width here and now: the best of several, a fraction of a second in all."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(width, width, generator=generator, dtype=torch.float32, device="cpu").to(device, dtype)
    best = float("inf")
    for _ in range(5):
        tick = time.perf_counter()
        float((left @ left)[0, 0])  # reading a value waits for the device
        best = min(best, time.perf_counter() - tick)
    return 2.0 * width**3 / best
