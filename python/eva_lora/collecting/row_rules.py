"""Which rows of each layer's inputs counted, and by which rule: what a pass has to say of its masks."""

import warnings
from collections.abc import Iterable

from .batches import ALL_ROWS, FITS_NO_MASK, RowMask

__all__ = ["RowRules"]


class RowRules:
    """What masks did to the rows of each layer, over all batches.

    Attributes:
        rules: Layer → what its rows were chosen by.
        sides: Layer of an encoder–decoder model → which side its rows are of.
        skipped: Layer → rows left out for NaN or Inf; layers that share an input: the first of them.
    """

    def __init__(self) -> None:
        self.rules: dict[str, set[str]] = {}
        self.sides: dict[str, str] = {}
        self.skipped: dict[str, int] = {}

    def take(self, mask: RowMask, inputs: Iterable[list[str]]) -> None:
        """What a batch's mask found out; ``inputs``: the layers of each distinct input."""
        for name, rule in mask.rules.items():
            self.rules.setdefault(name, set()).add(rule)
        for names in inputs:
            if len(names) == 1:
                continue
            # What the first layer fed by an input found out holds for the others.
            rules = set[str]().union(*(self.rules.get(name, ()) for name in names))
            self.rules.update({name: set(rules) for name in names})
            side = next((self.sides[name] for name in names if name in self.sides), None)
            if side is not None:
                self.sides.update(dict.fromkeys(names, side))
        for name, count in mask.skipped.items():
            self.skipped[name] = self.skipped.get(name, 0) + count

    def said_of(self, name: str) -> str:
        """The rules that chose a layer's rows, as text."""
        rules = self.rules.get(name, set())
        return "; ".join(sorted(rules - {ALL_ROWS} or rules))

    def warn(self, stacklevel: int) -> None:
        """Say it where rows fit no mask of their batch and all of them counted."""
        astray = [name for name, rules in self.rules.items() if FITS_NO_MASK in rules]
        if astray:
            warnings.warn(
                f"the inputs of {len(astray)} layers, the first is {astray[0]}, have rows that fit no mask of the "
                "batch; all of their rows counted, padding included; see report.statistic[name]['rows']",
                stacklevel=stacklevel + 1,
            )
