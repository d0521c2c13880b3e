"""One-sided Jacobi in Triton: one program a matrix, half of all column pairs rotated at a time.

Why this method, and what it costs, is in this folder's README.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import launch_options

MAX_SWEEPS = 60  # 8 to 40 are enough for k = 256, by the spectrum; the limit is for NaN
TILE_BYTES = 16_384  # of the columns a program of eight warps holds at a time: its share of registers
MIN_PADDED = 64  # below, one variant for all sizes


@triton.jit(do_not_specialize=["k", "tolerance", "floor"])
def _jacobi_kernel(
    work_ptr,  # (batch, k, k): rows are the columns of A, on return of A V
    vectors_ptr,  # (batch, k, k): rows are the columns of V, on entry the identity
    k,
    tolerance: tl.float32,
    floor: tl.float32,
    PADDED: tl.constexpr,
    PAIRS: tl.constexpr,
    MAX_SWEEPS: tl.constexpr,
):
    """Rotate pairs of columns of A until all are orthogonal to within ``tolerance``.

    Columns with a squared norm up to ``floor`` are left as they are.
    """
    offset = tl.program_id(0).to(tl.int64) * k * k
    work_ptr += offset
    vectors_ptr += offset
    entries = tl.arange(0, PADDED)
    players = k + k % 2  # the last one is a bye where k is odd
    worst = tolerance * 2
    sweep = 0
    while (worst > tolerance) & (sweep < MAX_SWEEPS):
        worst = tolerance * 0
        for turn in range(players - 1):
            for first in range(0, players // 2, PAIRS):
                i = first + tl.arange(0, PAIRS)
                left = tl.where(i == 0, players - 1, (turn + i) % (players - 1))
                right = (turn - i + players - 1) % (players - 1)
                met = (i < players // 2) & (left < k) & (right < k)
                inside = met[:, None] & (entries < k)[None, :]
                left = left[:, None] * k + entries[None, :]
                right = right[:, None] * k + entries[None, :]
                a = tl.load(work_ptr + left, mask=inside, other=0.0)
                b = tl.load(work_ptr + right, mask=inside, other=0.0)
                alpha, beta, gamma = tl.sum(a * a, 1), tl.sum(b * b, 1), tl.sum(a * b, 1)
                large = (alpha > floor) & (beta > floor)
                size = tl.where(large, tl.sqrt(alpha) * tl.sqrt(beta), 1.0)
                cosine = tl.where(large, tl.abs(gamma) / size, 0.0)
                worst = tl.maximum(worst, tl.max(cosine, 0).to(tl.float32))
                turned = cosine > tolerance
                zeta = (beta - alpha) / (2 * tl.where(turned, gamma, 1.0))
                tangent = 1 / (tl.abs(zeta) + tl.sqrt(1 + zeta * zeta))
                tangent = tl.where(turned, tl.where(zeta < 0, -tangent, tangent), 0.0)
                c = 1 / tl.sqrt(1 + tangent * tangent)
                s = c * tangent
                tl.store(work_ptr + left, c[:, None] * a - s[:, None] * b, mask=inside)
                tl.store(work_ptr + right, s[:, None] * a + c[:, None] * b, mask=inside)
                a = tl.load(vectors_ptr + left, mask=inside, other=0.0)
                b = tl.load(vectors_ptr + right, mask=inside, other=0.0)
                tl.store(vectors_ptr + left, c[:, None] * a - s[:, None] * b, mask=inside)
                tl.store(vectors_ptr + right, s[:, None] * a + c[:, None] * b, mask=inside)
            tl.debug_barrier()  # the next turn pairs columns that other threads have written
        sweep += 1


def symmetric_eigen_triton(
    matrix: Tensor,  # (..., k, k)
) -> tuple[Tensor, Tensor]:  # (..., k), (..., k, k)
    k = matrix.shape[-1]
    flat = matrix.reshape(-1, k, k)
    if flat.numel() == 0:
        return matrix.new_empty(matrix.shape[:-1]), matrix.new_empty(matrix.shape)
    largest = flat.abs().amax((1, 2))
    scale = largest.where(largest > 0, 1)  # squares of entries then neither overflow nor vanish
    work = (flat / scale[:, None, None]).mT.contiguous()
    vectors = torch.eye(k, dtype=matrix.dtype, device=matrix.device).repeat(len(flat), 1, 1)
    padded = max(MIN_PADDED, triton.next_power_of_2(k))
    eps = torch.finfo(matrix.dtype).eps
    with torch.cuda.device_of(matrix):  # kernels are launched on the current device
        _jacobi_kernel[(len(flat),)](
            work, vectors, k, eps * k**0.5, eps**2,
            PADDED=padded, PAIRS=pairs_at_once(padded, matrix.element_size()), MAX_SWEEPS=MAX_SWEEPS,
            **launch_options(_jacobi_kernel, warps_of(padded)),
        )  # fmt: skip
    values, order = torch.linalg.vector_norm(work, dim=-1).sort(dim=-1, descending=True)
    vectors = vectors.gather(1, order[:, :, None].expand_as(vectors)).mT
    return (values * scale[:, None]).reshape(matrix.shape[:-1]), vectors.reshape(matrix.shape)


def warps_of(padded: int) -> int:
    """Of a program. The smallest matrices have too few pairs of columns for eight."""
    return 8 if padded > MIN_PADDED else 4


def pairs_at_once(padded: int, itemsize: int) -> int:
    """Pairs of columns in a tile: a power of two, no more than there are and no more than registers hold.

    Of the smallest matrices a quarter: with more some compilers spill.
    """
    return min(padded // 2, TILE_BYTES // (1 if padded > MIN_PADDED else 4) // (padded * itemsize))
