"""A journal of work done row by row: a run that is killed takes it up where it stopped. No torch."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sheets.samples import DataError


class Journal:
    """JSON lines on the disk: first what the results depend on, then one line a row.

    Opening it again gives the rows done so far; a line that a kill cut short counts as not written.
    """

    def __init__(self, path: Path, made_with: Mapping[str, Any]):
        self.path = path
        self.done: dict[int, dict[str, Any]] = {}
        head = json.dumps(made_with, sort_keys=True)
        lines = self._whole_lines()
        if lines and lines[0] != head:
            raise DataError(f"{path}: the rows done in there were made with another sheet, model or options; finish "
                            "that run with its own, or delete the file to start anew")
        for line in lines[1:]:
            entry = json.loads(line)
            self.done[entry["row"]] = entry["line"]
        self._file = path.open("a", encoding="utf-8")
        if not lines:
            self._write([head])

    def add(self, lines: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
        """Note rows as done; they are on the disk when this returns."""
        lines = list(lines)
        self._write([json.dumps({"row": row, "line": line}) for row, line in lines])
        self.done.update({row: dict(line) for row, line in lines})

    def finish(self) -> None:
        """Remove the journal: its rows are safe elsewhere."""
        self._file.close()
        self.path.unlink()

    def _write(self, lines: list[str]) -> None:
        self._file.write("".join(line + "\n" for line in lines))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _whole_lines(self) -> list[str]:
        if not self.path.is_file():
            return []
        content = self.path.read_bytes()
        whole = content[:content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        return whole.decode("utf-8").splitlines()
