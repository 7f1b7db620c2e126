"""How text is laid out on a terminal of any width: prose, and figures as a table or, where it is narrow, as lists."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.cells import cell_len, chop_cells
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from bert_evaluation.report.writing import HUMP, STEP, clean

WORD = re.compile(r"\S+\s*|\s+")
GAP = 2  # cells between columns


def text(value: str, style: str = "") -> Text:
    """Text shown as it is: no markup in it is obeyed, no control character reaches the terminal."""
    return Text(clean(value).replace("\t", " "), style)


class Prose:
    """Text that breaks between words and between the steps of a composed name, within a step that alone is too long.

    Lines after the first are set in by `hang`.
    """

    def __init__(self, content: Text, hang: int = 0) -> None:
        self.content = content
        self.hang = hang

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        hang = 0
        for line in self.content.split("\n", allow_blank=True):
            for part in line.divide(_ends(line.plain, options.max_width - hang, options.max_width - self.hang)):
                part.rstrip()
                shown = Text(" " * hang) + part
                shown.no_wrap, shown.overflow = True, "crop"
                yield shown
                hang = self.hang

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(self.hang + 1, widest(self.content))


def widest(content: Text) -> int:
    """How many cells the widest line takes."""
    return max(cell_len(line) for line in content.plain.split("\n"))


def _ends(line: str, first: int, width: int) -> list[int]:
    """Where a line is broken, so that its first part is no wider than `first` cells and the others than `width`."""
    ends, at, used, room = [], 0, 0, max(first, 1)

    def add(piece: str) -> None:
        nonlocal at, used, room
        if used and used + cell_len(piece.rstrip()) > room:
            ends.append(at)
            used, room = 0, max(width, 1)
        at += len(piece)
        used += cell_len(piece)

    for step in (step for word in WORD.findall(line) for step in STEP.split(word)):
        size = cell_len(step.rstrip())
        if size <= max(width, 1) or (not used and size <= room):
            add(step)
            continue
        if used:
            ends.append(at)
            used, room = 0, max(width, 1)
        for part in HUMP.split(step):
            for piece in [part] if cell_len(part.rstrip()) <= room else chop_cells(part, min(room, max(width, 1))):
                add(piece)
    return ends


@dataclass(frozen=True)
class Column:
    """A column of figures. One with a `least` width gives way down to it where the others need room.

    Its lines after the first are then set in by `hang`.
    """

    title: str
    justify: Literal["left", "right"] = "left"
    least: int = 0
    hang: int = 0

    @property
    def wraps(self) -> bool:
        """Whether it gives way."""
        return self.least > 0


@dataclass(frozen=True)
class Figures:
    """Rows of figures, the first column being what they are about; columns of which all cells are empty are left out.

    Where even its narrowest form does not fit, there is a list for each row instead of the table. `spaced` puts a line
    between rows that have several.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[Text]]
    spaced: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        used = [place for place in range(len(self.columns)) if any(row[place] for row in self.rows)]
        needed = [min(self._width(place), self.columns[place].least or self._width(place)) for place in used]
        if sum(needed) + GAP * (len(used) - 1) <= options.max_width:
            yield self._table(used)
        else:
            yield from self._lists(used)

    def _table(self, used: Sequence[int]) -> Table:
        table = Table(
            box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), leading=int(self.spaced),
            header_style="bold", border_style="dim",
        )  # fmt: skip
        for place in used:
            column = self.columns[place]
            least = None if column.wraps else self._width(place)
            table.add_column(column.title, justify=column.justify, no_wrap=not column.wraps, min_width=least)
        for row in self.rows:
            cells = [(self.columns[place], row[place]) for place in used]
            table.add_row(*(Prose(cell, column.hang) if column.wraps else cell for column, cell in cells))
        return table

    def _width(self, place: int) -> int:
        return max(widest(cell) for cell in (Text(self.columns[place].title), *(row[place] for row in self.rows)))

    def _lists(self, used: Sequence[int]) -> Iterator[RenderableType]:
        for row in self.rows:
            title = row[used[0]].copy()
            title.stylize("bold")
            yield Prose(title)
            parts = [
                (self.columns[place].title.replace("\n", " ").strip(), row[place]) for place in used[1:] if row[place]
            ]
            yield Padding(labelled(parts), (0, 0, int(self.spaced), 2))


def labelled(parts: Sequence[tuple[str, Text]]) -> Table:
    """Texts beside their labels."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    for label, content in parts:
        grid.add_row(label, Prose(content))
    return grid
