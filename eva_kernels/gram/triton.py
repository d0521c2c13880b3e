"""The Gram update in Triton: one triangle of tiles, float32 accumulation, one flush of each tile.

The derivation, the tile order and the error of either way to subtract the shift are in this folder's README.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._rows import row_views
from .._triton import (
    FOREIGN,
    INTERPRETED,
    TOTALS_COLUMNS,
    TOTALS_ROWS,
    TOTALS_STEP,
    Launch,
    _totals_kernel,
    architecture,
    arrives_last,
    current_stream,
    dot_precision,
    has_tf32,
    is_aligned,
    kind_of,
    launch_options,
    multiprocessors,
    one_view,
    operand_dtype,
    piece_of,
    rounded_to_tf32,
)
from .._workspace import Workspace, workspace_of

FLUSH_COLUMNS = 32  # columns of a tile flushed at a time: more of them spill
MIRROR_BLOCK = 64
MIN_SPLIT_ROWS = 256  # a shorter share of the rows costs more in its flush than it gains in its loop
SPLIT_COST = 128  # rows' worth of loop that writing one share, and reading it again, takes
MAX_SPLITS = 8  # of tiles that fill more than half a wave


@dataclass(frozen=True)
class GramTile:
    """What is chosen for one launch; ``block_n`` is a multiple of ``block_m``.

    Attributes:
        block_m, block_n: rows and columns of G in one tile.
        block_k: rows of X in one pass of the loop.
        warps, stages: of the launch.
        band: tiles of ``block_n`` rows whose columns are visited together, for the L2 cache.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    band: int = 8


INTERPRETER_TILE = GramTile(16, 32, 16, 4, 1, band=2)
GENERIC_TILE = GramTile(64, 64, 16, 8, 3)
SMALL_TILE = GramTile(128, 128, 64, 8, 3)
# Keyed by architecture; each entry is (smallest d, tile), the largest d that fits wins.
ALIGNED_TILES: dict[str, tuple[tuple[int, GramTile], ...]] = {
    "sm_80": ((0, SMALL_TILE),),
    "sm_90": ((0, SMALL_TILE), (2048, GramTile(128, 256, 64, 8, 3, band=4))),
    "sm_100": ((0, SMALL_TILE), (2048, GramTile(128, 256, 64, 8, 3, band=4))),
    "sm_120": ((0, SMALL_TILE),),
    "gfx942": ((0, GramTile(128, 128, 32, 8, 2)),),
}


def choose_tile(arch: str, dtype: torch.dtype, aligned: bool, d: int) -> GramTile:
    """The tile of a launch: the architecture's own for aligned 16-bit rows, one small tile for all others."""
    if INTERPRETED:
        return INTERPRETER_TILE
    if dtype == torch.float32 or not aligned:
        return GENERIC_TILE
    return max((entry for entry in ALIGNED_TILES[arch] if entry[0] <= d), key=lambda entry: entry[0])[1]


@dataclass(frozen=True)
class GramPlan:
    """How the tiles of a launch fill the chip.

    Whole waves of tiles walk all rows and are flushed by the tile itself. The tiles of the last, partial wave
    are split over the rows, so that they too occupy every multiprocessor, and are reduced in fixed order.
    Everything is whole where splitting would not pay.
    """

    tile: GramTile
    whole: int  # tiles that walk all rows
    split: int  # tiles that are split
    splits: int  # shares of the rows for each of those
    split_rows: int

    @property
    def tiles(self) -> int:
        return self.whole + self.split

    @property
    def programs(self) -> int:
        return self.whole + self.split * self.splits


def plan_gram(n: int, d: int, tile: GramTile, processors: int) -> GramPlan:
    """Lay out the triangle of a Gram matrix on a number of multiprocessors."""
    squares = triton.cdiv(d, tile.block_n)
    tiles = squares * (squares + 1) // 2 * (tile.block_n // tile.block_m)
    rest = tiles % processors

    def cost(splits: int) -> int:
        shares = triton.cdiv(rest * splits, processors)
        return shares * n if splits == 1 else shares * triton.cdiv(n, splits) + splits * SPLIT_COST

    choices = range(1, max(processors // rest, MAX_SPLITS) + 1) if rest else range(1, 2)
    splits = min((s for s in choices if s == 1 or n >= s * MIN_SPLIT_ROWS), key=cost)
    if splits == 1:
        return GramPlan(tile, tiles, 0, 1, n)
    split_rows = triton.cdiv(triton.cdiv(n, splits), tile.block_k) * tile.block_k
    return GramPlan(tile, tiles - rest, rest, triton.cdiv(n, split_rows), split_rows)


@triton.jit
def _triangle_row(index):
    """The row of an entry of a lower triangle stored row by row: the largest r with r(r+1)/2 ≤ index."""
    row = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > index, row - 1, row)
    return tl.where((row + 1) * (row + 2) // 2 <= index, row + 1, row)


@triton.jit
def _tile_origin(tile, d, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BAND: tl.constexpr):
    """Row and column of a tile's first entry. A band of BAND square rows is walked column by column."""
    PIECES: tl.constexpr = BLOCK_N // BLOCK_M
    square = tile // PIECES
    first = _triangle_row(square) // BAND * BAND
    height = tl.minimum(BAND, tl.cdiv(d, BLOCK_N) - first)
    inner = square - first * (first + 1) // 2
    full = first * height  # squares left of the band's own triangle
    corner = tl.maximum(inner - full, 0)
    corner_row = _triangle_row(corner)
    row = tl.where(inner < full, inner % height, corner_row)
    column = tl.where(inner < full, inner // height, first + corner - corner_row * (corner_row + 1) // 2)
    return (first + row) * BLOCK_N + tile % PIECES * BLOCK_M, column * BLOCK_N


@triton.jit
def _fold(acc, shift_ptr, sum_ptr, count, rows, columns, d):
    """Σ z zᵀ from Σ x xᵀ: minus s cᵀ + c sᵀ + n s sᵀ, with c = Σ z and z = x − s."""
    shift_m = tl.load(shift_ptr + rows, mask=rows < d, other=0.0)
    shift_n = tl.load(shift_ptr + columns, mask=columns < d, other=0.0)
    sum_m = tl.load(sum_ptr + rows, mask=rows < d, other=0.0)
    sum_n = tl.load(sum_ptr + columns, mask=columns < d, other=0.0)
    return acc - (sum_m + count * shift_m)[:, None] * shift_n[None, :] - shift_m[:, None] * sum_n[None, :]


@triton.jit
def _flush(
    acc, g_ptr, shift_ptr, sum_ptr, count, partial_ptr, whole, row, column, d, stride_gm, sign,
    M: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """G += sign · tile if it is whole, else partial = tile; COLUMNS at a time, since all at once would spill.

    An atomic add rather than a load and a store, again for the registers. Every entry of G is added to once
    in a launch, so the order of the adds cannot matter.
    """
    for piece in tl.static_range(N // COLUMNS):
        part = piece_of(acc, piece, M, N, COLUMNS)
        inner = piece * COLUMNS + tl.arange(0, COLUMNS)
        if whole:
            rows, columns = row + tl.arange(0, M), column + inner
            if FOLD:
                part = _fold(part, shift_ptr, sum_ptr, count, rows, columns, d)
            address = rows.to(tl.int64)[:, None] * stride_gm + columns[None, :]
            inside = (rows[:, None] < d) & (columns[None, :] < d)
            tl.atomic_add(g_ptr + address, sign * part, mask=inside, sem="relaxed")
        else:
            tl.store(partial_ptr + tl.arange(0, M)[:, None] * N + inner[None, :], part)


@triton.jit
def _reduce(
    partial_ptr, step, splits, g_ptr, shift_ptr, sum_ptr, count, row, column, d, stride_gm, sign,
    M: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """G += sign · Σ of a tile's shares, ``step`` apart and added in order; COLUMNS at a time."""
    rows = row + tl.arange(0, M)
    for first in range(0, N, COLUMNS):
        inner = first + tl.arange(0, COLUMNS)
        shares = partial_ptr + tl.arange(0, M)[:, None] * N + inner[None, :]
        acc = tl.zeros((M, COLUMNS), tl.float32)
        for _ in range(splits):
            acc += tl.load(shares)
            shares += step
        columns = column + inner
        if FOLD:
            acc = _fold(acc, shift_ptr, sum_ptr, count, rows, columns, d)
        address = g_ptr + rows.to(tl.int64)[:, None] * stride_gm + columns[None, :]
        inside = (rows[:, None] < d) & (columns[None, :] < d)
        tl.store(address, tl.load(address, mask=inside) + sign * acc, mask=inside)


@triton.jit(
    do_not_specialize=[
        "n", "d", "stride_xm", "stride_xd", "stride_gm", "whole", "split", "splits", "split_rows", "sign",
    ],
    do_not_specialize_on_alignment=FOREIGN,
)  # fmt: skip
def _gram_kernel(
    x_ptr,  # (n, d)
    shift_ptr,  # (d,) float32
    mask_ptr,  # (n,) bool
    sum_ptr,  # (d,) float32: Σ z of this batch
    count_ptr,  # () float32: its unmasked rows
    partial_ptr,  # (splits, split, BLOCK_M, BLOCK_N) float32
    counter_ptr,  # (split,) int32
    g_ptr,  # (d, d) float32, lower triangle
    n,
    d,
    stride_xm: tl.int64,
    stride_xd: tl.int64,
    stride_gm: tl.int64,
    whole,
    split,
    splits,
    split_rows,
    sign: tl.float32,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
    FOLD: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """G += sign · Σ z zᵀ over one tile of the triangle and all unmasked rows or one share of them, z = x − s.

    FOLD multiplies raw rows and subtracts the shift from the tile afterwards; otherwise it is subtracted from
    the rows as they are loaded. A share is left in the workspace, unfolded; the last program of a tile adds up its
    shares, in order. UPCAST is for the interpreter, whose product of bfloat16 is wrong.
    """
    program = tl.program_id(0)
    index, start, stop = program, 0, n
    if program >= whole:
        index = whole + (program - whole) % split
        start = (program - whole) // split * split_rows
        stop = tl.minimum(start + split_rows, n)
    row, column = _tile_origin(index, d, BLOCK_M, BLOCK_N, BAND)
    m, c, k = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    m, c = tl.where(m < d, m, 0), tl.where(c < d, c, 0)  # what lies outside is computed and never flushed
    if ALIGNED:
        x_ptr = tl.multiple_of(x_ptr, 16)
        stride_xm, stride_xd = stride_xm // 8 * 8, 1
        m = tl.max_contiguous(tl.multiple_of(m, (8,)), (8,))
        c = tl.max_contiguous(tl.multiple_of(c, (8,)), (8,))
    if not FOLD:
        shift_m, shift_n = tl.load(shift_ptr + m), tl.load(shift_ptr + c)
    OPERAND: tl.constexpr = tl.float32 if UPCAST else x_ptr.dtype.element_ty
    NARROW: tl.constexpr = x_ptr.dtype.element_ty == tl.float16
    k_offset = (start + k).to(tl.int64) * stride_xm
    a_ptrs = x_ptr + k_offset[None, :] + m.to(tl.int64)[:, None] * stride_xd
    b_ptrs = x_ptr + k_offset[:, None] + c.to(tl.int64)[None, :] * stride_xd
    step = tl.full((), BLOCK_K, tl.int64) * stride_xm
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(start, stop, BLOCK_K):
        keep = k < stop - k0
        if MASKED:
            keep = keep & (tl.load(mask_ptr + k0 + k, mask=keep, other=0) != 0)
        a = tl.load(a_ptrs, mask=keep[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=keep[:, None], other=0.0)
        if not FOLD:
            a = tl.where(keep[None, :], a.to(tl.float32) - shift_m[:, None], 0.0)
            b = tl.where(keep[:, None], b.to(tl.float32) - shift_n[None, :], 0.0)
            if NARROW:  # x − s may be twice what it holds
                a, b = a * 0.5, b * 0.5
            if PRECISION == "tf32":
                a, b = rounded_to_tf32(a), rounded_to_tf32(b)
        acc = tl.dot(a.to(OPERAND), b.to(OPERAND), acc, input_precision=PRECISION)
        a_ptrs += step
        b_ptrs += step
    if NARROW and not FOLD:
        acc *= 4.0
    count = tl.load(count_ptr)
    own_ptr = partial_ptr + tl.maximum(program - whole, 0).to(tl.int64) * BLOCK_M * BLOCK_N
    _flush(
        acc, g_ptr, shift_ptr, sum_ptr, count, own_ptr, program < whole, row, column,
        d, stride_gm, sign, BLOCK_M, BLOCK_N, COLUMNS, FOLD,
    )  # fmt: skip
    if program >= whole:
        tile = (program - whole) % split
        if arrives_last(counter_ptr + tile, splits):
            partial_ptr += tile.to(tl.int64) * BLOCK_M * BLOCK_N
            step = tl.full((), BLOCK_M * BLOCK_N, tl.int64) * split
            _reduce(
                partial_ptr, step, splits, g_ptr, shift_ptr, sum_ptr, count, row, column, d, stride_gm, sign,
                BLOCK_M, BLOCK_N, COLUMNS, FOLD,
            )  # fmt: skip


@triton.jit(do_not_specialize=["d", "stride_gm"], do_not_specialize_on_alignment=FOREIGN)
def _mirror_kernel(
    g_ptr,  # (d, d) float32
    d,
    stride_gm: tl.int64,
    BLOCK: tl.constexpr,
):
    """G[c, r] = G[r, c] for r > c."""
    row = _triangle_row(tl.program_id(0))
    column = tl.program_id(0) - row * (row + 1) // 2
    rows, columns = row * BLOCK + tl.arange(0, BLOCK), column * BLOCK + tl.arange(0, BLOCK)
    below = (rows[:, None] > columns[None, :]) & (rows[:, None] < d)
    lower = tl.load(g_ptr + rows.to(tl.int64)[:, None] * stride_gm + columns[None, :], mask=below)
    upper = g_ptr + columns.to(tl.int64)[None, :] * stride_gm + rows[:, None]
    tl.store(upper, lower, mask=below)


def mirror_triangle_(
    gram: Tensor,  # (d, d) float32
) -> None:
    """Copy the lower triangle onto the upper one."""
    blocks = triton.cdiv(gram.shape[0], MIRROR_BLOCK)
    with torch.cuda.device_of(gram):  # kernels are launched on the current device
        _mirror_kernel[(blocks * (blocks + 1) // 2,)](
            gram, gram.shape[0], gram.stride(0), BLOCK=MIRROR_BLOCK, **launch_options(_mirror_kernel)
        )


class GramUpdate:
    """Updates of one kind: everything decided that does not change from one to the next.

    Args:
        x: (n, d), rows; only how they are laid out is looked at.
        aligned: Whether every row can be read by 16-byte copies.
        masked: Whether rows are left out.
        gram: (d, d), laid out as what rows are added to.
        workspace: Of the device and stream.
    """

    def __init__(self, x: Tensor, *, aligned: bool, masked: bool, gram: Tensor, workspace: Workspace) -> None:
        n, d = x.shape
        fold = aligned and x.dtype != torch.float32
        tile = choose_tile(architecture(x.device), x.dtype, aligned, d)
        plan = plan_gram(n, d, tile, multiprocessors(x.device))
        chunks, blocks = triton.cdiv(n, TOTALS_ROWS), triton.cdiv(d, TOTALS_COLUMNS)
        sums = workspace.buffer("sums", chunks * d)
        squares = workspace.buffer("squares", chunks * blocks)
        counts = workspace.buffer("counts", chunks)
        batch = workspace.buffer("batch_sums", d), workspace.buffer("batch_count", 1)
        partial = workspace.buffer("partial", plan.splits * plan.split * tile.block_m * tile.block_n)
        counters = workspace.counters(max(blocks + 1, plan.split))
        self._totals_buffers, self._batch, self._totals_numbers = (sums, squares, counts, counters), batch, (n, d)
        self._gram_buffers, self._strides = (*batch, partial, counters), x.stride()
        self._gram_numbers = gram.stride(0), plan.whole, plan.split, plan.splits, plan.split_rows

        kind = {"ALIGNED": aligned, "MASKED": masked}
        totals = {"ROWS": TOTALS_ROWS, "COLUMNS": TOTALS_COLUMNS, "STEP": TOTALS_STEP, **kind}
        precision = dot_precision(x.dtype) if has_tf32(x.device) else "ieee"
        blocks_of_tile = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "BAND": tile.band}
        triangle = {
            **blocks_of_tile, "COLUMNS": FLUSH_COLUMNS, "ALIGNED": aligned, "FOLD": fold, "MASKED": masked,
            "PRECISION": precision, "UPCAST": operand_dtype(x.dtype) != x.dtype,
        }  # fmt: skip
        totals_grid, gram_grid = (chunks, blocks, 1), (plan.programs, 1, 1)
        self._totals = Launch(
            lambda *arguments: _totals_kernel[totals_grid](*arguments, **totals, **launch_options(_totals_kernel)),
            totals_grid,
            totals,
        )
        self._triangle = Launch(
            lambda *arguments: _gram_kernel[gram_grid](
                *arguments, **triangle, **launch_options(_gram_kernel, tile.warps, tile.stages)
            ),
            gram_grid,
            triangle,
        )

    def launch(
        self,
        rows: tuple[Tensor, Tensor, Tensor],  # x, shift, and mask (without one: anything)
        targets: tuple[Tensor, Tensor, Tensor],  # gram, column_sum, square_sum
        sign: float,
        stream: int,
    ) -> None:
        """Two launches: the totals, then the lower triangle."""
        gram, *totals = targets
        strides = self._strides
        self._totals(
            stream, *rows, *self._totals_buffers, *totals, *self._batch, *self._totals_numbers, *strides, sign
        )  # fmt: skip
        self._triangle(
            stream, *rows, *self._gram_buffers, gram, *self._totals_numbers, *strides, *self._gram_numbers, sign
        )  # fmt: skip


def accumulate_triangle_(
    gram: Tensor,  # (d, d) float32, unit column stride
    column_sum: Tensor,  # (d,) float64
    square_sum: Tensor,  # () float64
    x: Tensor,  # (n, d)
    shift: Tensor,  # (d,) float32
    row_mask: Tensor | None,  # (n,) bool
    sign: float = 1.0,
    workspace: Workspace | None = None,
) -> None:
    """Fold rows into the lower triangle of a Gram matrix, in two launches.

    Entries above the diagonal are left in any state; :func:`mirror_triangle_` restores them. All tensors are on the
    current device. Without a ``workspace`` of the current stream one is made.
    """
    update = GramUpdate(
        x, aligned=is_aligned(x), masked=row_mask is not None, gram=gram, workspace=workspace or Workspace(x.device)
    )
    rows = x, shift.contiguous(), x if row_mask is None else row_mask.contiguous()
    update.launch(rows, (gram, column_sum, square_sum), sign, current_stream(x.device))


def gram_triton(
    gram: Tensor,  # (d, d) float32
    column_sum: Tensor,  # (d,) float64
    square_sum: Tensor,  # () float64
    x: Tensor,  # (..., d)
    shift: Tensor,  # (d,) float32
    row_mask: Tensor | None,  # (...)
    sign: float,
) -> None:
    if x.numel() == 0:
        return
    with torch.cuda.device_of(x):  # kernels are launched on the current device
        for rows, mask in row_views(x, row_mask):
            accumulate_triangle_(gram, column_sum, square_sum, rows, shift, mask, sign)
        mirror_triangle_(gram)


def add_rows_(
    gram: Tensor,  # (d, d) float32
    column_sum: Tensor,  # (d,) float64
    square_sum: Tensor,  # () float64
    x: Tensor,  # (..., d)
    shift: Tensor,  # (d,) float32
    row_mask: Tensor | None,  # (...)
    sign: float,
) -> None:
    """:func:`gram_triton` for rows of a kind that comes again, without the mirror: what it takes is found out once.

    A kind is all that its tensors' shapes, strides and dtypes say; arguments are validated when it is new. Rows that
    lie in one view take two launches and nothing else.
    """
    device = x.device
    if device.index is not None and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            add_rows_(gram, column_sum, square_sum, x, shift, row_mask, sign)
        return
    stream = current_stream(device)
    workspace = workspace_of(device, stream)
    key = "gram", kind_of(x, row_mask, gram), dot_precision(x.dtype), shift.is_contiguous()
    try:
        update = workspace.plans[key]
    except KeyError:
        update = _update_for(gram, x, shift, row_mask, workspace)
        workspace.keep(key, update)
    if update is not None:
        rows = x, shift, x if row_mask is None else row_mask
        update.launch(rows, (gram, column_sum, square_sum), sign, stream)
        return
    for view, part in row_views(x, row_mask) if x.numel() else ():
        accumulate_triangle_(gram, column_sum, square_sum, view, shift, part, sign, workspace)


def _update_for(
    gram: Tensor, x: Tensor, shift: Tensor, row_mask: Tensor | None, workspace: Workspace
) -> GramUpdate | None:
    """The update of rows of this kind; None where there is nothing to do, or it takes more than one."""
    rows = one_view(x, shift, row_mask, gram)
    if rows is None:
        return None
    masked = row_mask is not None
    return GramUpdate(rows, aligned=is_aligned(rows), masked=masked, gram=gram, workspace=workspace)
