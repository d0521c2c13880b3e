"""The Gram update in plain PyTorch: the specification, on any device and in float64 too."""

from torch import Tensor

from .._rows import add_totals_, shifted_chunks


def gram_reference(
    gram: Tensor,  # (d, d)
    column_sum: Tensor,  # (d,) float64
    square_sum: Tensor,  # () float64
    x: Tensor,  # (..., d)
    shift: Tensor,  # (d,)
    row_mask: Tensor | None,  # (...)
    sign: float,
) -> None:
    for chunk in shifted_chunks(x, shift, row_mask):
        gram.addmm_(chunk.T, chunk, alpha=sign)
        add_totals_(column_sum, square_sum, chunk, sign)
