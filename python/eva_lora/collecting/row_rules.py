"""Which rows of each layer's inputs counted, and by which rule: what a pass has to say of its masks."""

import warnings
from collections.abc import Iterable

from .masks import UNKNOWN
from .rows import ALL_ROWS, ASSUMED, FITS_NO_MASK, IN_NO_KNOWN_ORDER, SQUARE, UNSEEN, RowMask, RowMemory

__all__ = ["RowRules"]


class RowRules:
    """What masks did to the rows of each layer, over all batches.

    Attributes:
        rules: Layer → what its rows were chosen by.
        memory: What batches told of rows and masks, for later ones.
        skipped: Layer → rows left out for NaN or Inf; layers that share an input: the first of them.
    """

    def __init__(self) -> None:
        self.rules: dict[str, set[str]] = {}
        self.memory = RowMemory()
        self.skipped: dict[str, int] = {}

    def take(self, mask: RowMask, inputs: Iterable[list[str]]) -> None:
        """What a batch's mask found out; ``inputs``: the layers of each distinct input."""
        for name, rules in mask.rules.items():
            self.rules.setdefault(name, set()).update(rules)
        for names in inputs:
            if len(names) == 1:
                continue
            # What the first layer fed by an input found out holds for the others.
            rules = set[str]().union(*(self.rules.get(name, ()) for name in names))
            self.rules.update({name: set(rules) for name in names})
            self.memory.hand_on(names)
        for name, count in mask.skipped.items():
            self.skipped[name] = self.skipped.get(name, 0) + count

    def said_of(self, name: str) -> str:
        """The rules that chose a layer's rows, as text."""
        rules = self.rules.get(name, set())
        if self.memory.layouts.get(name) != SQUARE:  # a later batch has shown that it was right
            rules = {rule.removesuffix(ASSUMED) for rule in rules}
        return "; ".join(sorted(rules - {ALL_ROWS} or rules))

    def warn(self, stacklevel: int) -> None:
        """Say it where rows were counted, or left out, of which no batch said for certain that they should be."""
        astray = [name for name, rules in self.rules.items() if FITS_NO_MASK in rules]
        if astray:
            warnings.warn(
                f"the inputs of {len(astray)} layers, the first is {astray[0]}, have rows that fit no mask of the "
                "batch; all of their rows counted, padding included; see report.statistic[name]['rows']",
                stacklevel=stacklevel + 1,
            )
        unordered = [name for name, rules in self.rules.items() if IN_NO_KNOWN_ORDER in rules]
        if unordered:
            warnings.warn(
                f"the inputs of {len(unordered)} layers, the first is {unordered[0]}, have one row per token, in an "
                "order that was not seen; all of their rows counted, padding included; see "
                "report.statistic[name]['rows']",
                stacklevel=stacklevel + 1,
            )
        unseen = [name for name, rules in self.rules.items() if any(UNSEEN in rule for rule in rules)]
        if unseen:
            warnings.warn(
                f"the inputs of {len(unseen)} layers, the first is {unseen[0]}, have as many rows as the batch has "
                "tokens and were masked as these; that they are none of what else is in the batch was not seen; see "
                "report.statistic[name]['rows']",
                stacklevel=stacklevel + 1,
            )
        unknown = sorted({rule for rules in self.rules.values() for rule in rules if rule.startswith(UNKNOWN)})
        if unknown:
            warnings.warn(
                f"all rows counted, padding included: it is not known what is meant by "
                f"{', '.join(rule.removeprefix(UNKNOWN).strip() for rule in unknown)}; name it attention_mask, or pass "
                "row_mask_fn",
                stacklevel=stacklevel + 1,
            )
        square = [name for name in self.rules if self.memory.layouts.get(name) == SQUARE]
        if square:
            warnings.warn(
                f"the masks of {len(square)} layers, the first is {square[0]}, were read as (batch, tokens), but every "
                "batch had as many sequences as tokens, where (tokens, batch) looks the same; let them differ in one",
                stacklevel=stacklevel + 1,
            )
