"""The subspace product in Triton: two launches a chunk of rows, a thin product each, the second from the L2 cache.

P = Z Q (:func:`_project_kernel`) and Y += Zᵀ P with the totals of Z (:func:`_lift_kernel`). Either is split where it
would leave the chip idle, and the last program to arrive adds up what was split. The derivation is in this folder's
README.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._cards import triton_version
from .._rows import row_views
from .._triton import (
    FOREIGN,
    INTERPRETED,
    Launch,
    add_column_sums,
    architecture,
    arrives_last,
    current_stream,
    is_aligned,
    kind_of,
    l2_bytes,
    launch_options,
    multiprocessors,
    one_view,
    operand_dtype,
    piece_of,
    shares_of,
    sum_of_shares,
    total_of,
)
from .._workspace import Workspace, workspace_of
from .sample import Sample

PREPARE_ROWS = 32  # rows of Q one program converts
SUMS_AT_ONCE = 16  # sums of P that are loaded together
FLUSH_COLUMNS = 32  # of the widest Y, added to at a time: more of them spill, and Triton 3.2 aborts on fewer than all
MIN_COLUMNS, MAX_COLUMNS = 32, 256  # of Q in one pass, padded to a power of two; more do not fit in registers
COLUMNS_AT_ONCE = 16  # what is read of Q and P is a multiple of this: a line of the L2 cache
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


def choose_tile(arch: str, dtype: torch.dtype, aligned: bool, padded: int) -> SubspaceTile:
    """The tile for a basis of ``padded`` columns; bytes in flight matter here, not arithmetic."""
    if INTERPRETED:
        return INTERPRETER_TILE
    if dtype == torch.float32 or not aligned:
        return GENERIC_TILE
    widest = padded == MAX_COLUMNS
    stages = 2 if widest and arch == "gfx942" else 3  # what fits into 64 KiB of shared memory
    return SubspaceTile(64, 64, 32 if widest else 64, 4 if padded < 64 else 8, stages)


def needs_wait(arch: str, fold: bool) -> bool:
    """Whether :func:`_lift_kernel` must end a product before it copies more rows: where products run by themselves."""
    return fold and arch == "sm_90"


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


def plan_subspace(n: int, d: int, itemsize: int, tile: SubspaceTile, processors: int, cache: int) -> SubspacePlan:
    """Chunks of half the L2 cache, every product split until it fills the multiprocessors once."""
    fitting = cache // 2 // (d * itemsize) // tile.rows * tile.rows
    chunk = min(max(fitting, tile.rows), triton.cdiv(n, tile.rows) * tile.rows)
    blocks, columns = triton.cdiv(chunk, tile.rows), triton.cdiv(d, tile.columns)
    column_splits = shares_of(columns, blocks, processors)
    row_splits = shares_of(blocks, columns, processors)
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
    operand_ptr,  # (d, PADDED) in the dtype of the products
    shift_product_ptr,  # (programs, PADDED) float32
    d,
    q,
    stride_qm: tl.int64,
    stride_qk: tl.int64,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Q in the dtype of the products, padded by zero columns, and a share of sᵀ times what Q was rounded to."""
    block = tl.program_id(0)
    rows, columns = block * ROWS + tl.arange(0, ROWS), tl.arange(0, PADDED)
    inside = (rows < d)[:, None] & (columns < q)[None, :]
    address = rows.to(tl.int64)[:, None] * stride_qm + columns.to(tl.int64)[None, :] * stride_qk
    basis = tl.load(basis_ptr + address, mask=inside, other=0.0).to(operand_ptr.dtype.element_ty)
    target = rows.to(tl.int64)[:, None] * PADDED + columns[None, :]
    tl.store(operand_ptr + target, basis, mask=(rows < d)[:, None])
    shift = tl.load(shift_ptr + rows, mask=rows < d, other=0.0)
    share = tl.sum(basis.to(tl.float32) * shift[:, None], 0)
    tl.store(shift_product_ptr + block * PADDED + columns, share)


@triton.jit
def _in_use(wanted, columns, USED: tl.constexpr, PADDED: tl.constexpr):
    """Mask of the rows that are wanted, in the columns that are used."""
    if USED == PADDED:
        return wanted[:, None]
    else:
        return wanted[:, None] & (columns < USED)[None, :]


@triton.jit
def _least_scale(largest):
    """The least power of two, from 1 on, that brings such a float32 to 2¹⁵, half of what float16 holds."""
    bits = (largest * 0.000030517578125).to(tl.int32, bitcast=True)  # · 2⁻¹⁵
    return tl.maximum(((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True), 1.0)


@triton.jit
def _inverse(scale):
    """Of a power of two, exactly: a division might be approximate."""
    return (0x7F000000 - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def _scale_alike(products, sums, scale_ptr, blocks, ROWS: tl.constexpr, PADDED: tl.constexpr):
    """Divide the P of every block, and its sums, by the largest scale of any; it is stored after the blocks' own."""
    largest = 1.0
    for block in range(blocks):
        largest = tl.maximum(largest, tl.load(scale_ptr + block))
    tl.store(scale_ptr + blocks, largest)
    if largest > 1.0:  # hardly ever
        for block in range(blocks):
            factor = tl.load(scale_ptr + block) * _inverse(largest)
            product = (tl.load(products).to(tl.float32) * factor).to(products.dtype.element_ty)
            tl.store(products, product)
            tl.store(sums, tl.sum(product.to(tl.float32), 0))
            products += ROWS * PADDED
            sums += PADDED


@triton.jit(
    do_not_specialize=["d", "stride_xm", "stride_xd", "split_columns", "start", "stop"],
    do_not_specialize_on_alignment=FOREIGN,
)
def _project_kernel(
    x_ptr,  # (n, d)
    shift_ptr,  # (d,) float32
    mask_ptr,  # (n,) bool
    operand_ptr,  # (d, PADDED)
    shift_product_ptr,  # (PADDED,) float32
    partial_ptr,  # (blocks, splits, ROWS, PADDED) float32
    product_ptr,  # (blocks, ROWS, PADDED) in the dtype of the products
    product_sum_ptr,  # (blocks, PADDED) float32
    scale_ptr,  # (blocks + 1,) float32: what P is divided by, in each block and in all; for float16 alone
    counter_ptr,  # (blocks + 1,) int32
    d,
    stride_xm: tl.int64,
    stride_xd: tl.int64,
    split_columns,
    start,
    stop,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
    USED: tl.constexpr,
    ALIGNED: tl.constexpr,
    FOLD: tl.constexpr,
    MASKED: tl.constexpr,
):
    """P = Z Q for the rows start … stop, a share of the columns a program; zero for rows left out. Also Σ P.

    Q has PADDED columns, of which the first USED are read; the others are zero. FOLD multiplies raw rows and subtracts
    sᵀQ afterwards. The last program of a block of rows adds up the shares, in order. Of float16 the last of these sees
    to it that P is divided by one power of two, the least with which it fits.
    """
    block, share = tl.program_id(0), tl.program_id(1)
    NARROW: tl.constexpr = product_ptr.dtype.element_ty == tl.float16
    if ALIGNED:
        x_ptr = tl.multiple_of(x_ptr, 16)
        d, stride_xm, stride_xd = d // 8 * 8, stride_xm // 8 * 8, 1
    local = tl.arange(0, ROWS)
    rows = start + block * ROWS + local
    keep = rows < stop
    if MASKED:
        keep = keep & (tl.load(mask_ptr + rows, mask=keep, other=0) != 0)
    k, padded = tl.arange(0, COLUMNS), tl.arange(0, PADDED)
    first = share * (split_columns // COLUMNS * COLUMNS)
    last = tl.minimum(first + split_columns, d)
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * stride_xm + (first + k).to(tl.int64)[None, :] * stride_xd
    q_ptrs = operand_ptr + (first + k).to(tl.int64)[:, None] * PADDED + padded[None, :]
    acc = tl.zeros((ROWS, PADDED), tl.float32)
    for column in range(first, last, COLUMNS):
        inside = column + k < d
        x = tl.load(x_ptrs, mask=keep[:, None] & inside[None, :], other=0.0)
        q = tl.load(q_ptrs, mask=_in_use(inside, padded, USED, PADDED), other=0.0)
        if not FOLD:
            shift = tl.load(shift_ptr + column + k, mask=inside, other=0.0)
            x = tl.where(keep[:, None], x.to(tl.float32) - shift[None, :], 0.0)
            if NARROW:
                x *= 0.5  # x − s may be twice what float16 holds
        acc = tl.dot(x.to(q.dtype), q, acc, input_precision="ieee")
        x_ptrs += tl.full((), COLUMNS, tl.int64) * stride_xd
        q_ptrs += COLUMNS * PADDED
    blocks, splits = tl.num_programs(0), tl.num_programs(1)
    index = block.to(tl.int64)
    offset = local[:, None] * PADDED + padded[None, :]
    shares = partial_ptr + index * splits * ROWS * PADDED + offset
    if FOLD:
        if splits > 1:
            tl.store(shares + share * ROWS * PADDED, acc)
    else:
        tl.store(shares + share * ROWS * PADDED, acc)
    if arrives_last(counter_ptr + block, splits):
        if FOLD:
            if splits > 1:
                acc = sum_of_shares(shares, splits, ROWS * PADDED, ROWS, PADDED)
        else:  # whether or not there are others: Triton 3.2 does not survive a choice here
            acc = sum_of_shares(shares, splits, ROWS * PADDED, ROWS, PADDED)
        if FOLD:
            acc -= tl.load(shift_product_ptr + padded)[None, :]
        elif NARROW:
            acc *= 2.0
        acc = tl.where(keep[:, None], acc, 0.0)
        if NARROW:
            scale = _least_scale(tl.max(tl.max(tl.abs(acc), 1), 0))
            acc *= _inverse(scale)
            tl.store(scale_ptr + block, scale)
        product = acc.to(product_ptr.dtype.element_ty)
        tl.store(product_ptr + index * ROWS * PADDED + offset, product)
        tl.store(product_sum_ptr + index * PADDED + padded, tl.sum(product.to(tl.float32), 0))
        if NARROW:  # noqa: SIM102  (both sides of an "and" would be run)
            if arrives_last(counter_ptr + blocks, blocks):
                _scale_alike(product_ptr + offset, product_sum_ptr + padded, scale_ptr, blocks, ROWS, PADDED)


@triton.jit(
    do_not_specialize=[
        "blocks", "d", "q", "stride_xm", "stride_xd", "stride_ym", "stride_yq", "split_rows", "start", "stop",
        "sign",
    ],
    do_not_specialize_on_alignment=FOREIGN,
)  # fmt: skip
def _lift_kernel(
    x_ptr,  # (n, d)
    shift_ptr,  # (d,) float32
    mask_ptr,  # (n,) bool
    product_ptr,  # (chunk, PADDED)
    product_sum_ptr,  # (blocks, PADDED) float32, for the blocks of the other kernel
    scale_ptr,  # (blocks + 1,) float32: the last is what P is divided by, where that is float16
    y_ptr,  # (column blocks, splits, COLUMNS, PADDED) float32
    sum_ptr,  # (splits, d) float32
    square_ptr,  # (column blocks, splits) float32
    counter_ptr,  # (column blocks + 1,) int32
    target_ptr,  # (d, q) float32
    column_sum_ptr,  # (d,) float64
    square_sum_ptr,  # () float64
    blocks,
    d,
    q,
    stride_xm: tl.int64,
    stride_xd: tl.int64,
    stride_ym: tl.int64,
    stride_yq: tl.int64,
    split_rows,
    start,
    stop,
    sign: tl.float32,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
    USED: tl.constexpr,
    ALIGNED: tl.constexpr,
    FOLD: tl.constexpr,
    MASKED: tl.constexpr,
    WAIT: tl.constexpr,
    AT_ONCE: tl.constexpr,
    FLUSH: tl.constexpr,
):
    """target += sign · Zᵀ P for the rows start … stop, and Σ z, Σ z² into the totals: a block of columns a program.

    FOLD multiplies raw rows and subtracts s (Σ P)ᵀ afterwards. Where the rows are split, the last program of a block
    of columns adds up the shares, in order; the last of these adds up the squares. WAIT ends each product before more
    rows are copied (:func:`needs_wait`).
    """
    block, share, column_blocks, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1)
    if ALIGNED:
        x_ptr = tl.multiple_of(x_ptr, 16)
        d, stride_xm, stride_xd = d // 8 * 8, stride_xm // 8 * 8, 1
    columns, k, padded = block * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, ROWS), tl.arange(0, PADDED)
    inside = columns < d
    shift = tl.load(shift_ptr + columns, mask=inside, other=0.0)
    first = start + share * split_rows
    last = tl.minimum(first + split_rows, stop)
    x_ptrs = x_ptr + (first + k).to(tl.int64)[None, :] * stride_xm + columns.to(tl.int64)[:, None] * stride_xd
    p_rows = (share * split_rows + k).to(tl.int64)
    p_ptrs = product_ptr + p_rows[:, None] * PADDED + padded[None, :]
    acc = tl.zeros((COLUMNS, PADDED), tl.float32)
    sums = tl.zeros((COLUMNS, ROWS), tl.float32)
    squares = tl.zeros((COLUMNS, ROWS), tl.float32)
    for row in range(first, last, ROWS):
        keep = k < last - row
        p = tl.load(p_ptrs, mask=_in_use(keep, padded, USED, PADDED), other=0.0)
        if MASKED:
            keep = keep & (tl.load(mask_ptr + row + k, mask=keep, other=0) != 0)
        x = tl.load(x_ptrs, mask=inside[:, None] & keep[None, :], other=0.0)
        z = tl.where(inside[:, None] & keep[None, :], x.to(tl.float32) - shift[:, None], 0.0)
        sums += z
        squares += z * z
        if not FOLD:
            x = z
            if p.dtype == tl.float16:
                x *= 0.5  # as in the other kernel
        acc = tl.dot(x.to(p.dtype), p, acc, input_precision="ieee")
        if WAIT:
            # Where a load feeds a product and other arithmetic too, Triton gives it as many buffers as copies run
            # ahead and none for the product still under way, which then reads the rows of a later pass. Inline
            # assembly, even if empty, that takes the product as an operand makes the loop wait for it.
            acc = tl.inline_asm_elementwise("", "=f,0", [acc], tl.float32, is_pure=True, pack=1)
        x_ptrs += tl.full((), ROWS, tl.int64) * stride_xm
        p_ptrs += ROWS * PADDED
    index = block.to(tl.int64)
    tl.store(sum_ptr + share.to(tl.int64) * d + columns, tl.sum(sums, 1), mask=inside)
    tl.store(square_ptr + block * splits + share, tl.sum(squares))
    own = y_ptr + (index * splits + share) * COLUMNS * PADDED
    own += tl.arange(0, COLUMNS)[:, None] * PADDED + padded[None, :]
    if FOLD:
        if splits > 1:
            tl.store(own, acc)
    else:
        tl.store(own, acc)
    if arrives_last(counter_ptr + block, splits):
        shares = y_ptr + index * splits * COLUMNS * PADDED
        factor = sign
        if product_ptr.dtype.element_ty == tl.float16:
            factor *= tl.load(scale_ptr + blocks)
            if not FOLD:
                factor *= 2.0
        for piece in tl.static_range(PADDED // FLUSH):
            inner = piece * FLUSH + tl.arange(0, FLUSH)
            source = shares + tl.arange(0, COLUMNS)[:, None] * PADDED + inner[None, :]
            if FOLD:
                part = piece_of(acc, piece, COLUMNS, PADDED, FLUSH)
                if splits > 1:
                    part = sum_of_shares(source, splits, COLUMNS * PADDED, COLUMNS, FLUSH)
            else:
                part = sum_of_shares(source, splits, COLUMNS * PADDED, COLUMNS, FLUSH)
            if FOLD:
                total = tl.zeros((FLUSH,), tl.float32)
                for i in range(0, blocks, AT_ONCE):
                    some = i + tl.arange(0, AT_ONCE)
                    sums_of_p = product_sum_ptr + some[:, None] * PADDED + inner[None, :]
                    total += tl.sum(tl.load(sums_of_p, mask=(some < blocks)[:, None], other=0.0), 0)
                part -= shift[:, None] * total[None, :]
            address = target_ptr + columns.to(tl.int64)[:, None] * stride_ym + inner.to(tl.int64)[None, :] * stride_yq
            wanted = inside[:, None] & (inner < q)[None, :]
            tl.store(address, tl.load(address, mask=wanted) + factor * part, mask=wanted)
        add_column_sums(column_sum_ptr, sum_ptr, splits, columns, d, sign, COLUMNS)
        if arrives_last(counter_ptr + column_blocks, column_blocks):
            square = total_of(square_ptr, column_blocks * splits, COLUMNS)
            tl.store(square_sum_ptr, tl.load(square_sum_ptr) + sign * square)


@dataclass(frozen=True)
class Operand:
    """What rows are multiplied with.

    Attributes:
        matrix: (d, padded), Q̃: the basis in the dtype of the products, padded by zero columns.
        shift_product: (padded,) float32, sᵀQ̃.
    """

    matrix: Tensor
    shift_product: Tensor

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes + self.shift_product.nbytes


def make_operand(
    basis: Tensor,  # (d, q) float32
    shift: Tensor,  # (d,) float32, contiguous
    dtype: torch.dtype,  # of the rows
    padded: int,
) -> Operand:
    """Prepare a basis for rows of a dtype."""
    d, q = basis.shape
    matrix = basis.new_empty(d, padded, dtype=operand_dtype(dtype))
    shares = basis.new_empty(triton.cdiv(d, PREPARE_ROWS), padded)
    _prepare_kernel[(len(shares),)](
        basis, shift, matrix, shares, d, q, *basis.stride(), ROWS=PREPARE_ROWS, PADDED=padded,
        **launch_options(_prepare_kernel),
    )  # fmt: skip
    return Operand(matrix, shares.sum(0))


class SubspaceUpdate:
    """Updates of one kind: everything decided that does not change from one to the next.

    Args:
        x: (n, d), rows; only how they are laid out is looked at.
        aligned: Whether every row can be read by 16-byte copies.
        masked: Whether rows are left out.
        target: (d, q), laid out as what rows are added to.
        workspace: Of the device and stream.
    """

    def __init__(self, x: Tensor, *, aligned: bool, masked: bool, target: Tensor, workspace: Workspace) -> None:
        (n, d), q = x.shape, target.shape[1]
        fold = aligned and x.dtype != torch.float32
        self.padded = padded_columns(q, fold)
        arch = architecture(x.device)
        tile = choose_tile(arch, x.dtype, aligned, self.padded)
        plan = plan_subspace(n, d, x.element_size(), tile, multiprocessors(x.device), l2_bytes(x.device))
        self.operand_key = (x.dtype, self.padded)
        self._chunks = [(start, min(start + plan.chunk, n)) for start in range(0, n, plan.chunk)]
        blocks, columns = triton.cdiv(plan.chunk, tile.rows), triton.cdiv(d, tile.columns)

        def shares(name: str, splits: int, size: int) -> Tensor:
            return workspace.buffer(name, splits * size * self.padded if splits > 1 or not fold else 1)

        partial = shares("partial", plan.column_splits, plan.chunk)
        y = shares("y", plan.row_splits, columns * tile.columns)
        product = workspace.buffer("product", plan.chunk * self.padded, operand_dtype(x.dtype))
        product_sum = workspace.buffer("product_sum", blocks * self.padded)
        sums = workspace.buffer("sums", plan.row_splits * d)
        squares = workspace.buffer("squares", plan.row_splits * columns)
        scale = workspace.buffer("scale", blocks + 1)
        counters = workspace.counters(max(blocks, columns) + 1)
        self._project_buffers = partial, product, product_sum, scale, counters
        self._project_numbers = d, *x.stride(), plan.split_columns
        self._lift_buffers = product, product_sum, scale, y, sums, squares, counters
        self._lift_numbers = blocks, d, q, *x.stride(), *target.stride(), plan.split_rows

        used = used_columns(q, self.padded, fold)
        shape = {"COLUMNS": tile.columns, "PADDED": self.padded, "USED": used, "ALIGNED": aligned}
        kind = {"FOLD": fold, "MASKED": masked}
        project = {"ROWS": tile.rows, **shape, **kind}
        wait = needs_wait(arch, fold)
        lift = {"ROWS": tile.lift_rows, **shape, **kind, "WAIT": wait, **finish_constants(self.padded)}
        project_grid, lift_grid = (blocks, plan.column_splits, 1), (columns, plan.row_splits, 1)
        self._project = Launch(
            lambda *arguments: _project_kernel[project_grid](
                *arguments, **project, **launch_options(_project_kernel, tile.warps, tile.stages)
            ),
            project_grid,
            project,
        )
        self._lift = Launch(
            lambda *arguments: _lift_kernel[lift_grid](
                *arguments, **lift, **launch_options(_lift_kernel, tile.warps, tile.stages)
            ),
            lift_grid,
            lift,
        )

    def launch(
        self,
        rows: tuple[Tensor, Tensor, Tensor],  # x, shift, and mask (without one: anything)
        operand: Operand,
        totals: tuple[Tensor, Tensor, Tensor],  # product, column_sum, square_sum
        sign: float,
        stream: int,
    ) -> None:
        """Two launches for every chunk of rows."""
        for start, stop in self._chunks:
            self._project(
                stream, *rows, operand.matrix, operand.shift_product, *self._project_buffers, *self._project_numbers,
                start, stop,
            )  # fmt: skip
            self._lift(stream, *rows, *self._lift_buffers, *totals, *self._lift_numbers, start, stop, sign)


def finish_constants(padded: int) -> dict[str, int]:
    """Of the end of :func:`_lift_kernel`: what is loaded and added at once, since all at once would spill."""
    in_parts = padded == MAX_COLUMNS and triton_version() > (3, 2)
    return {"AT_ONCE": SUMS_AT_ONCE, "FLUSH": FLUSH_COLUMNS if in_parts else padded}


def padded_columns(q: int, fold: bool) -> int:
    """The columns that a basis of q columns is padded to."""
    return max(MIN_COLUMNS, triton.next_power_of_2(q)) if fold or INTERPRETED else GENERIC_COLUMNS


def used_columns(q: int, padded: int, fold: bool) -> int:
    """The columns, of those that a basis of q columns is padded to, that are read."""
    return min(triton.cdiv(q, COLUMNS_AT_ONCE) * COLUMNS_AT_ONCE, padded) if fold else padded


def accumulate_product_(
    product: Tensor,  # (d, q) float32
    column_sum: Tensor,  # (d,) float64
    square_sum: Tensor,  # () float64
    x: Tensor,  # (n, d)
    basis: Tensor,  # (d, q) float32
    shift: Tensor,  # (d,) float32
    row_mask: Tensor | None,  # (n,) bool
    sign: float = 1.0,
    workspace: Workspace | None = None,
) -> None:
    """Fold rows into a product, with one launch of each kernel a chunk.

    All tensors are on the current device. Without a ``workspace`` of the current stream one is made.
    """
    update = SubspaceUpdate(
        x, aligned=is_aligned(x), masked=row_mask is not None, target=product,
        workspace=workspace or Workspace(x.device),
    )  # fmt: skip
    shift = shift.contiguous()
    rows = x, shift, x if row_mask is None else row_mask.contiguous()
    operand = make_operand(basis, shift, x.dtype, update.padded)
    update.launch(rows, operand, (product, column_sum, square_sum), sign, current_stream(x.device))


def subspace_triton(
    product: Tensor,  # (d, q) float32
    column_sum: Tensor,  # (d,) float64
    square_sum: Tensor,  # () float64
    x: Tensor,  # (..., d)
    basis: Tensor,  # (d, q) float32
    shift: Tensor,  # (d,) float32
    row_mask: Tensor | None,  # (...)
    sign: float,
    workspace: Workspace | None = None,
) -> None:
    if x.numel() == 0:
        return
    with torch.cuda.device_of(x):  # kernels are launched on the current device
        for rows, mask in row_views(x, row_mask):
            width = MAX_COLUMNS if is_aligned(rows) and x.dtype != torch.float32 else GENERIC_COLUMNS
            totals = column_sum, square_sum
            for first in range(0, max(basis.shape[1], 1), width):
                part = slice(first, first + width)
                accumulate_product_(
                    product[:, part], *totals, rows, basis[:, part], shift, mask, sign, workspace
                )  # fmt: skip
                totals = torch.zeros_like(column_sum), torch.zeros_like(square_sum)  # the first part has added them


def add_rows_(
    product: Tensor,  # (d, q) float32
    column_sum: Tensor,  # (d,) float64
    square_sum: Tensor,  # () float64
    x: Tensor,  # (..., d)
    sample: Sample,
    row_mask: Tensor | None,  # (...)
    sign: float,
) -> None:
    """:func:`subspace_triton` for rows of a kind that comes again: what it takes is found out once.

    A kind is all that its tensors' shapes, strides and dtypes say; arguments are validated when it is new. Rows that
    lie in one view, with a basis that is multiplied in one pass, take two launches a chunk and nothing else.
    """
    device = x.device
    if device.index is not None and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            add_rows_(product, column_sum, square_sum, x, sample, row_mask, sign)
        return
    stream = current_stream(device)
    workspace = workspace_of(device, stream)
    key = "subspace", kind_of(x, row_mask, product)
    try:
        update = workspace.plans[key]
    except KeyError:
        update = _update_for(product, x, sample, row_mask, workspace)
        workspace.keep(key, update)
    if update is None:
        subspace_triton(product, column_sum, square_sum, x, sample.basis, sample.shift, row_mask, sign, workspace)
        return
    operand = sample.operands.get(update.operand_key)
    if operand is None:
        operand = make_operand(sample.basis, sample.shift, *update.operand_key)
        sample.operands[update.operand_key] = operand
    rows = x, sample.shift, x if row_mask is None else row_mask
    update.launch(rows, operand, (product, column_sum, square_sum), sign, stream)


def _update_for(
    product: Tensor, x: Tensor, sample: Sample, row_mask: Tensor | None, workspace: Workspace
) -> SubspaceUpdate | None:
    """The update of rows of this kind; None where there is nothing to do, or it takes more than one."""
    rows = one_view(x, sample.shift, row_mask, product)
    if rows is None:
        return None
    aligned = is_aligned(rows)
    if product.shape[1] > (MAX_COLUMNS if aligned and x.dtype != torch.float32 else GENERIC_COLUMNS):
        return None
    return SubspaceUpdate(rows, aligned=aligned, masked=row_mask is not None, target=product, workspace=workspace)
