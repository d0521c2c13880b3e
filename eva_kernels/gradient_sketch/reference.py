"""Sums of outer products and projections of rows in plain PyTorch: the specification, on any device and in float64."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .._rows import CHUNK_ROWS


def outer_reference(
    product: Tensor,  # (a, q)
    rows: Tensor,  # (..., a)
    weights: Tensor,  # (..., q)
    row_mask: Tensor | None,  # (...)
) -> None:
    for left, right in _chunks([rows, weights], row_mask, product.dtype):
        product.addmm_(left.T, right)


def projected_reference(
    rows: Tensor,  # (..., a)
    basis: Tensor,  # (a, q)
    row_mask: Tensor | None,  # (...)
    dtype: torch.dtype,
) -> Tensor:  # (rows, q)
    basis = basis.to(dtype)
    pieces = [chunk @ basis for (chunk,) in _chunks([rows], row_mask, dtype)]
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def _chunks(tensors: list[Tensor], row_mask: Tensor | None, dtype: torch.dtype) -> Iterator[list[Tensor]]:
    """The same rows of each, in a dtype: all at once where that copies nothing, else a chunk at a time.

    A masked row becomes a row of zeros: its content, NaN included, enters no arithmetic.
    """
    flat = [x.reshape(-1, x.shape[-1]) for x in tensors]
    mask = None if row_mask is None else row_mask.reshape(-1, 1)
    if mask is None and all(x.dtype == dtype for x in flat):
        yield flat
        return
    for start in range(0, max(len(flat[0]), 1), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        chunk = [x[part].to(dtype) for x in flat]
        yield chunk if mask is None else [x.masked_fill(~mask[part], 0) for x in chunk]
