"""What the Triton ops share: how they are launched, how rows are addressed, and the totals of rows."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import os
from collections.abc import Callable, Hashable
from math import isqrt
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

from ._cards import card_of
from ._rows import row_views, validate_rows

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
VECTOR = 8  # elements: 16 bytes of a 16-bit dtype, the widest asynchronous copy
# Tensors that come from outside and may start anywhere: one compiled variant serves them all. (Rows are the
# exception: where they start decides which kernel reads them.)
FOREIGN = [
    "shift_ptr", "mask_ptr", "g_ptr", "basis_ptr", "column_sum_ptr", "square_sum_ptr", "target_ptr",
    "factor_ptr",
]  # fmt: skip
CONSTANTS_TOO = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)  # a compiled kernel is called with them
TOTALS_ROWS, TOTALS_COLUMNS, TOTALS_STEP = 256, 128, 16  # of one program's float32 sums, and rows a pass
WARPS, STAGES = 4, 3  # of a launch that names none
# Where lanes of a warp hold the same sum and store it to one place, products must not be fused with additions: lanes
# that add in another order would fuse others of them, and their sums would be one bit apart.
UNFUSED = ("_prepare_kernel", "_jacobi_kernel")


def is_aligned(
    x: Tensor,  # (n, d)
) -> bool:
    """Whether every row can be read by 16-byte copies."""
    row, column = x.stride()
    return column == 1 and x.shape[1] % VECTOR == 0 and row % VECTOR == 0 and x.data_ptr() % 16 == 0


def architecture(device: torch.device) -> str:
    """The name tile tables are keyed by, of a device that dispatch lets launch; the interpreter needs none."""
    tiles = "sm_80" if device.type == "cpu" else card_of(device).tiles
    if tiles is None:
        raise ValueError(f"expected a GPU that there are kernels for, got {card_of(device).name}")
    return tiles


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


def has_tf32(device: torch.device) -> bool:
    """Whether products of float32 rows can be taken so on this device."""
    return device.type == "cpu" or card_of(device).tf32


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """What rows of a dtype are multiplied in. The interpreter takes bfloat16 for integers."""
    return torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype


def launch_options(kernel: Any, warps: int = WARPS, stages: int = STAGES) -> dict[str, Any]:
    """What a launch of ``kernel`` gives the compiler, beside its arguments. Every launch states all of it, since
    defaults differ between versions of Triton and between makers of GPUs."""
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": kernel.fn.__name__ not in UNFUSED}


def current_stream(device: torch.device) -> int:
    """The stream that launches on a device go to."""
    return 0 if INTERPRETED else int(driver.active.get_current_stream(device.index))


def shares_of(steps: int, programs: int, processors: int) -> int:
    """How many programs share the ``steps`` of a loop that each of ``programs`` would walk: until they fill the chip.

    And no further than the root of what there is to share: adding up a share costs its program about as much as a step,
    so that beyond it the last to arrive would take longer than sharing saves.
    """
    return max(1, min(processors // programs, isqrt(steps)))


def kind_of(x: Tensor, row_mask: Tensor | None, target: Tensor) -> tuple[Hashable, ...]:
    """All that decides how rows are added to a target, but what they are multiplied with: equal for equal launches."""
    mask = None if row_mask is None else (row_mask.shape, row_mask.stride(), row_mask.dtype, row_mask.device)
    aligned = x.data_ptr() % 16 == 0
    return x.shape, x.stride(), x.dtype, aligned, mask, target.shape, target.stride(), target.device


def one_view(
    x: Tensor,  # (..., d)
    shift: Tensor,  # (d,)
    row_mask: Tensor | None,  # (...)
    target: Tensor,
) -> Tensor | None:  # (n, d)
    """The rows of a kind that is new, validated; None where they do not lie in one view that kernels can take as it is.

    Raises:
        TypeError, ValueError: rows, shift, mask and target do not fit together.
    """
    validate_rows(x, shift, row_mask)
    for name, tensor in {"target": target, "row_mask": row_mask}.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: expected a tensor on {x.device}, where the rows are, got one on {tensor.device}")
    views = list(row_views(x, row_mask)) if x.numel() else []
    plain = shift.is_contiguous() and (row_mask is None or row_mask.is_contiguous())
    return views[0][0] if plain and len(views) == 1 else None


class Launch:
    """A launch whose grid and constants are decided: through Triton's JIT first, then of what the JIT has compiled.

    So the JIT sees one launch of many, and all must be alike where it looks: in the arguments' dtypes, in those that
    are None, and in the alignment of pointers that are not ``FOREIGN``.

    Args:
        launch: Launches with these arguments through the JIT, and returns what that gives.
        grid: Of the launch, three-dimensional.
        constants: The kernel's, in its order.
    """

    def __init__(
        self, launch: Callable[..., Any], grid: tuple[int, int, int], constants: dict[str, Any] | None = None
    ) -> None:
        self._launch, self._grid = launch, grid
        self._constants = tuple((constants or {}).values()) if CONSTANTS_TOO else ()
        self._direct: Callable[..., Any] | None = None

    def __call__(self, stream: int, *arguments: Any) -> None:
        """Launch with the kernel's arguments, in its order."""
        if self._direct is not None:
            self._direct(*arguments, *self._constants, stream=stream)
            return
        compiled = self._launch(*arguments)
        if isinstance(compiled, CompiledKernel):  # the interpreter compiles nothing
            self._direct = compiled[self._grid]


@triton.jit
def arrives_last(counter_ptr, programs):
    """Whether this is the last of so many programs to come here; it then sees all that the others stored before.

    Nobody waits: the others are done. The counter is zero before the first and after the last.
    """
    tl.debug_barrier()  # the stores of all threads come before the one arrival
    before = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    is_last = before == programs - 1
    if is_last:
        tl.store(counter_ptr, 0)
    return is_last


@triton.jit
def rounded_to_tf32(x):
    """Float32 with 10 bits of mantissa, to nearest: tensor cores cut the others off. NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True) + 0x1000 & ~0x1FFF
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def rounded_to_bfloat16(x):
    """Float32 that bfloat16 holds, to nearest: a cast is to nearest on some devices and cuts on others."""
    bits = x.to(tl.int32, bitcast=True) + 0x8000 & ~0xFFFF
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def _half(part, second: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """The first or second half of N columns."""
    left, right = tl.split(tl.permute(tl.reshape(part, (M, 2, N // 2)), (0, 2, 1)))
    return right if second else left


@triton.jit
def piece_of(acc, piece: tl.constexpr, M: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns piece · COLUMNS … of a tile, halved until they are left. The compiler halves once for all pieces.

    A loop, since versions of Triton before 3.5 do not survive a kernel that calls itself.
    """
    part = acc
    for level in tl.static_range(8):
        if N >> level > COLUMNS:
            part = _half(part, (piece * COLUMNS // (N >> level + 1)) % 2, M, N >> level)
    return part


@triton.jit
def sum_of_shares(shares, splits, step: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum of what programs have left, ``step`` apart, in order."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in range(splits):
        total += tl.load(shares)
        shares += step
    return total


@triton.jit
def add_column_sums(column_sum_ptr, sums_ptr, parts, columns, d, sign, COLUMNS: tl.constexpr):
    """Add the parts of Σ z, (parts, d) float32, to the column sums: in order, in float64. Returns their sum."""
    inside = columns < d
    total = tl.zeros((COLUMNS,), tl.float64)
    sums_ptr += columns
    for _ in range(parts):
        total += tl.load(sums_ptr, mask=inside, other=0.0).to(tl.float64)
        sums_ptr += d
    old = tl.load(column_sum_ptr + columns, mask=inside)
    tl.store(column_sum_ptr + columns, old + sign * total, mask=inside)
    return total


@triton.jit
def total_of(values_ptr, count, AT_ONCE: tl.constexpr):
    """The sum of ``count`` float32 values in float64, always in one order."""
    total = tl.zeros((AT_ONCE,), tl.float64)
    for start in range(0, count, AT_ONCE):
        i = start + tl.arange(0, AT_ONCE)
        total += tl.load(values_ptr + i, mask=i < count, other=0.0).to(tl.float64)
    return tl.sum(total)


@triton.jit(do_not_specialize=["n", "d", "stride_xm", "stride_xd", "sign"], do_not_specialize_on_alignment=FOREIGN)
def _totals_kernel(
    x_ptr,  # (n, d)
    shift_ptr,  # (d,) float32
    mask_ptr,  # (n,) bool
    sums_ptr,  # (chunks, d) float32
    squares_ptr,  # (chunks, column blocks) float32
    counts_ptr,  # (chunks,) float32
    counter_ptr,  # (column blocks + 1,) int32
    column_sum_ptr,  # (d,) float64
    square_sum_ptr,  # () float64
    batch_sum_ptr,  # (d,) float32
    batch_count_ptr,  # () float32
    n,
    d,
    stride_xm: tl.int64,
    stride_xd: tl.int64,
    sign: tl.float32,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Σ z, Σ z² and the number of unmasked rows in one chunk of rows and one block of columns, z = x − s.

    The last program of a block of columns adds its chunks to the totals with their sign, and to the batch's own sums;
    the last of these does so for the squares.
    """
    chunk, block, chunks, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1)
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
    tl.store(sums_ptr + chunk.to(tl.int64) * d + columns, tl.sum(sums, 0), mask=inside)
    tl.store(squares_ptr + chunk * blocks + block, tl.sum(squares))
    if block == 0:
        tl.store(counts_ptr + chunk, tl.sum(count))
    if arrives_last(counter_ptr + block, chunks):
        total = add_column_sums(column_sum_ptr, sums_ptr, chunks, columns, d, sign, COLUMNS)
        tl.store(batch_sum_ptr + columns, total.to(tl.float32), mask=inside)
        if arrives_last(counter_ptr + blocks, blocks):
            square = total_of(squares_ptr, chunks * blocks, COLUMNS)
            tl.store(square_sum_ptr, tl.load(square_sum_ptr) + sign * square)
            tl.store(batch_count_ptr, total_of(counts_ptr, chunks, COLUMNS).to(tl.float32))
