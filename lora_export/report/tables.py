"""Tables as text cells, so that every renderer shows the same numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lora_export.report import format as fmt
from lora_export.verdict import Verdict


@dataclass(frozen=True)
class Cell:
    """Text with a note (a limit, a description), a verdict or a bar (0 to 1 of the column's width) to go with it."""

    text: str
    note: str = ""
    verdict: Verdict | None = None
    bar: float | None = None


@dataclass(frozen=True)
class Column:
    """A heading; `wide` columns are left out where width is scarce."""

    title: str
    numeric: bool = True
    wide: bool = False


@dataclass(frozen=True)
class TableRow:
    cells: tuple[Cell, ...]
    group: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of one group stand together; the first cell of a row names it."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[TableRow, ...]

    def groups(self) -> dict[str, list[TableRow]]:
        """Rows by group heading, in order of first appearance."""
        found: dict[str, list[TableRow]] = {}
        for row in self.rows:
            found.setdefault(row.group, []).append(row)
        return found

    def keep(self, columns: list[int]) -> Table:
        rows = tuple(replace(row, cells=tuple(row.cells[i] for i in columns)) for row in self.rows)
        return replace(self, columns=tuple(self.columns[i] for i in columns), rows=rows)

    def filled(self) -> Table:
        """Without the columns that say nothing in any row."""
        filled = [i for i in range(len(self.columns)) if any(row.cells[i].text != fmt.MISSING for row in self.rows)]
        return self.keep(filled)

    def narrow(self) -> Table:
        return self.keep([i for i, column in enumerate(self.columns) if not column.wide])


def verdict_cell(verdict: Verdict) -> Cell:
    return Cell(str(verdict), verdict=verdict)


def fraction(size: float, most: float) -> float | None:
    """The length of a bar; none for what is no size."""
    return size / most if 0 <= size <= most and most > 0 else None
