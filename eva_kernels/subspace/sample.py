"""What rows are multiplied with, batch after batch."""

from collections.abc import Hashable
from typing import Any

from torch import Tensor


class Sample:
    """A basis and the shift of the rows that it is multiplied with; neither may be written to from then on.

    Args:
        basis: (d, q) float32 or float64.
        shift: (d,), the same dtype.

    Attributes:
        operands: What kernels have made of the two, by what decides it: made once, not once a batch.
    """

    def __init__(self, basis: Tensor, shift: Tensor) -> None:
        self.basis, self.shift = basis, shift.contiguous()
        self.operands: dict[Hashable, Any] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that the operands hold."""
        return sum(int(operand.nbytes) for operand in self.operands.values())
