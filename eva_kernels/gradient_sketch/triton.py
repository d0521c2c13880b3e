"""Products of rows with few columns in Triton: one kernel, which sums over the rows' features or over the rows.

What it multiplies is prepared by another; in what they multiply is in this folder's README.
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
    Launch,
    architecture,
    arrives_last,
    current_stream,
    is_aligned,
    kind_of,
    launch_options,
    multiprocessors,
    operand_dtype,
    piece_of,
    rounded_to_bfloat16,
    shares_of,
    sum_of_shares,
)
from .._workspace import Workspace, workspace_of

PREPARE_ROWS = 32  # rows of the factor one program converts
MIN_COLUMNS, MAX_COLUMNS = 32, 128  # of the factor in one program, padded to a power of two
GENERIC_COLUMNS = 64  # the same for rows that are not aligned bfloat16: one variant for all factors


@dataclass(frozen=True)
class ThinTile:
    """What is chosen for one launch.

    Attributes:
        block: rows of the result in one program: rows of X, or with ``outer`` its features.
        depth: what is summed over in one pass of the loop: features of X, or with ``outer`` rows.
        warps, stages: of the launch.
    """

    block: int
    depth: int
    warps: int
    stages: int


INTERPRETER_TILE = ThinTile(16, 16, 4, 1)
GENERIC_TILE = ThinTile(32, 32, 4, 3)


def choose_tile(arch: str, fast: bool, wide: int) -> ThinTile:
    """The tile for ``wide`` columns, the halves of a factor counted both; ``fast``: of aligned bfloat16 rows."""
    if INTERPRETED:
        return INTERPRETER_TILE
    if not fast:
        return GENERIC_TILE
    stages = 2 if arch == "gfx942" else 3  # what fits into 64 KiB of shared memory
    return ThinTile(64, 32 if wide > MAX_COLUMNS else 64, 4 if wide <= 64 else 8, stages)


def padded_columns(q: int, fast: bool) -> int:
    """The columns that a program is given of a factor of q columns."""
    return min(max(MIN_COLUMNS, triton.next_power_of_2(q)), MAX_COLUMNS) if fast else GENERIC_COLUMNS


@triton.jit(do_not_specialize=["m", "q", "stride_fm", "stride_fq"], do_not_specialize_on_alignment=FOREIGN)
def _factor_kernel(
    factor_ptr,  # (m, q)
    operand_ptr,  # (parts, m, WIDE) in the dtype of the products
    m,
    q,
    stride_fm: tl.int64,
    stride_fq: tl.int64,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """F in parts of COLUMNS columns, padded by zeros. SPLIT: as two bfloat16, side by side, that add up to it."""
    WIDE: tl.constexpr = 2 * COLUMNS if SPLIT else COLUMNS
    part = tl.program_id(1)
    rows, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    columns, inside = part * COLUMNS + c, (rows < m)[:, None]
    address = rows.to(tl.int64)[:, None] * stride_fm + columns.to(tl.int64)[None, :] * stride_fq
    factor = tl.load(factor_ptr + address, mask=inside & (columns < q)[None, :], other=0.0).to(tl.float32)
    target = operand_ptr + (part.to(tl.int64) * m + rows)[:, None] * WIDE + c[None, :]
    if SPLIT:
        high = rounded_to_bfloat16(factor)
        low = rounded_to_bfloat16(factor - high)
        tl.store(target, high.to(operand_ptr.dtype.element_ty), mask=inside)
        tl.store(target + COLUMNS, low.to(operand_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(target, factor.to(operand_ptr.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=["n", "d", "q", "stride_xm", "stride_xd", "stride_tm", "stride_tq", "share"],
    do_not_specialize_on_alignment=FOREIGN,
)
def _thin_kernel(
    x_ptr,  # (n, d)
    mask_ptr,  # (n,) bool
    operand_ptr,  # (parts, d, WIDE), or with OUTER (parts, n, WIDE)
    partial_ptr,  # (blocks, parts, splits, BLOCK, COLUMNS) float32
    counter_ptr,  # (blocks, parts) int32
    target_ptr,  # (n, q) float32, or with OUTER (d, q)
    n,
    d,
    q,
    stride_xm: tl.int64,
    stride_xd: tl.int64,
    stride_tm: tl.int64,
    stride_tq: tl.int64,
    share,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
    FAST: tl.constexpr,
    MASKED: tl.constexpr,
    OUTER: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """target = X F, or with OUTER target += Xᵀ F: a block of the result a program, or a share of what it sums over.

    Rows left out are zeros, with OUTER those of F too. Where F is SPLIT, so is the result, and its halves are added.
    The last program of a block adds up the shares, in order.
    """
    WIDE: tl.constexpr = 2 * COLUMNS if SPLIT else COLUMNS
    block, part, parts, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1), tl.num_programs(2)
    first = tl.program_id(2) * (share // DEPTH * DEPTH)
    if ALIGNED:
        x_ptr = tl.multiple_of(x_ptr, 16)
        d, stride_xm, stride_xd = d // 8 * 8, stride_xm // 8 * 8, 1
    i, k, wide = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, DEPTH), tl.arange(0, WIDE)
    if OUTER:
        size, depth, stride_i, stride_k = d, n, stride_xd, stride_xm
    else:
        size, depth, stride_i, stride_k = n, d, stride_xm, stride_xd
    last = tl.minimum(first + share, depth)
    inside = i < size
    wanted = inside
    if MASKED and not OUTER:
        wanted = wanted & (tl.load(mask_ptr + i, mask=wanted, other=0) != 0)
    x_ptrs = x_ptr + i.to(tl.int64)[:, None] * stride_i + (first + k).to(tl.int64)[None, :] * stride_k
    f_ptrs = operand_ptr + (part.to(tl.int64) * depth + first + k)[:, None] * WIDE + wide[None, :]
    acc = tl.zeros((BLOCK, WIDE), tl.float32)
    for start in range(first, last, DEPTH):
        keep = start + k < depth  # of multiples of 8 each, where rows are aligned
        if MASKED and OUTER:
            keep = keep & (tl.load(mask_ptr + start + k, mask=keep, other=0) != 0)
        x = tl.load(x_ptrs, mask=wanted[:, None] & keep[None, :], other=0.0)
        f = tl.load(f_ptrs, mask=keep[:, None], other=0.0)
        acc = tl.dot(x.to(f.dtype), f, acc, input_precision="ieee")
        x_ptrs += tl.full((), DEPTH, tl.int64) * stride_k
        f_ptrs += DEPTH * WIDE
    if SPLIT:
        acc = piece_of(acc, 0, BLOCK, WIDE, COLUMNS) + piece_of(acc, 1, BLOCK, WIDE, COLUMNS)
    index = block.to(tl.int64) * parts + part
    local = tl.arange(0, COLUMNS)
    shares = partial_ptr + index * splits * BLOCK * COLUMNS + tl.arange(0, BLOCK)[:, None] * COLUMNS + local[None, :]
    if FAST:
        if splits > 1:
            tl.store(shares + tl.program_id(2) * BLOCK * COLUMNS, acc)
    else:
        tl.store(shares + tl.program_id(2) * BLOCK * COLUMNS, acc)
    if arrives_last(counter_ptr + index, splits):
        if FAST:
            if splits > 1:
                acc = sum_of_shares(shares, splits, BLOCK * COLUMNS, BLOCK, COLUMNS)
        else:  # whether or not there are others: Triton 3.2 does not survive a choice here
            acc = sum_of_shares(shares, splits, BLOCK * COLUMNS, BLOCK, COLUMNS)
        columns = part * COLUMNS + local
        address = target_ptr + i.to(tl.int64)[:, None] * stride_tm + columns.to(tl.int64)[None, :] * stride_tq
        stored = inside[:, None] & (columns < q)[None, :]
        if OUTER:
            acc += tl.load(address, mask=stored, other=0.0)
        tl.store(address, acc, mask=stored)


class ThinProduct:
    """Products of one kind: everything decided that does not change from one to the next.

    Args:
        x: (n, d), rows; only how they are laid out is looked at.
        factor: (d, q), or with ``outer`` (n, q); likewise.
        target: (n, q) float32, or with ``outer`` (d, q); likewise.
        outer: Whether Xᵀ F is added to the target; else it becomes X F.
        masked: Whether rows are left out.
        workspace: Of the device and stream.
    """

    def __init__(
        self, x: Tensor, factor: Tensor, target: Tensor, *, outer: bool, masked: bool, workspace: Workspace
    ) -> None:
        (size, q), m, aligned = target.shape, factor.shape[0], is_aligned(x)
        narrow = x.dtype == torch.bfloat16
        fast, split = aligned and narrow, narrow and factor.dtype != torch.bfloat16
        columns = padded_columns(q, fast)
        wide = 2 * columns if split else columns
        tile = choose_tile(architecture(x.device), fast, wide)
        blocks, parts, steps = triton.cdiv(size, tile.block), triton.cdiv(q, columns), triton.cdiv(m, tile.depth)
        share = triton.cdiv(steps, shares_of(steps, blocks * parts, multiprocessors(x.device))) * tile.depth
        splits = triton.cdiv(m, share)
        self._operand = workspace.buffer(
            "operand", parts * m * wide, operand_dtype(x.dtype) if narrow else torch.float32
        )
        partial = workspace.buffer("partial", blocks * parts * splits * tile.block * columns)
        self._buffers = partial, workspace.counters(blocks * parts)
        self._factor_numbers = m, q, *factor.stride()
        self._numbers = *x.shape, q, *x.stride(), *target.stride(), share

        prepare = {"ROWS": PREPARE_ROWS, "COLUMNS": columns, "SPLIT": split}
        multiply = {
            "BLOCK": tile.block, "DEPTH": tile.depth, "COLUMNS": columns, "ALIGNED": aligned, "FAST": fast,
            "MASKED": masked, "OUTER": outer, "SPLIT": split,
        }  # fmt: skip
        prepare_grid, grid = (triton.cdiv(m, PREPARE_ROWS), parts, 1), (blocks, parts, splits)
        self._prepare = Launch(
            lambda *arguments: _factor_kernel[prepare_grid](*arguments, **prepare, **launch_options(_factor_kernel)),
            prepare_grid,
            prepare,
        )
        self._multiply = Launch(
            lambda *arguments: _thin_kernel[grid](
                *arguments, **multiply, **launch_options(_thin_kernel, tile.warps, tile.stages)
            ),
            grid,
            multiply,
        )

    def launch(self, x: Tensor, row_mask: Tensor | None, factor: Tensor, target: Tensor, stream: int) -> None:
        """Two launches: the factor is prepared, and multiplied."""
        mask = x if row_mask is None else row_mask
        self._prepare(stream, factor, self._operand, *self._factor_numbers)
        self._multiply(stream, x, mask, self._operand, *self._buffers, target, *self._numbers)


def outer_triton(
    product: Tensor,  # (a, q) float32
    rows: Tensor,  # (..., a)
    weights: Tensor,  # (..., q)
    row_mask: Tensor | None,  # (...)
) -> None:
    weights, done = weights.reshape(-1, weights.shape[-1]), 0
    for x, mask in row_views(rows, row_mask):
        own = weights[done : done + len(x)]
        done += len(x)
        multiply_(product, x, own, mask, outer=True)


def projected_triton(
    rows: Tensor,  # (..., a)
    basis: Tensor,  # (a, q)
    row_mask: Tensor | None,  # (...)
) -> Tensor:  # (rows, q) float32
    found, done = rows.new_empty(rows.shape[:-1].numel(), basis.shape[1], dtype=torch.float32), 0
    for x, mask in row_views(rows, row_mask):
        own = found[done : done + len(x)]
        done += len(x)
        multiply_(own, x, basis, mask, outer=False)
    return found


def multiply_(
    target: Tensor,  # (n, q) float32, or with outer (d, q)
    x: Tensor,  # (n, d)
    factor: Tensor,  # (d, q), or with outer (n, q)
    row_mask: Tensor | None,  # (n,) bool
    *,
    outer: bool,
) -> None:
    """``target`` becomes X F, or with ``outer`` Xᵀ F is added to it: what it takes is found out once for each kind.

    Raises:
        ValueError: tensors are on different devices.
    """
    if not x.numel() or not target.numel():
        return
    for name, tensor in {"product": target, "factor": factor, "row_mask": row_mask}.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: expected a tensor on {x.device}, where the rows are, got one on {tensor.device}")
    factor = factor.float() if factor.dtype == torch.float64 else factor
    row_mask = None if row_mask is None else row_mask.contiguous()
    with torch.cuda.device_of(x):  # kernels are launched on the current device
        stream = current_stream(x.device)
        workspace = workspace_of(x.device, stream)
        key = "thin", outer, kind_of(x, row_mask, target), factor.shape, factor.stride(), factor.dtype
        product = workspace.plans.get(key)
        if product is None:
            masked = row_mask is not None
            product = ThinProduct(x, factor, target, outer=outer, masked=masked, workspace=workspace)
            workspace.keep(key, product)
        product.launch(x, row_mask, factor, target, stream)
