"""What every reference op does with rows: validate them, and walk them in small shifted chunks."""

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_ROWS = 256  # the one copy of rows ever made: a chunk this tall, in the accumulator's dtype


def validate_rows(
    x: Tensor,  # (..., d)
    shift: Tensor,  # (d,)
    row_mask: Tensor | None,  # (...) bool
) -> None:
    """Raise ValueError or TypeError naming the argument unless rows, shift and mask fit together."""
    if x.ndim == 0:
        raise ValueError("x: expected a tensor of rows (..., d), got a scalar")
    if not x.dtype.is_floating_point:
        raise TypeError(f"x: expected a floating-point dtype, got {x.dtype}")
    if shift.shape != x.shape[-1:]:
        raise ValueError(f"shift: expected shape {tuple(x.shape[-1:])}, got {tuple(shift.shape)}")
    if row_mask is not None:
        if row_mask.dtype != torch.bool:
            raise TypeError(f"row_mask: expected dtype torch.bool, got {row_mask.dtype}")
        if row_mask.shape != x.shape[:-1]:
            raise ValueError(f"row_mask: expected shape {tuple(x.shape[:-1])}, got {tuple(row_mask.shape)}")


def row_views(
    x: Tensor,  # (..., d)
    row_mask: Tensor | None,  # (...)
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield (n, d) views of ``x`` with their (n,) masks. Never copies, whatever the strides."""
    if x.ndim == 1:
        x, row_mask = x[None], None if row_mask is None else row_mask[None]
    try:
        rows = x.view(-1, x.shape[-1]) if x.shape[-1] else x.reshape(-1, 0)
    except RuntimeError:  # the leading dimensions do not fold into one stride
        for i in range(x.shape[0]):
            yield from row_views(x[i], None if row_mask is None else row_mask[i])
        return
    yield rows, None if row_mask is None else row_mask.reshape(-1)


def shifted_chunks(
    x: Tensor,  # (..., d) any float dtype
    shift: Tensor,  # (d,)
    row_mask: Tensor | None,  # (...) bool
    first: int = 0,
) -> Iterator[Tensor]:
    """Yield chunks (≤ ``CHUNK_ROWS``, d) of x − shift in ``shift``'s dtype.

    A masked row becomes a row of zeros: its content, NaN included, enters no arithmetic. Chunks end where they would
    if ``first`` rows came before these.
    """
    for rows, mask in row_views(x, row_mask):
        start = 0
        while start < rows.shape[0]:
            stop = start + CHUNK_ROWS - (first + start) % CHUNK_ROWS
            chunk = rows[start:stop].to(shift.dtype) - shift
            if mask is not None:
                chunk.masked_fill_(~mask[start:stop, None], 0)
            yield chunk
            start = stop


def add_totals_(
    column_sum: Tensor,  # (d,) float64
    square_sum: Tensor,  # () float64
    chunk: Tensor,  # (n, d)
    sign: float,
) -> None:
    """Add a chunk's column sums and sum of squares: short sums in its own dtype, long ones in float64."""
    column_sum.add_(chunk.sum(0), alpha=sign)
    flat = chunk.reshape(-1)
    square_sum.add_(torch.dot(flat, flat), alpha=sign)
