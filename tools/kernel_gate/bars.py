"""What a variant must be to pass, and what fails it."""

from dataclasses import dataclass

import triton

from eva_kernels._cards import CARDS
from eva_kernels.gram.triton import ALIGNED_TILES, GramTile
from eva_kernels.subspace.triton import SubspaceTile

from .machine_code import TENSOR_INSTRUCTION, Code
from .model import CHIPS, SCHEDULERS, SHARED_BYTES, Chip, Pass, Update, gram_pass, gram_update
from .variants import Variant

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
JUDGED_SINCE = (3, 8)  # of an older one it is asked only what a launch would fail on, and what would race
# The masked loop of sm_80 issues 6.5 instructions per product, 2.8 without a mask: selects for the predicates of
# its copies. At 8 warps that is 0.81 of the issue slots, so the tensor cores still set the modelled pace.
GRAM_FRACTION = {"sm_80": 0.95, "sm_90": 0.80}
UPDATE_RATIO = 1.25
# Instructions outside the loop, that a program runs once: there the assembler takes fewer registers than it needs. 16
# move 64 bytes a thread, where the loop moves kilobytes.
SPILLS_OUTSIDE = {"sm_110": 16, "sm_120": 16, "sm_121": 16}
ROWS = (2048, 16384)
# Hidden sizes and MLP widths of current models. Reported without a bar: widths with fewer tiles than the chip has
# multiprocessors, all of which are split and added up again; 576, whose last tiles are half empty, which costs 1.48
# times the arithmetic whatever the launch does; and few rows of 3072, where the last wave of the widest tile is 24 or 8
# tiles, whose shares one program each adds up. A launch of its own would do that sooner, if it cost nothing.
WIDTHS = (
    384,
    576,
    768,
    896,
    1024,
    1152,
    1536,
    2048,
    2560,
    3072,
    3584,
    4096,
    5120,
    6144,
    8192,
    11008,
    14336,
    18944,
    28672,
)
UNBARRED = {(2048, 576), (16384, 576), (2048, 3072)}


def fraction(variant: Variant, code: Code) -> float | None:
    """Modelled fraction of the tensor peak (gram), of the memory's (project) or L2's bandwidth (lift)."""
    chip = CHIPS.get(variant.architecture)
    if chip is None or not code.loop or not variant.barred:
        return None
    if isinstance(variant.tile, GramTile):
        return gram_pass(code, variant.tile, chip).fraction
    return product_fraction(variant, code, chip) if isinstance(variant.tile, SubspaceTile) else None


def product_fraction(variant: Variant, code: Code, chip: Chip) -> float:
    """Clocks the limiting memory needs for one pass of a thin product, over those of the slowest resource."""
    clocks = product_clocks(variant, code, chip)
    return clocks["memory" if variant.name == "project" else "L2"] / max(clocks.values())


def product_clocks(variant: Variant, code: Code, chip: Chip) -> dict[str, float]:
    """Clocks of a multiprocessor that one pass of a thin product takes from each resource."""
    flags = variant.flags
    rows, columns, inner = int(flags["ROWS"]), int(flags["COLUMNS"]), "COLUMNS" if variant.name == "project" else "ROWS"
    x_bytes = 2 * rows * columns
    clocks = {
        "tensor cores": rows * columns * int(flags["PADDED"]) / chip.multiply_adds,
        "shared memory": code.shared_bytes(variant.warps) / SHARED_BYTES,
        "instructions": len(code.loop) * variant.warps / SCHEDULERS,
        "L2": (x_bytes + 2 * int(flags[inner]) * int(flags["USED"])) / (chip.l2_bytes / chip.processors),
    }
    if variant.name == "project":  # the other finds its rows in the L2 cache
        clocks["memory"] = x_bytes / (chip.memory / chip.clock / chip.processors)
    return clocks


def failures(variant: Variant, code: Code) -> list[str]:
    """Why this variant fails, one line each; empty if it passes."""
    found = []
    if code.shared > CARDS[variant.architecture].shared:
        found.append(f"{code.shared} bytes of shared memory, of {CARDS[variant.architecture].shared}")
    found += code.short_buffers
    if TRITON < JUDGED_SINCE:
        return found
    in_loop = sum(i.kind in ("STL", "LDL") for i in code.loop)
    if in_loop or code.spills > SPILLS_OUTSIDE.get(variant.architecture, 0):
        found.append(f"{code.spills} spills")
    if any("TF32" in name for name in code.tensor) and not code.rounded:
        found.append("operands cut to TF32, not rounded")
    if not variant.barred:
        return found
    own = TENSOR_INSTRUCTION[variant.tiles]
    if not code.tensor or any(not name.startswith(own) for name in code.tensor):
        found.append(f"products by {', '.join(sorted(code.tensor)) or 'no tensor instruction'}, expected {own}")
    if variant.tiles == "gfx942":
        return found
    if not code.asynchronous:
        loads = ", ".join(f"{count} {kind} of {width} bytes" for (kind, width), count in sorted(code.loads.items()))
        found.append(f"operand loads in the loop not all asynchronous and 16 bytes wide: {loads or 'none found'}")
    bar = GRAM_FRACTION.get(variant.architecture)
    value = fraction(variant, code)
    if variant.name == "gram" and bar and value is not None and value < bar and _is_largest_tile(variant):
        found.append(f"modelled fraction of the tensor peak {value:.2f}, expected {bar:.2f}")
    return found


def _is_largest_tile(variant: Variant) -> bool:
    return variant.tile == ALIGNED_TILES[variant.tiles][-1][1]


@dataclass(frozen=True)
class UpdateLine:
    """One modelled update, for the table."""

    chip: Chip
    n: int
    d: int
    update: Update

    @property
    def ratio(self) -> float:
        return self.update.seconds / self.update.ideal

    def describe(self) -> str:
        return f"{self.chip.name}: {self.n} rows of {self.d}: {self.ratio:.2f} times the ideal, expected {UPDATE_RATIO}"

    @property
    def failed(self) -> bool:
        fills = self.update.plan.tiles >= self.chip.processors
        return fills and self.ratio > UPDATE_RATIO and (self.n, self.d) not in UNBARRED


def updates(architecture: str, passes: dict[GramTile, Pass]) -> list[UpdateLine]:
    """Modelled updates at every width, with the tile the launcher takes there."""
    chip, lines = CHIPS[architecture], []
    for n in ROWS:
        for d in WIDTHS:
            tile = max((entry for entry in ALIGNED_TILES[architecture] if entry[0] <= d), key=lambda entry: entry[0])[1]
            lines.append(UpdateLine(chip, n, d, gram_update(n, d, tile, passes[tile], chip)))
    return lines
