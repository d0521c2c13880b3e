"""Adding rows to a count sketch: every row, with its sign, to one of q sums."""

import torch
from torch import Tensor

from .._build import use_core
from .._memory import address, readable
from .._rows import CHUNK_ROWS, row_views, shifted_chunks


def count_sketch_reference(
    sums: Tensor,  # (q, d)
    tally: Tensor,  # (q, 1)
    total: Tensor,  # (d,) float64
    x: Tensor,  # (..., d)
    signs: Tensor,  # (n, 1) in sums' dtype, 0 where a row is masked
    row_mask: Tensor | None,  # (...) bool
    first: int,
) -> None:
    """In plain PyTorch: the specification.

    Row i of a chunk of ``CHUNK_ROWS`` goes to sum i mod q; the first chunk is what ``first`` rows before these leave
    of one.
    """
    row, columns = 0, len(sums)
    for chunk in shifted_chunks(x, sums.new_zeros(x.shape[-1]), row_mask, first):
        total.add_(chunk.sum(0))
        column = 0 if row else first % CHUNK_ROWS % columns  # every chunk begins anew, but one can be cut
        while len(chunk):
            part, chunk = chunk[: columns - column], chunk[columns - column :]
            sign = signs[row : row + len(part)]
            sums[column : column + len(part)].addcmul_(part, sign)
            tally[column : column + len(part)] += sign
            row, column = row + len(part), 0


def count_sketch_core(
    sums: Tensor,  # (q, d) float32
    tally: Tensor,  # (q, 1) float32
    total: Tensor,  # (d,) float64
    x: Tensor,  # (..., d) bfloat16 or float32
    signs: Tensor,  # (n, 1) float32
    row_mask: Tensor | None,  # (...) bool
    first: int,
) -> None:
    """The same on a CPU, in one reading of the rows: csrc/cpu/sketch_form.h. ``total`` may round otherwise."""
    core, row, (q, d) = use_core("core"), 0, sums.shape
    dtype = torch.float32 if x.dtype == torch.float32 else torch.bfloat16
    for rows, mask in row_views(x, row_mask):
        rows, n = readable(rows), rows.shape[0]
        mask = None if mask is None else mask.contiguous()
        core.sketch(
            x=address("x", rows, dtype, (n, d), rows_apart=True), is_float32=dtype == torch.float32, n=n, d=d,
            row_stride=rows.stride(0), mask=0 if mask is None else address("row_mask", mask, torch.bool, (n,)),
            signs=address("signs", signs[row : row + n], torch.float32, (n, 1)),
            chunk_rows=CHUNK_ROWS, before=first % CHUNK_ROWS, column=0 if row else first % CHUNK_ROWS % q,
            q=q, sums=address("sums", sums, torch.float32, (q, d)),
            tally=address("tally", tally, torch.float32, (q, 1)), total=address("total", total, torch.float64, (d,)),
            threads=torch.get_num_threads(),
        )  # fmt: skip
        row += n
