"""What the Triton ops share: how rows are addressed, and their column sums and sum of squares."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import os
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
VECTOR = 8  # elements: 16 bytes of a 16-bit dtype, the widest asynchronous copy
# Tensors that come from outside and may start anywhere: one compiled variant serves them all. (Rows are the
# exception: where they start decides which kernel reads them.)
FOREIGN = [
    "shift_ptr", "mask_ptr", "g_ptr", "basis_ptr", "column_sum_ptr", "square_sum_ptr", "target_ptr",
]  # fmt: skip
TOTALS_ROWS, TOTALS_COLUMNS, TOTALS_STEP = 256, 128, 16  # of one program's float32 sums, and rows a pass
WARPS, STAGES = 4, 3  # of a launch that names none
# Where lanes of a warp hold the same sum and store it to one place, products must not be fused with additions: lanes
# that add in another order would fuse others of them, and their sums would be one bit apart.
UNFUSED = ("_prepare_kernel", "_jacobi_kernel")


@dataclass(frozen=True)
class Rows:
    """The rows of one launch: one stream for each of its layers, all laid out alike.

    Attributes:
        x: (n, d) each; one dtype, one pair of strides.
        shifts: (d,) float32 each, contiguous.
        masks: (n,) bool each, contiguous, or None.
        table: (3, layers) int64 addresses of x, shift and mask; None for a single layer.
    """

    x: list[Tensor]
    shifts: list[Tensor]
    masks: list[Tensor] | None
    table: Tensor | None

    @property
    def aligned(self) -> bool:
        """Whether every row can be read by 16-byte copies."""
        first = self.x[0]
        return (
            first.stride(1) == 1
            and first.shape[1] % VECTOR == 0
            and first.stride(0) % VECTOR == 0
            and all(x.data_ptr() % 16 == 0 for x in self.x)
        )

    @property
    def pointers(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x, shift, mask and table as every kernel takes them; without a mask its place is never read."""
        return self.x[0], self.shifts[0], (self.masks or self.x)[0], self.table


def make_rows(
    x: list[Tensor],  # (n, d) each
    shifts: list[Tensor],  # (d,) each
    masks: list[Tensor] | None,  # (n,) each
) -> Rows:
    """Bundle the rows of one launch. Shifts and masks are made contiguous; rows are taken as they lie."""
    shifts = [s.contiguous() for s in shifts]
    masks = None if masks is None else [m.contiguous() for m in masks]
    table = None if len(x) == 1 else address_table(x, shifts, masks or x)
    return Rows(x, shifts, masks, table)


def address_table(*kinds: list[Tensor]) -> Tensor:  # (kinds, layers) int64
    """Addresses for a grouped launch, copied to the tensors' device without waiting for it."""
    device = kinds[0][0].device
    table = torch.tensor([[t.data_ptr() for t in kind] for kind in kinds], dtype=torch.int64)
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


def architecture(device: torch.device) -> str:
    """The name tile tables are keyed by. What is tuned for none of them gets the tiles of sm_80, the smallest."""
    if device.type == "cpu" or torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def multiprocessors(device: torch.device) -> int:
    """How many tiles run at once; the interpreter is given a few, so that every path is taken."""
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def l2_bytes(device: torch.device) -> int:
    """Size of the L2 cache; the interpreter is given a small one, so that it walks several chunks."""
    if device.type == "cpu":
        return 16_384
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def dot_precision(dtype: torch.dtype) -> str:
    """How products of float32 rows are taken: as PyTorch's own switch for CUDA matrix products says."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def launch_options(kernel: Any, warps: int = WARPS, stages: int = STAGES) -> dict[str, Any]:
    """What a launch of ``kernel`` gives the compiler, beside its arguments. Every launch states all of it, since
    defaults differ between versions of Triton and between makers of GPUs."""
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": kernel.fn.__name__ not in UNFUSED}


@triton.jit
def row_pointers(x_ptr, shift_ptr, mask_ptr, table_ptr, layer, layers, GROUPED: tl.constexpr):
    """The pointers to one layer's rows: the arguments themselves, or looked up in the table of a group."""
    if GROUPED:
        x_ptr = tl.load(table_ptr + layer).to(x_ptr.dtype)
        shift_ptr = tl.load(table_ptr + layers + layer).to(shift_ptr.dtype)
        mask_ptr = tl.load(table_ptr + 2 * layers + layer).to(mask_ptr.dtype)
    return x_ptr, shift_ptr, mask_ptr


@triton.jit(do_not_specialize=["n", "d", "stride_xm", "stride_xd"], do_not_specialize_on_alignment=FOREIGN)
def _totals_kernel(
    x_ptr,  # (n, d)
    shift_ptr,  # (d,) float32
    mask_ptr,  # (n,) bool
    table_ptr,  # (3, layers) int64
    sums_ptr,  # (layers, chunks, d) float32
    squares_ptr,  # (layers, chunks, column blocks) float32
    counts_ptr,  # (layers, chunks) float32
    n,
    d,
    stride_xm: tl.int64,
    stride_xd: tl.int64,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    GROUPED: tl.constexpr,
):
    """Σ z, Σ z² and the number of unmasked rows in one chunk of rows and one block of columns, z = x − s."""
    chunk, block, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    x_ptr, shift_ptr, mask_ptr = row_pointers(x_ptr, shift_ptr, mask_ptr, table_ptr, layer, tl.num_programs(2), GROUPED)
    if ALIGNED:
        d, stride_xm, stride_xd = d // 8 * 8, stride_xm // 8 * 8, 1
        x_ptr = tl.multiple_of(x_ptr, 16)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < d
    shift = tl.load(shift_ptr + columns, mask=inside, other=0.0)
    sums = tl.zeros((STEP, COLUMNS), tl.float32)
    squares = tl.zeros((STEP, COLUMNS), tl.float32)
    count = tl.zeros((STEP,), tl.float32)
    for start in range(chunk * ROWS, tl.minimum((chunk + 1) * ROWS, n), STEP):
        rows = start + tl.arange(0, STEP)
        keep = rows < n
        if MASKED:
            keep = keep & (tl.load(mask_ptr + rows, mask=keep, other=0) != 0)
        loaded = keep[:, None] & inside[None, :]
        address = rows.to(tl.int64)[:, None] * stride_xm + columns.to(tl.int64)[None, :] * stride_xd
        x = tl.load(x_ptr + address, mask=loaded, other=0.0).to(tl.float32)
        z = tl.where(loaded, x - shift[None, :], 0.0)
        sums += z
        squares += z * z
        count += keep.to(tl.float32)
    index = layer.to(tl.int64) * tl.num_programs(0) + chunk
    tl.store(sums_ptr + index * d + columns, tl.sum(sums, 0), mask=inside)
    tl.store(squares_ptr + index * tl.num_programs(1) + block, tl.sum(squares))
    if block == 0:
        tl.store(counts_ptr + index, tl.sum(count))


@triton.jit(do_not_specialize=["d", "chunks", "sign"], do_not_specialize_on_alignment=FOREIGN)
def _add_totals_kernel(
    sums_ptr,  # (layers, chunks, d) float32
    squares_ptr,  # (layers, chunks, column blocks) float32
    counts_ptr,  # (layers, chunks) float32
    column_sum_ptr,  # (d,) float64
    square_sum_ptr,  # () float64
    totals_table_ptr,  # (2, layers) int64: addresses of the two above
    batch_sum_ptr,  # (layers, d) float32
    batch_count_ptr,  # (layers,) float32
    d,
    chunks,
    sign: tl.float32,
    COLUMNS: tl.constexpr,
    GROUPED: tl.constexpr,
):
    """Add the chunks in order, in float64: to the totals with their sign, and to the batch's own sums."""
    block, layer = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if GROUPED:
        column_sum_ptr = tl.load(totals_table_ptr + layer).to(column_sum_ptr.dtype)
        square_sum_ptr = tl.load(totals_table_ptr + tl.num_programs(1) + layer).to(square_sum_ptr.dtype)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < d
    total = tl.zeros((COLUMNS,), tl.float64)
    for chunk in range(chunks):
        part = tl.load(sums_ptr + (layer * chunks + chunk) * d + columns, mask=inside, other=0.0)
        total += part.to(tl.float64)
    old = tl.load(column_sum_ptr + columns, mask=inside)
    tl.store(column_sum_ptr + columns, old + sign * total, mask=inside)
    tl.store(batch_sum_ptr + layer * d + columns, total.to(tl.float32), mask=inside)
    if block == 0:
        squares = tl.zeros((COLUMNS,), tl.float64)
        counts = tl.zeros((COLUMNS,), tl.float64)
        parts = chunks * tl.num_programs(0)
        for start in range(0, parts, COLUMNS):
            i = start + tl.arange(0, COLUMNS)
            squares += tl.load(squares_ptr + layer * parts + i, mask=i < parts, other=0.0).to(tl.float64)
            counts += tl.load(counts_ptr + layer * chunks + i, mask=i < chunks, other=0.0).to(tl.float64)
        tl.store(square_sum_ptr, tl.load(square_sum_ptr) + sign * tl.sum(squares))
        tl.store(batch_count_ptr + layer, tl.sum(counts).to(tl.float32))


def add_totals_(
    column_sums: list[Tensor],  # (d,) float64 each
    square_sums: list[Tensor],  # () float64 each
    rows: Rows,
    sign: float,
) -> tuple[Tensor, Tensor]:  # (layers, d) float32, (layers,) float32
    """Add Σ z and Σ ‖z‖² to the totals of every layer; return this batch's own Σ z and number of rows."""
    x, layers = rows.x[0], len(rows.x)
    n, d = x.shape
    chunks, blocks = triton.cdiv(n, TOTALS_ROWS), triton.cdiv(d, TOTALS_COLUMNS)
    sums = x.new_empty(layers, chunks, d, dtype=torch.float32)
    squares = sums.new_empty(layers, chunks, blocks)
    counts = sums.new_empty(layers, chunks)
    _totals_kernel[(chunks, blocks, layers)](
        *rows.pointers, sums, squares, counts, n, d, *x.stride(),
        ROWS=TOTALS_ROWS, COLUMNS=TOTALS_COLUMNS, STEP=TOTALS_STEP,
        ALIGNED=rows.aligned, MASKED=rows.masks is not None, GROUPED=layers > 1, **launch_options(_totals_kernel),
    )  # fmt: skip
    return finish_totals_(column_sums, square_sums, sums, squares, counts, TOTALS_COLUMNS, sign)


def finish_totals_(
    column_sums: list[Tensor],  # (d,) float64 each
    square_sums: list[Tensor],  # () float64 each
    sums: Tensor,  # (layers, chunks, d) float32
    squares: Tensor,  # (layers, chunks, column blocks) float32
    counts: Tensor,  # (layers, chunks) float32
    columns: int,  # in a block
    sign: float,
) -> tuple[Tensor, Tensor]:  # (layers, d) float32, (layers,) float32
    """Add the totals of chunks of rows to those of every layer; return the batch's own Σ z and number of rows."""
    layers, chunks, d = sums.shape
    batch_sums, batch_counts = sums.new_empty(layers, d), sums.new_empty(layers)
    table = address_table(column_sums, square_sums) if layers > 1 else None
    _add_totals_kernel[(squares.shape[2], layers)](
        sums, squares, counts, column_sums[0], square_sums[0], table, batch_sums, batch_counts,
        d, chunks, sign, COLUMNS=columns, GROUPED=layers > 1, **launch_options(_add_totals_kernel),
    )  # fmt: skip
    return batch_sums, batch_counts
