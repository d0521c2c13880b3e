"""A network as a grid: its repeated blocks as rows, the layers within a block as columns."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

_BLOCK = re.compile(r"^(?P<block>(?:.*?\.)?\d+)\.(?P<layer>.+)$")


@dataclass(frozen=True)
class Grid:
    """Values of layers laid out by block and by layer within the block.

    Attributes:
        rows: Block names, in order of appearance; layers outside any block stand in the row "".
        columns: Layer names within a block, in order of appearance.
        cells: (row, column) → value; absent where a block has no such layer.
    """

    rows: list[str]
    columns: list[str]
    cells: dict[tuple[str, str], float]

    @classmethod
    def of(cls, values: Mapping[str, float]) -> "Grid":
        cells = {split_name(name): value for name, value in values.items()}
        rows = list(dict.fromkeys(row for row, _ in cells))
        columns = list(dict.fromkeys(column for _, column in cells))
        return cls(rows, columns, cells)

    def text(self) -> str:
        """A plain-text table; "·" where a block has no such layer."""
        heads = short_names(self.columns)
        first = max(len(row) for row in self.rows)
        lines = [" " * first + "  " + "  ".join(heads)]
        for row in self.rows:
            entries = [self.cells.get((row, column)) for column in self.columns]
            texts = [("·" if v is None else f"{v:g}").rjust(len(h)) for v, h in zip(entries, heads, strict=True)]
            lines.append(row.ljust(first) + "  " + "  ".join(texts))
        return "\n".join(lines)


def split_name(name: str) -> tuple[str, str]:
    """A layer's block ("" outside blocks) and its name within the block."""
    match = _BLOCK.match(name)
    return (match["block"], match["layer"]) if match else ("", name)


def short_names(names: list[str]) -> list[str]:
    """Each name's shortest dotted ending that no other name has."""
    shorts = []
    for name in names:
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            short = ".".join(parts[-count:])
            if sum(other == short or other.endswith(f".{short}") for other in names) == 1:
                break
        shorts.append(short)
    return shorts
