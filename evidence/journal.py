"""A journal of work done piece by piece: a run that is killed takes it up where it stopped. No torch."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sheets.cells import DataError


class Journal:
    """JSON lines on the disk: first what the results depend on, then one line a piece: a row, or a model's row.

    Opening it again gives what is done so far; a line that a kill cut short counts as not written.
    """

    def __init__(self, path: Path, made_with: Mapping[str, Any]):
        self.path = path
        self.done: dict[int | str, dict[str, Any]] = {}
        head = json.dumps(made_with, sort_keys=True)
        lines = self._whole_lines()
        if len(lines) < 2:  # nothing is done in it
            path.unlink(missing_ok=True)
            lines = []
        if lines and lines[0] != head:
            raise DataError(f"{path}: what is done in there was made with another sheet, model or options; finish "
                            "that run with its own, or delete the file to start anew")
        for line in lines[1:]:
            entry = json.loads(line)
            self.done[entry["row"]] = entry["line"]
        self._head = [] if lines else [head]  # still to be written: with the first piece

    def add(self, lines: Iterable[tuple[int | str, Mapping[str, Any]]]) -> None:
        """Note pieces as done; they are on the disk when this returns."""
        lines = list(lines)
        self._write(self._head + [json.dumps({"row": row, "line": line}) for row, line in lines])
        self._head = []
        self.done.update({row: dict(line) for row, line in lines})

    def finish(self) -> None:
        """Remove the journal: what it holds is safe elsewhere."""
        self.path.unlink(missing_ok=True)

    def _write(self, lines: list[str]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(line + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())

    def _whole_lines(self) -> list[str]:
        if not self.path.is_file():
            return []
        content = self.path.read_bytes()
        whole = content[:content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        return whole.decode("utf-8").splitlines()


def weights_of(path: str | Path) -> list[list[Any]]:
    """Tell a model from others: name, size and time of its files with weights and options, none for a hub name."""
    path = Path(path)
    files = sorted([*path.glob("*.safetensors"), *path.glob("*.yaml")]) if path.is_dir() else \
        [path] if path.is_file() else []
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
