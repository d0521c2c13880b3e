"""What a pass over many ranks costs: bytes that travel, memory and time, from shapes alone.

Bytes are those that one rank sends, in rings where all get all: a reduce-scatter or an all-gather of n bytes sends
n (W − 1) / W, an all-reduce twice that. They are checked against what gloo sends (tests/distributed/test_costs.py).
Times are bytes over bandwidth plus latencies, and work over a rate that the caller knows; nothing else is in them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from eva_kernels.streaming_svd import GramStatistic, SubspaceStatistic

from ..config import REFRESH_PERIOD, default_columns

__all__ = ["Decoder", "Devices", "InputShape", "Prediction", "Traffic", "predict", "traffic"]

BUCKET_BYTES = 2**26  # of the tensors that are reduced at a time: what a pass needs beside its statistics, twice
EVIDENCE = 4  # rows of a refresh's evidence: cosines, overlaps, ratios, gains
PERIOD = REFRESH_PERIOD["subspace"]  # of the default criterion


@dataclass(frozen=True)
class InputShape:
    """One distinct layer input.

    Attributes:
        width: d.
        columns: q, of its statistic's basis.
        kind: "subspace" or "gram".
    """

    width: int
    columns: int
    kind: str = "subspace"

    @property
    def nbytes(self) -> int:
        """Of its statistic on every rank."""
        kind = GramStatistic if self.kind == "gram" else SubspaceStatistic
        return kind.predict_nbytes(self.width, self.columns)

    @property
    def sums_nbytes(self) -> int:
        """What is added up of it in a refresh: the product, and the totals in float64."""
        return 4 * self.width * self.columns + 8 * (self.width + 1)

    @property
    def basis_nbytes(self) -> int:
        """What comes back: the basis, eigenvalues and evidence."""
        return 4 * self.width * self.columns + 8 * ((1 + EVIDENCE) * self.columns + 1)


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends.

    Attributes:
        start: Once, for all inputs to start from the same rows.
        batch: With every batch: who has one, and how many rows each input got.
        refresh: With every refresh.
        end: Once, for the result.
    """

    start: float
    batch: float
    refresh: float
    end: float

    def total(self, batches: int) -> float:
        """Of a pass that refreshes after 1, 2, 4, … and then every 4 batches."""
        return self.start + batches * self.batch + num_refreshes(batches) * self.refresh + self.end


def num_refreshes(batches: int) -> int:
    """Of a pass of so many batches that each bring more rows than an input has columns; the last one included."""
    refreshes = pending = 0
    for _ in range(batches):
        pending += 1
        if pending >= min(2 ** max(refreshes - 1, 0), PERIOD):
            refreshes, pending = refreshes + 1, 0
    return refreshes + bool(pending)


def traffic(inputs: Sequence[InputShape], ranks: int, *, layers: int) -> Traffic:
    """Bytes that one of so many ranks sends for these inputs of so many layers, shared out evenly among owners."""
    passed_on = (ranks - 1) / ranks
    sketches = sum(4 * shape.columns * (shape.width + 1) + 8 * (shape.width + 1) for shape in inputs)
    sums, bases = (sum(getattr(shape, name) for shape in inputs) for name in ("sums_nbytes", "basis_nbytes"))
    triangles = sum(4 * shape.width * (shape.width + 1) // 2 for shape in inputs if shape.kind == "gram")
    totals = sum(8 * (shape.width + 1) for shape in inputs)
    last = sum(4 * shape.width * shape.columns + 8 * shape.columns for shape in inputs)
    return Traffic(
        start=2 * passed_on * sketches,
        batch=2 * passed_on * 8 * (4 + layers),
        refresh=passed_on * (sums + bases),
        end=passed_on * (triangles + last + 2 * totals),
    )


@dataclass(frozen=True)
class Decoder:
    """A decoder-only language model with LoRA on all linear layers of its blocks.

    Attributes:
        parameters: All of them.
        blocks, hidden, intermediate: Its blocks, and their widths.
    """

    parameters: float
    blocks: int
    hidden: int
    intermediate: int

    def inputs(self, rank: int, *, rho: float = 2.0) -> list[InputShape]:
        """Of each block: of query, key and value together, of the output projection, of gate and up, and of down."""
        columns = default_columns(round(rank * rho))
        widths = [self.hidden, self.hidden, self.hidden, self.intermediate]
        return [InputShape(width, min(width, columns)) for _ in range(self.blocks) for width in widths]


@dataclass(frozen=True)
class Devices:
    """A cluster.

    Attributes:
        count: Devices, one rank each.
        flops: FLOP/s that products reach on one.
        algebra_flops: FLOP/s that the small algebra reaches.
        bandwidth: Bytes/s that one sends to the others.
        latency: Seconds that one step of a ring takes at least.
        message_latency: Seconds of a control message, which goes over the network's own protocol, for each doubling of
            the devices.
    """

    count: int
    flops: float
    algebra_flops: float
    bandwidth: float
    latency: float = 7e-6
    message_latency: float = 1e-4


@dataclass(frozen=True)
class Prediction:
    """One rank's share, per batch where nothing else is said.

    Attributes:
        forward_seconds, statistics_seconds: Of the forward, and of folding rows in.
        algebra_seconds: Of refreshes, this rank's inputs only.
        network_seconds: Of refreshes and the batch's message.
        network_bytes: Sent for them.
        memory_bytes: Of the weights, sharded over all devices, of the statistics, and of the buffers to reduce them.
    """

    forward_seconds: float
    statistics_seconds: float
    algebra_seconds: float
    network_seconds: float
    network_bytes: float
    memory_bytes: float

    @property
    def overhead(self) -> float:
        """Seconds beside the forward, over it."""
        return (self.statistics_seconds + self.algebra_seconds + self.network_seconds) / self.forward_seconds

    @property
    def overlap_gain(self) -> float:
        """The most that running reductions beside the forward could save, of a batch's time."""
        return self.network_seconds / (self.forward_seconds * (1 + self.overhead))


def predict(model: Decoder, devices: Devices, *, tokens: int, rank: int = 16) -> Prediction:
    """A pass in its steady state, every device with ``tokens`` rows a batch, weights in two bytes."""
    inputs = model.inputs(rank)
    sent = traffic(inputs, devices.count, layers=7 * model.blocks)
    network_bytes = sent.batch + sent.refresh / PERIOD
    buckets = 1 + sum(4 * shape.width * shape.columns for shape in inputs) // BUCKET_BYTES
    steps = 3 * buckets * (devices.count - 1)  # of a refresh: per bucket products and totals go, bases come
    waiting = steps * devices.latency / PERIOD + devices.message_latency * math.log2(devices.count)
    algebra = sum(14 * shape.width * shape.columns**2 + 60 * shape.columns**3 for shape in inputs)
    return Prediction(
        forward_seconds=2 * model.parameters * tokens / devices.flops,
        statistics_seconds=sum(4 * shape.width * shape.columns for shape in inputs) * tokens / devices.flops,
        algebra_seconds=algebra / devices.count / PERIOD / devices.algebra_flops,
        network_seconds=network_bytes / devices.bandwidth + waiting,
        network_bytes=network_bytes,
        memory_bytes=2 * model.parameters / devices.count + sum(shape.nbytes for shape in inputs) + 2 * BUCKET_BYTES,
    )
