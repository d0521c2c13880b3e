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
    add_totals_,
    address_table,
    architecture,
    dot_precision,
    launch_options,
    make_rows,
    multiprocessors,
    row_pointers,
)

FLUSH_COLUMNS = 32  # columns of a tile flushed at a time: more of them spill
REDUCE_ROWS = 8  # rows of a tile one program of the reduction adds up
MIRROR_BLOCK = 64
MIN_SPLIT_ROWS = 256  # a shorter share of the rows costs more in its flush than it gains in its loop
SPLIT_COST = 256  # rows' worth of loop that writing and reducing one share takes
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
    tiles: int  # of one layer
    whole: int  # tiles, over all layers, that walk all rows
    split: int  # tiles that are split
    splits: int  # shares of the rows for each of those
    split_rows: int

    @property
    def programs(self) -> int:
        return self.whole + self.split * self.splits


def plan_gram(n: int, d: int, layers: int, tile: GramTile, processors: int) -> GramPlan:
    """Lay out the triangle of ``layers`` Gram matrices on a number of multiprocessors."""
    squares = triton.cdiv(d, tile.block_n)
    tiles = squares * (squares + 1) // 2 * (tile.block_n // tile.block_m)
    rest = tiles * layers % processors

    def cost(splits: int) -> int:
        return triton.cdiv(rest * splits, processors) * (n if splits == 1 else triton.cdiv(n, splits) + SPLIT_COST)

    choices = range(1, max(processors // rest, MAX_SPLITS) + 1) if rest else range(1, 2)
    splits = min((s for s in choices if s == 1 or n >= s * MIN_SPLIT_ROWS), key=cost)
    if splits == 1:
        return GramPlan(tile, tiles, tiles * layers, 0, 1, n)
    split_rows = triton.cdiv(triton.cdiv(n, splits), tile.block_k) * tile.block_k
    return GramPlan(tile, tiles, tiles * layers - rest, rest, triton.cdiv(n, split_rows), split_rows)


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
def _half(part, second: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """The first or second half of N columns."""
    left, right = tl.split(tl.permute(tl.reshape(part, (M, 2, N // 2)), (0, 2, 1)))
    return right if second else left


@triton.jit
def _piece(acc, piece: tl.constexpr, M: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns piece · COLUMNS … of a tile, halved until they are left. The compiler halves once for all pieces.

    A loop, since versions of Triton before 3.5 do not survive a kernel that calls itself.
    """
    part = acc
    for level in tl.static_range(8):
        if N >> level > COLUMNS:
            part = _half(part, (piece * COLUMNS // (N >> level + 1)) % 2, M, N >> level)
    return part


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
        part = _piece(acc, piece, M, N, COLUMNS)
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


@triton.jit(
    do_not_specialize=[
        "n", "d", "stride_xm", "stride_xd", "stride_gm", "sign", "layers", "tiles", "whole", "split", "split_rows",
    ],
    do_not_specialize_on_alignment=FOREIGN,
)  # fmt: skip
def _gram_kernel(
    x_ptr,  # (n, d)
    shift_ptr,  # (d,) float32
    mask_ptr,  # (n,) bool
    table_ptr,  # (3, layers) int64: addresses of the three above
    g_ptr,  # (d, d) float32, lower triangle
    g_table_ptr,  # (1, layers) int64: addresses of the Gram matrices
    sum_ptr,  # (layers, d) float32: Σ z of this batch
    count_ptr,  # (layers,) float32: its unmasked rows
    partial_ptr,  # (splits, split, BLOCK_M, BLOCK_N) float32
    n,
    d,
    stride_xm: tl.int64,
    stride_xd: tl.int64,
    stride_gm: tl.int64,
    sign: tl.float32,
    layers,
    tiles,
    whole,
    split,
    split_rows,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
    FOLD: tl.constexpr,
    MASKED: tl.constexpr,
    GROUPED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """G += sign · Σ z zᵀ over one tile of the triangle and all unmasked rows or one share of them, z = x − s.

    FOLD multiplies raw rows and subtracts the shift from the tile afterwards; otherwise it is subtracted from
    the rows as they are loaded. A share is left in the workspace, unfolded. UPCAST is for the interpreter,
    whose product of bfloat16 is wrong.
    """
    program = tl.program_id(0)
    index, start, stop = program, 0, n
    if program >= whole:
        index = whole + (program - whole) % split
        start = (program - whole) // split * split_rows
        stop = tl.minimum(start + split_rows, n)
    layer = index // tiles
    x_ptr, shift_ptr, mask_ptr = row_pointers(x_ptr, shift_ptr, mask_ptr, table_ptr, layer, layers, GROUPED)
    row, column = _tile_origin(index % tiles, d, BLOCK_M, BLOCK_N, BAND)
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
        acc = tl.dot(a.to(OPERAND), b.to(OPERAND), acc, input_precision=PRECISION)
        a_ptrs += step
        b_ptrs += step
    if GROUPED:
        g_ptr = tl.load(g_table_ptr + layer).to(g_ptr.dtype)
    sum_ptr += layer.to(tl.int64) * d
    partial_ptr += tl.maximum(program - whole, 0).to(tl.int64) * BLOCK_M * BLOCK_N
    _flush(
        acc, g_ptr, shift_ptr, sum_ptr, tl.load(count_ptr + layer), partial_ptr, program < whole, row, column,
        d, stride_gm, sign, BLOCK_M, BLOCK_N, COLUMNS, FOLD,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["d", "stride_gm", "sign", "layers", "tiles", "whole", "split", "splits"],
    do_not_specialize_on_alignment=FOREIGN,
)
def _reduce_kernel(
    shift_ptr,  # (d,) float32
    table_ptr,  # (3, layers) int64: addresses of x, shift and mask
    g_ptr,  # (d, d) float32, lower triangle
    g_table_ptr,  # (1, layers) int64
    sum_ptr,  # (layers, d) float32
    count_ptr,  # (layers,) float32
    partial_ptr,  # (splits, split, BLOCK_M, BLOCK_N) float32
    d,
    stride_gm: tl.int64,
    sign: tl.float32,
    layers,
    tiles,
    whole,
    split,
    splits,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BAND: tl.constexpr,
    ROWS: tl.constexpr,
    FOLD: tl.constexpr,
    GROUPED: tl.constexpr,
):
    """G += sign · Σ of a tile's shares, added in order; one program for a few rows of a tile."""
    tile, inner = tl.program_id(0), tl.program_id(1) * ROWS
    layer = (whole + tile) // tiles
    if GROUPED:
        shift_ptr = tl.load(table_ptr + layers + layer).to(shift_ptr.dtype)
        g_ptr = tl.load(g_table_ptr + layer).to(g_ptr.dtype)
    row, column = _tile_origin((whole + tile) % tiles, d, BLOCK_M, BLOCK_N, BAND)
    offset = (inner + tl.arange(0, ROWS))[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for share in range(splits):
        block = (share * split + tile).to(tl.int64)
        acc += tl.load(partial_ptr + block * BLOCK_M * BLOCK_N + offset)
    rows, columns = row + inner + tl.arange(0, ROWS), column + tl.arange(0, BLOCK_N)
    if FOLD:
        acc = _fold(acc, shift_ptr, sum_ptr + layer.to(tl.int64) * d, tl.load(count_ptr + layer), rows, columns, d)
    address = g_ptr + rows.to(tl.int64)[:, None] * stride_gm + columns[None, :]
    inside = (rows[:, None] < d) & (columns[None, :] < d)
    tl.store(address, tl.load(address, mask=inside) + sign * acc, mask=inside)


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
    _mirror_kernel[(blocks * (blocks + 1) // 2,)](
        gram, gram.shape[0], gram.stride(0), BLOCK=MIRROR_BLOCK, **launch_options(_mirror_kernel)
    )


def accumulate_triangles_(
    grams: list[Tensor],  # (d, d) float32 each, unit column stride, one row stride
    column_sums: list[Tensor],  # (d,) float64 each
    square_sums: list[Tensor],  # () float64 each
    x: list[Tensor],  # (n, d) each; one dtype, one pair of strides
    shifts: list[Tensor],  # (d,) float32 each
    row_masks: list[Tensor] | None,  # (n,) bool each
    sign: float = 1.0,
) -> None:
    """Fold rows into the lower triangles of one or more layers' Gram matrices, in one launch.

    Entries above the diagonal are left in any state; :func:`mirror_triangle_` restores them. Rows that are not
    aligned 16-bit rows go one layer at a time. All tensors are on the current device.
    """
    (n, d), layers, device = x[0].shape, len(x), x[0].device
    rows = make_rows(x, shifts, row_masks)
    fold = rows.aligned and x[0].dtype != torch.float32
    if layers > 1 and not fold:
        for i in range(layers):
            mask = None if row_masks is None else row_masks[i : i + 1]
            one = slice(i, i + 1)
            accumulate_triangles_(grams[one], column_sums[one], square_sums[one], x[one], shifts[one], mask, sign)
        return
    sums, counts = add_totals_(column_sums, square_sums, rows, sign)
    tile = choose_tile(architecture(device), x[0].dtype, rows.aligned, d)
    plan = plan_gram(n, d, layers, tile, multiprocessors(device))
    partial = sums.new_empty(plan.splits * plan.split, tile.block_m, tile.block_n)
    g_table = address_table(grams) if layers > 1 else None
    stride_gm = grams[0].stride(0)
    _gram_kernel[(plan.programs,)](
        *rows.pointers, grams[0], g_table, sums, counts, partial, n, d, *x[0].stride(), stride_gm, sign,
        layers, plan.tiles, plan.whole, plan.split, plan.split_rows,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BAND=tile.band, COLUMNS=FLUSH_COLUMNS,
        ALIGNED=rows.aligned, FOLD=fold, MASKED=rows.masks is not None, GROUPED=layers > 1,
        PRECISION=dot_precision(x[0].dtype), UPCAST=INTERPRETED,
        **launch_options(_gram_kernel, tile.warps, tile.stages),
    )  # fmt: skip
    if plan.split:
        _reduce_kernel[(plan.split, tile.block_m // REDUCE_ROWS)](
            rows.shifts[0], rows.table, grams[0], g_table, sums, counts, partial, d, stride_gm, sign,
            layers, plan.tiles, plan.whole, plan.split, plan.splits,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BAND=tile.band, ROWS=REDUCE_ROWS,
            FOLD=fold, GROUPED=layers > 1, **launch_options(_reduce_kernel),
        )  # fmt: skip


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
            masks = None if mask is None else [mask]
            accumulate_triangles_([gram], [column_sum], [square_sum], [rows], [shift], masks, sign)
        mirror_triangle_(gram)
