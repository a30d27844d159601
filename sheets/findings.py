"""What was found in a sheet's rows: on the disk until every row was read, then counted and given back row by row."""

import pickle
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from sheets.samples import RowProblem

_AT_A_TIME = 1000  # rows that are in memory
_FIRST = 100  # rows of a kind that are kept to be shown


class FoundRow(NamedTuple):
    """A row of a sheet: as it stands there, what it was read as, what is wrong with it."""

    number: int
    product_id: str
    cells: Sequence[str]
    text: str
    label: str  # as it is written
    read: str
    photos: tuple[str, ...]
    problems: list[str]


class RowFile:
    """The rows of a sheet in a file without a name, which is gone with this object."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._file, self._waiting = tempfile.TemporaryFile(dir=folder), []

    def add(self, row: FoundRow) -> None:
        """Put a row behind the others."""
        self._waiting.append(tuple(row))
        if len(self._waiting) == _AT_A_TIME:
            pickle.dump(self._waiting, self._file)
            self._waiting.clear()

    def __iter__(self) -> Iterator[FoundRow]:
        """Give the rows back in their order."""
        end = self._file.tell()
        self._file.seek(0)
        while self._file.tell() < end:
            yield from (FoundRow(*row) for row in pickle.load(self._file))
        yield from (FoundRow(*row) for row in self._waiting)


@dataclass
class Kind:
    """A kind of problem: how many rows have it, how many of these are left out, the first of them with their own."""

    rows: int = 0
    lost: int = 0
    first: list[tuple[FoundRow, list[RowProblem]]] = field(default_factory=list)


class Tally:
    """The kinds of problem of a sheet, counted row by row."""

    def __init__(self) -> None:
        self.lost = 0  # rows left out
        self._kinds: dict[str, Kind] = {}

    def add(self, row: FoundRow, problems: Sequence[RowProblem]) -> None:
        """Count a row with all its problems."""
        of_kind: dict[str, list[RowProblem]] = {}
        for problem in problems:
            of_kind.setdefault(problem.kind, []).append(problem)
        lost = any(not problem.used for problem in problems)
        self.lost += lost
        for name, mine in of_kind.items():
            kind = self._kinds.setdefault(name, Kind())
            kind.rows += 1
            kind.lost += lost
            if len(kind.first) < _FIRST:
                kind.first.append((row, mine))

    def worst_first(self) -> dict[str, Kind]:
        """List the kinds, those that cost most rows first, then the commonest."""
        return dict(sorted(self._kinds.items(), key=lambda item: (-item[1].lost, -item[1].rows)))
