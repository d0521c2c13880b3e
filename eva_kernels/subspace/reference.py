"""The subspace product in plain PyTorch: the specification, on any device and in float64 too."""

from torch import Tensor

from .._rows import add_totals_, shifted_chunks


def subspace_reference(
    product: Tensor,  # (d, q)
    column_sum: Tensor,  # (d,) float64
    square_sum: Tensor,  # () float64
    x: Tensor,  # (..., d)
    basis: Tensor,  # (d, q)
    shift: Tensor,  # (d,)
    row_mask: Tensor | None,  # (...)
    sign: float,
) -> None:
    for chunk in shifted_chunks(x, shift, row_mask):
        product.addmm_(chunk.T, chunk @ basis, alpha=sign)
        add_totals_(column_sum, square_sum, chunk, sign)
