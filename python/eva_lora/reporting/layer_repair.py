"""What a fit of the quantisation error has repaired in one layer."""

from dataclasses import dataclass

__all__ = ["LayerRepair", "Pair"]

Pair = tuple[float, float]  # without and with the fit


@dataclass(frozen=True)
class LayerRepair:
    """One layer. Errors are E‖(W − what the layer computes with) x‖² over E‖W x‖²: without and with the fit.

    Attributes:
        rank: The rank it has now.
        configured_rank: The rank it was configured with.
        repaired: How many of its directions repair.
        weight_error: ‖W − Q‖ / ‖W‖ of the quantised base.
        fitted: On the rows of the fit, as far as the statistics know them.
        held: On rows that were held back, exactly. None where there were none.
    """

    rank: int
    configured_rank: int
    repaired: int
    weight_error: float
    fitted: Pair
    held: Pair | None = None
