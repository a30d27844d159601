"""Files and folders written whole or not at all: under another name first, which is changed when all of it is there."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

PARTIAL = ".partial"


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give the name of a file to write, which takes its own name when the block ends well and is gone otherwise."""
    final = Path(path)
    partial = final.with_name(f"{final.name}.{os.getpid()}{PARTIAL}")
    try:
        yield partial
        partial.replace(final)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8; half of a surrogate pair, which UTF-8 can't hold, becomes a ?."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=1))


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """Give a folder to fill, which takes its name when the block ends well and every file is on the disk.

    An error in the block leaves nothing behind.
    """
    partial, replaced = (final.with_name(final.name + ending) for ending in (PARTIAL, ".replaced"))
    for path in (partial, replaced):
        shutil.rmtree(path, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in sorted(partial.rglob("*")):
            _sync(path)
        _sync(partial)
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
    _sync(final.parent)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Raise OSError for what safetensors and torch raise instead when the disk takes no more."""
    try:
        yield
    except SafetensorError as problem:
        raise OSError(str(problem)) from problem
    except RuntimeError as problem:
        if "inline_container" not in str(problem):  # the writer of torch.save
            raise
        raise OSError(f"a file could be written in part only: {problem}") from problem


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
