"""The subspace product in Triton: two thin products a chunk of rows, the second from the L2 cache.

For each chunk: P = Z Q (:func:`_project_kernel`, split over columns, then :func:`_settle_kernel`) and
Y += Zᵀ P with the totals of Z (:func:`_lift_kernel`). The derivation is in this folder's README.
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
    address_table,
    finish_totals_,
    l2_bytes,
    launch_options,
    make_rows,
    multiprocessors,
    row_pointers,
)

PREPARE_ROWS = 32  # rows of Q one program converts
SETTLE_ROWS = 32  # rows of P one program settles
FINISH_ROWS = 16  # rows of Y one program adds up
MIN_COLUMNS, MAX_COLUMNS = 32, 256  # of Q in one pass, padded to a power of two; more do not fit in registers
GENERIC_COLUMNS = 64  # the same for rows that are not aligned 16-bit rows: one variant for all bases


@dataclass(frozen=True)
class SubspaceTile:
    """What is chosen for the two products of one launch.

    Attributes:
        rows, columns: of X in one tile of P = Z Q.
        lift_rows: rows of X in one pass of Y += Zᵀ P; its tiles have the same columns. Divides ``rows``.
        warps, stages: of the launches.
    """

    rows: int
    columns: int
    lift_rows: int
    warps: int
    stages: int


INTERPRETER_TILE = SubspaceTile(16, 16, 16, 4, 1)
GENERIC_TILE = SubspaceTile(32, 32, 16, 8, 3)


def choose_tile(dtype: torch.dtype, aligned: bool, padded: int) -> SubspaceTile:
    """The tile for a basis of ``padded`` columns; bytes in flight matter here, not arithmetic."""
    if INTERPRETED:
        return INTERPRETER_TILE
    if dtype == torch.float32 or not aligned:
        return GENERIC_TILE
    return SubspaceTile(64, 64, 32 if padded == MAX_COLUMNS else 64, 4 if padded < 64 else 8, 3)


@dataclass(frozen=True)
class SubspacePlan:
    """How a launch walks its rows and fills the chip.

    Attributes:
        chunk: rows whose second read still finds them in the L2 cache.
        column_splits, split_columns: shares of the columns for P = Z Q.
        row_splits, split_rows: shares of a chunk's rows for Y += Zᵀ P.
    """

    chunk: int
    column_splits: int
    split_columns: int
    row_splits: int
    split_rows: int


def plan_subspace(
    n: int, d: int, layers: int, itemsize: int, tile: SubspaceTile, processors: int, cache: int
) -> SubspacePlan:
    """Chunks of half the L2 cache, every product split until it fills the multiprocessors once."""
    fitting = cache // 2 // (d * itemsize * layers) // tile.rows * tile.rows
    chunk = min(max(fitting, tile.rows), triton.cdiv(n, tile.rows) * tile.rows)
    blocks, columns = triton.cdiv(chunk, tile.rows), triton.cdiv(d, tile.columns)
    column_splits = max(1, min(processors // (blocks * layers), columns))
    row_splits = max(1, min(processors // (columns * layers), blocks))
    split_columns = triton.cdiv(columns, column_splits) * tile.columns
    split_rows = triton.cdiv(blocks, row_splits) * tile.rows
    return SubspacePlan(chunk, triton.cdiv(d, split_columns), split_columns, triton.cdiv(chunk, split_rows), split_rows)


@triton.jit(
    do_not_specialize=["d", "q", "stride_qm", "stride_qk"],
    do_not_specialize_on_alignment=FOREIGN,
)
def _prepare_kernel(
    basis_ptr,  # (d, q) float32
    shift_ptr,  # (d,) float32
    table_ptr,  # (2, layers) int64: addresses of the two above
    operand_ptr,  # (layers, d, PADDED) in the dtype of the products
    shift_product_ptr,  # (layers, programs, PADDED) float32
    d,
    q,
    stride_qm: tl.int64,
    stride_qk: tl.int64,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
    GROUPED: tl.constexpr,
):
    """Q in the dtype of the products, padded by zero columns, and a share of sᵀ times what Q was rounded to."""
    block, layer = tl.program_id(0), tl.program_id(1)
    if GROUPED:
        basis_ptr = tl.load(table_ptr + layer).to(basis_ptr.dtype)
        shift_ptr = tl.load(table_ptr + tl.num_programs(1) + layer).to(shift_ptr.dtype)
    rows, columns = block * ROWS + tl.arange(0, ROWS), tl.arange(0, PADDED)
    inside = (rows < d)[:, None] & (columns < q)[None, :]
    address = rows.to(tl.int64)[:, None] * stride_qm + columns.to(tl.int64)[None, :] * stride_qk
    basis = tl.load(basis_ptr + address, mask=inside, other=0.0).to(operand_ptr.dtype.element_ty)
    target = (layer.to(tl.int64) * d + rows)[:, None] * PADDED + columns[None, :]
    tl.store(operand_ptr + target, basis, mask=(rows < d)[:, None])
    shift = tl.load(shift_ptr + rows, mask=rows < d, other=0.0)
    share = tl.sum(basis.to(tl.float32) * shift[:, None], 0)
    tl.store(shift_product_ptr + (layer * tl.num_programs(0) + block) * PADDED + columns, share)


@triton.jit(
    do_not_specialize=["start", "stop", "d", "stride_xm", "stride_xd", "chunk", "split_columns"],
    do_not_specialize_on_alignment=FOREIGN,
)
def _project_kernel(
    x_ptr,  # (n, d)
    shift_ptr,  # (d,) float32
    mask_ptr,  # (n,) bool
    table_ptr,  # (3, layers) int64
    operand_ptr,  # (layers, d, PADDED)
    partial_ptr,  # (layers, column splits, chunk, PADDED) float32
    start,
    stop,
    d,
    stride_xm: tl.int64,
    stride_xd: tl.int64,
    chunk,
    split_columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    FOLD: tl.constexpr,
    MASKED: tl.constexpr,
    GROUPED: tl.constexpr,
):
    """Partial P = X Q (or Z Q unless FOLD) over one share of the columns, for the rows start … stop."""
    share, block, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    layers = tl.num_programs(2)
    x_ptr, shift_ptr, mask_ptr = row_pointers(x_ptr, shift_ptr, mask_ptr, table_ptr, layer, layers, GROUPED)
    if ALIGNED:
        x_ptr = tl.multiple_of(x_ptr, 16)
        d, stride_xm, stride_xd = d // 8 * 8, stride_xm // 8 * 8, 1
    local = block * ROWS + tl.arange(0, ROWS)
    rows = start + local
    keep = rows < stop
    if MASKED:
        keep = keep & (tl.load(mask_ptr + rows, mask=keep, other=0) != 0)
    k, padded = tl.arange(0, COLUMNS), tl.arange(0, PADDED)
    first = share * (split_columns // COLUMNS * COLUMNS)
    last = tl.minimum(first + split_columns, d)
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * stride_xm + (first + k).to(tl.int64)[None, :] * stride_xd
    q_ptrs = operand_ptr + (layer.to(tl.int64) * d + first + k)[:, None] * PADDED + padded[None, :]
    acc = tl.zeros((ROWS, PADDED), tl.float32)
    for column in range(first, last, COLUMNS):
        inside = column + k < d
        x = tl.load(x_ptrs, mask=keep[:, None] & inside[None, :], other=0.0)
        q = tl.load(q_ptrs, mask=inside[:, None], other=0.0)
        if not FOLD:
            shift = tl.load(shift_ptr + column + k, mask=inside, other=0.0)
            x = tl.where(keep[:, None], x.to(tl.float32) - shift[None, :], 0.0)
        acc = tl.dot(x.to(q.dtype), q, acc, input_precision="ieee")
        x_ptrs += tl.full((), COLUMNS, tl.int64) * stride_xd
        q_ptrs += COLUMNS * PADDED
    target = ((layer * tl.num_programs(0) + share).to(tl.int64) * chunk + local)[:, None] * PADDED
    tl.store(partial_ptr + target + padded[None, :], acc, mask=(local < chunk)[:, None])


@triton.jit(
    do_not_specialize=["start", "stop", "chunk", "splits", "index", "blocks"], do_not_specialize_on_alignment=FOREIGN
)
def _settle_kernel(
    mask_ptr,  # (n,) bool
    table_ptr,  # (3, layers) int64: addresses of x, shift and mask
    partial_ptr,  # (layers, splits, chunk, PADDED) float32
    shift_product_ptr,  # (layers, PADDED) float32
    product_ptr,  # (layers, chunk, PADDED) in the dtype of the products
    product_sum_ptr,  # (layers, blocks, PADDED) float32
    start,
    stop,
    chunk,
    splits,
    index,
    blocks,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
    FOLD: tl.constexpr,
    MASKED: tl.constexpr,
    GROUPED: tl.constexpr,
):
    """P = Σ of its shares, in order, minus sᵀQ if FOLD; zero for rows left out. Also Σ P over these rows."""
    block, layer = tl.program_id(0), tl.program_id(1)
    if GROUPED and MASKED:
        mask_ptr = tl.load(table_ptr + 2 * tl.num_programs(1) + layer).to(mask_ptr.dtype)
    local, padded = block * ROWS + tl.arange(0, ROWS), tl.arange(0, PADDED)
    keep = (start + local < stop) & (local < chunk)
    if MASKED:
        keep = keep & (tl.load(mask_ptr + start + local, mask=keep, other=0) != 0)
    acc = tl.zeros((ROWS, PADDED), tl.float32)
    for share in range(splits):
        source = ((layer * splits + share).to(tl.int64) * chunk + local)[:, None] * PADDED + padded[None, :]
        acc += tl.load(partial_ptr + source, mask=(local < chunk)[:, None], other=0.0)
    if FOLD:
        acc -= tl.load(shift_product_ptr + layer * PADDED + padded)[None, :]
    product = tl.where(keep[:, None], acc, 0.0).to(product_ptr.dtype.element_ty)
    target = (layer.to(tl.int64) * chunk + local)[:, None] * PADDED + padded[None, :]
    tl.store(product_ptr + target, product, mask=(local < chunk)[:, None])
    total = tl.sum(product.to(tl.float32), 0)
    tl.store(product_sum_ptr + (layer.to(tl.int64) * blocks + index + block) * PADDED + padded, total)


@triton.jit(
    do_not_specialize=["start", "stop", "d", "stride_xm", "stride_xd", "chunk", "split_rows", "index", "parts"],
    do_not_specialize_on_alignment=FOREIGN,
)
def _lift_kernel(
    x_ptr,  # (n, d)
    shift_ptr,  # (d,) float32
    mask_ptr,  # (n,) bool
    table_ptr,  # (3, layers) int64
    product_ptr,  # (layers, chunk, PADDED)
    y_ptr,  # (layers, row splits, d, PADDED) float32
    sum_ptr,  # (layers, parts, d) float32
    square_ptr,  # (layers, parts, column blocks) float32
    count_ptr,  # (layers, parts) float32
    start,
    stop,
    d,
    stride_xm: tl.int64,
    stride_xd: tl.int64,
    chunk,
    split_rows,
    index,
    parts,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    FOLD: tl.constexpr,
    MASKED: tl.constexpr,
    GROUPED: tl.constexpr,
):
    """Y += Xᵀ P (or Zᵀ P unless FOLD) and Σ z, Σ z², for one block of columns and one share of the rows."""
    block, share, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    layers = tl.num_programs(2)
    x_ptr, shift_ptr, mask_ptr = row_pointers(x_ptr, shift_ptr, mask_ptr, table_ptr, layer, layers, GROUPED)
    if ALIGNED:
        x_ptr = tl.multiple_of(x_ptr, 16)
        d, stride_xm, stride_xd = d // 8 * 8, stride_xm // 8 * 8, 1
    columns, k, padded = block * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, ROWS), tl.arange(0, PADDED)
    inside = columns < d
    shift = tl.load(shift_ptr + columns, mask=inside, other=0.0)
    first = start + share * split_rows
    last = tl.minimum(first + split_rows, stop)
    x_ptrs = x_ptr + (first + k).to(tl.int64)[None, :] * stride_xm + columns.to(tl.int64)[:, None] * stride_xd
    p_ptrs = product_ptr + (layer.to(tl.int64) * chunk + share * split_rows + k)[:, None] * PADDED + padded[None, :]
    acc = tl.zeros((COLUMNS, PADDED), tl.float32)
    sums = tl.zeros((COLUMNS, ROWS), tl.float32)
    squares = tl.zeros((COLUMNS, ROWS), tl.float32)
    count = tl.zeros((ROWS,), tl.float32)
    for row in range(first, last, ROWS):
        keep = k < last - row
        p = tl.load(p_ptrs, mask=keep[:, None], other=0.0)
        if MASKED:
            keep = keep & (tl.load(mask_ptr + row + k, mask=keep, other=0) != 0)
        x = tl.load(x_ptrs, mask=inside[:, None] & keep[None, :], other=0.0)
        z = tl.where(inside[:, None] & keep[None, :], x.to(tl.float32) - shift[:, None], 0.0)
        sums += z
        squares += z * z
        count += keep.to(tl.float32)
        if not FOLD:
            x = z
        acc = tl.dot(x.to(p.dtype), p, acc, input_precision="ieee")
        x_ptrs += tl.full((), ROWS, tl.int64) * stride_xm
        p_ptrs += ROWS * PADDED
    target = ((layer * tl.num_programs(1) + share).to(tl.int64) * d + columns)[:, None] * PADDED + padded[None, :]
    if start > 0:  # an earlier chunk has left its share here
        acc += tl.load(y_ptr + target, mask=inside[:, None], other=0.0)
    tl.store(y_ptr + target, acc, mask=inside[:, None])
    part = layer.to(tl.int64) * parts + index + share
    tl.store(sum_ptr + part * d + columns, tl.sum(sums, 1), mask=inside)
    tl.store(square_ptr + part * tl.num_programs(0) + block, tl.sum(squares))
    if block == 0:
        tl.store(count_ptr + part, tl.sum(count))


@triton.jit(
    do_not_specialize=["d", "q", "splits", "stride_ym", "stride_yq", "sign"], do_not_specialize_on_alignment=FOREIGN
)
def _finish_kernel(
    target_ptr,  # (d, q) float32
    shift_ptr,  # (d,) float32
    table_ptr,  # (2, layers) int64: addresses of the two above
    y_ptr,  # (layers, splits, d, PADDED) float32
    product_sum_ptr,  # (layers, PADDED) float32
    d,
    q,
    splits,
    stride_ym: tl.int64,
    stride_yq: tl.int64,
    sign: tl.float32,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
    FOLD: tl.constexpr,
    GROUPED: tl.constexpr,
):
    """target += sign · (Σ of the shares, in order, minus s (Σ P)ᵀ if FOLD)."""
    block, layer = tl.program_id(0), tl.program_id(1)
    if GROUPED:
        target_ptr = tl.load(table_ptr + layer).to(target_ptr.dtype)
        shift_ptr = tl.load(table_ptr + tl.num_programs(1) + layer).to(shift_ptr.dtype)
    rows, padded = block * ROWS + tl.arange(0, ROWS), tl.arange(0, PADDED)
    inside = (rows < d)[:, None] & (padded < q)[None, :]
    acc = tl.zeros((ROWS, PADDED), tl.float32)
    for share in range(splits):
        source = ((layer * splits + share).to(tl.int64) * d + rows)[:, None] * PADDED + padded[None, :]
        acc += tl.load(y_ptr + source, mask=inside, other=0.0)
    if FOLD:
        shift = tl.load(shift_ptr + rows, mask=rows < d, other=0.0)
        acc -= shift[:, None] * tl.load(product_sum_ptr + layer * PADDED + padded)[None, :]
    address = target_ptr + rows.to(tl.int64)[:, None] * stride_ym + padded.to(tl.int64)[None, :] * stride_yq
    tl.store(address, tl.load(address, mask=inside) + sign * acc, mask=inside)


def accumulate_products_(
    products: list[Tensor],  # (d, q) float32 each, one pair of strides
    column_sums: list[Tensor],  # (d,) float64 each
    square_sums: list[Tensor],  # () float64 each
    x: list[Tensor],  # (n, d) each; one dtype, one pair of strides
    bases: list[Tensor],  # (d, q) float32 each, one pair of strides
    shifts: list[Tensor],  # (d,) float32 each
    row_masks: list[Tensor] | None,  # (n,) bool each
    sign: float = 1.0,
) -> None:
    """Fold rows into the products of one or more layers, with one launch of each kernel a chunk.

    Rows that are not aligned 16-bit rows go one layer at a time. All tensors are on the current device.
    """
    (n, d), q, layers, grouped = x[0].shape, bases[0].shape[1], len(x), len(x) > 1
    rows = make_rows(x, shifts, row_masks)
    fold = rows.aligned and x[0].dtype != torch.float32
    if grouped and not fold:
        for i in range(layers):
            one = slice(i, i + 1)
            mask = None if row_masks is None else row_masks[one]
            accumulate_products_(
                products[one], column_sums[one], square_sums[one], x[one], bases[one], shifts[one], mask, sign
            )
        return
    padded = max(MIN_COLUMNS, triton.next_power_of_2(q)) if fold or INTERPRETED else GENERIC_COLUMNS
    tile = choose_tile(x[0].dtype, rows.aligned, padded)
    plan = plan_subspace(n, d, layers, x[0].element_size(), tile, multiprocessors(x[0].device), l2_bytes(x[0].device))
    chunks, settle_blocks = triton.cdiv(n, plan.chunk), triton.cdiv(plan.chunk, SETTLE_ROWS)
    row_blocks, column_blocks = triton.cdiv(plan.chunk, tile.rows), triton.cdiv(d, tile.columns)
    parts = chunks * plan.row_splits

    operand = x[0].new_empty(layers, d, padded, dtype=torch.float32 if INTERPRETED else x[0].dtype)
    workspace = shifts[0].new_empty
    shift_product = workspace(layers, triton.cdiv(d, PREPARE_ROWS), padded)
    _prepare_kernel[(shift_product.shape[1], layers)](
        bases[0], rows.shifts[0], address_table(bases, rows.shifts) if grouped else None, operand, shift_product,
        d, q, *bases[0].stride(), ROWS=PREPARE_ROWS, PADDED=padded, GROUPED=grouped,
        **launch_options(_prepare_kernel),
    )  # fmt: skip
    shift_product = shift_product.sum(1)

    partial = workspace(layers, plan.column_splits, plan.chunk, padded)
    product = operand.new_empty(layers, plan.chunk, padded)
    product_sum = workspace(layers, chunks * settle_blocks, padded)
    y = workspace(layers, plan.row_splits, d, padded)
    totals = workspace(layers, parts, d), workspace(layers, parts, column_blocks), workspace(layers, parts)
    kind = {"FOLD": fold, "MASKED": rows.masks is not None, "GROUPED": grouped}
    shape = {"COLUMNS": tile.columns, "PADDED": padded, "ALIGNED": rows.aligned}
    for index in range(chunks):
        start, stop = index * plan.chunk, min((index + 1) * plan.chunk, n)
        _project_kernel[(plan.column_splits, row_blocks, layers)](
            *rows.pointers, operand, partial, start, stop, d, *x[0].stride(), plan.chunk, plan.split_columns,
            ROWS=tile.rows, **kind, **shape, **launch_options(_project_kernel, tile.warps, tile.stages),
        )  # fmt: skip
        _settle_kernel[(settle_blocks, layers)](
            rows.masks[0] if rows.masks else None, rows.table, partial, shift_product, product, product_sum,
            start, stop, plan.chunk, plan.column_splits, index * settle_blocks, chunks * settle_blocks,
            ROWS=SETTLE_ROWS, PADDED=padded, **kind, **launch_options(_settle_kernel),
        )  # fmt: skip
        _lift_kernel[(column_blocks, plan.row_splits, layers)](
            *rows.pointers, product, y, *totals, start, stop, d, *x[0].stride(),
            plan.chunk, plan.split_rows, index * plan.row_splits, parts,
            ROWS=tile.lift_rows, **kind, **shape,
            **launch_options(_lift_kernel, tile.warps, tile.stages),
        )  # fmt: skip
    _finish_kernel[(triton.cdiv(d, FINISH_ROWS), layers)](
        products[0], rows.shifts[0], address_table(products, rows.shifts) if grouped else None, y,
        product_sum.sum(1), d, q, plan.row_splits, *products[0].stride(), sign,
        ROWS=FINISH_ROWS, PADDED=padded, FOLD=fold, GROUPED=grouped, **launch_options(_finish_kernel),
    )  # fmt: skip
    finish_totals_(column_sums, square_sums, *totals, tile.columns, sign)


def subspace_triton(
    product: Tensor,  # (d, q) float32
    column_sum: Tensor,  # (d,) float64
    square_sum: Tensor,  # () float64
    x: Tensor,  # (..., d)
    basis: Tensor,  # (d, q) float32
    shift: Tensor,  # (d,) float32
    row_mask: Tensor | None,  # (...)
    sign: float,
) -> None:
    if x.numel() == 0:
        return
    with torch.cuda.device_of(x):  # kernels are launched on the current device
        for rows, mask in row_views(x, row_mask):
            masks = None if mask is None else [mask]
            aligned = make_rows([rows], [shift], masks).aligned and x.dtype != torch.float32
            width = MAX_COLUMNS if aligned else GENERIC_COLUMNS
            totals = column_sum, square_sum
            for first in range(0, max(basis.shape[1], 1), width):
                part = slice(first, first + width)
                accumulate_products_(
                    [product[:, part]], [totals[0]], [totals[1]], [rows], [basis[:, part]], [shift], masks, sign
                )
                totals = torch.zeros_like(column_sum), torch.zeros_like(square_sum)  # the first part has added them
