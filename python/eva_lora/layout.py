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
        cells = {}
        for name, value in values.items():
            match = _BLOCK.match(name)
            cells[(match["block"], match["layer"]) if match else ("", name)] = value
        rows = list(dict.fromkeys(row for row, _ in cells))
        columns = list(dict.fromkeys(column for _, column in cells))
        return cls(rows, columns, cells)

    def text(self) -> str:
        """A plain-text table; "·" where a block has no such layer."""
        heads = [column.rpartition(".")[2] for column in self.columns]
        if len(set(heads)) < len(heads):
            heads = self.columns
        first = max(len(row) for row in self.rows)
        lines = [" " * first + "  " + "  ".join(heads)]
        for row in self.rows:
            entries = [self.cells.get((row, column)) for column in self.columns]
            texts = [("·" if v is None else f"{v:g}").rjust(len(h)) for v, h in zip(entries, heads, strict=True)]
            lines.append(row.ljust(first) + "  " + "  ".join(texts))
        return "\n".join(lines)
