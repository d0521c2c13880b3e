"""The way to convergence, as a pass records it and a report draws it."""

from dataclasses import dataclass, field

__all__ = ["Trace"]


@dataclass
class Trace:
    """The way to convergence: one entry in every list per batch after which statistics were refreshed.

    Attributes:
        batch: Batches seen by then.
        rows: Unmasked rows (tokens) seen by then.
        agreement: Per layer, how far the components it would be given agree with those of its refresh
            before: the share of the subspace that is the same, or the smallest ``|cosine|`` of a component under
            the "component" criterion. A number in [0, 1], to be compared with tau; None before a layer's
            second refresh.
        converged: Per layer, 1 where it had converged.
    """

    batch: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    agreement: list[list[float | None]] = field(default_factory=list)
    converged: list[list[int]] = field(default_factory=list)

    def record(self, batch: int, rows: int, agreement: list[float | None], converged: list[int]) -> None:
        """Add the entry of a batch, or bring it up to date."""
        if self.batch and self.batch[-1] == batch:
            for entries in (self.batch, self.rows, self.agreement, self.converged):
                entries.pop()
        self.batch.append(batch)
        self.rows.append(rows)
        self.agreement.append([None if value is None else round(value, 6) for value in agreement])
        self.converged.append(converged)
