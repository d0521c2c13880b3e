"""What a loop and a whole update would take on a chip: arithmetic on published figures, not a measurement.

Every resource is taken at its published peak and the slowest one sets the pace, so a modelled time is a lower
bound; where others have published both, measured speeds were 0.6 of such a model. Launch latencies, and the
latency of the first loads of a tile, are not in it.
"""

from dataclasses import dataclass

from eva_kernels.gram.triton import GramPlan, GramTile, plan_gram

from .machine_code import Code


@dataclass(frozen=True)
class Chip:
    """Published figures of one GPU; rates are bytes or multiply-adds a clock.

    Attributes:
        multiply_adds: of dense 16-bit tensor products, a multiprocessor.
        l2_bytes: of all multiprocessors together (for sm_100 an assumption: twice one die of sm_90).
        memory: bytes a second.
        registers, shared, warps: a multiprocessor's.
    """

    name: str
    processors: int
    clock: float
    multiply_adds: int
    l2_bytes: int
    memory: float
    l2_size: int
    shared: int
    registers: int = 65_536
    warps: int = 64


PORT_BYTES = 64  # a clock, from the L2 cache to one multiprocessor, on every chip below
SHARED_BYTES = 128  # a clock and multiprocessor, on every chip below
SCHEDULERS = 4

CHIPS = {
    "sm_80": Chip("A100 SXM 80 GB", 108, 1.41e9, 1024, 5120, 2.04e12, 40 << 20, 164 << 10),
    "sm_90": Chip("H100 SXM", 132, 1.83e9, 2048, 5120, 3.35e12, 50 << 20, 228 << 10),
    "sm_100": Chip("B200", 148, 1.855e9, 4096, 10240, 8.0e12, 126 << 20, 228 << 10),
}


def occupancy(code: Code, warps: int, chip: Chip) -> float:
    """Resident warps over the most a multiprocessor holds."""
    by_registers = chip.registers // (-(-code.registers // 8) * 8 * 32 * warps)
    by_shared = chip.shared // (code.shared + 1024)
    return min(by_registers, by_shared, chip.warps // warps) * warps / chip.warps


@dataclass(frozen=True)
class Pass:
    """Clocks one pass of the innermost loop takes from each resource of a multiprocessor."""

    tensor: float
    shared: float
    issue: float
    l2: float

    @property
    def clocks(self) -> float:
        return max(self.tensor, self.shared, self.issue, self.l2)

    @property
    def fraction(self) -> float:
        """Of the tensor peak."""
        return self.tensor / self.clocks


def gram_pass(code: Code, tile: GramTile, chip: Chip) -> Pass:
    operands = (tile.block_m + tile.block_n) * tile.block_k * 2
    return Pass(
        tensor=tile.block_m * tile.block_n * tile.block_k / chip.multiply_adds,
        shared=code.shared_bytes(tile.warps) / SHARED_BYTES,
        issue=len(code.loop) * tile.warps / SCHEDULERS,
        l2=operands / (chip.l2_bytes / chip.processors),
    )


@dataclass(frozen=True)
class Update:
    """A whole Gram update, in seconds.

    ``ideal`` is the same loop with nothing wasted: no tile area above the diagonal, no idle multiprocessor, no
    reduction, X and the triangle moved once. ``roofline`` has the tensor peak in place of the loop's own pace
    and everything overlapped.
    """

    plan: GramPlan
    seconds: float
    ideal: float
    roofline: float


def gram_update(n: int, d: int, tile: GramTile, one: Pass, chip: Chip) -> Update:
    plan = plan_gram(n, d, tile, chip.processors)
    area = tile.block_m * tile.block_n
    own_memory, own_l2 = chip.memory / chip.processors, chip.l2_bytes * chip.clock / chip.processors

    def loop(rows: int) -> float:
        return -(-rows // tile.block_k) * one.clocks / chip.clock

    waves = -(-plan.whole // chip.processors)
    seconds = waves * (loop(n) + 8 * area / own_memory)
    if plan.split:
        share_waves = -(-plan.split * plan.splits // chip.processors)
        seconds += share_waves * (loop(plan.split_rows) + 4 * area / own_l2)
        port = PORT_BYTES * chip.clock  # of a tile's last program, beside those of the other split tiles
        seconds += 4 * area * plan.splits / min(port, chip.l2_bytes * chip.clock / plan.split)
        seconds += 8 * area / min(port, chip.memory / plan.split)
    rows_read = 2 * n * d / chip.memory  # by the totals, which leave what fits in the L2 cache
    triangle = d * (d + 1) / 2
    peak = n * triangle / (chip.processors * chip.multiply_adds * chip.clock)
    flush = 8 * triangle / chip.memory
    return Update(plan, seconds + rows_read, rows_read + peak / one.fraction + flush, max(peak, rows_read + flush))
