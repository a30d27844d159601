"""What every kind of sheet is read into: rows of text cells with their numbers; and what is said of a sheet."""

import json
from functools import lru_cache
from typing import Any

from loguru import logger

from ground.errors import UserError

Row = tuple[int, list[str]]  # a row's number and its cells, without outer blanks


class DataError(UserError):
    """A sheet that can't be used; the text says why and what to do."""


def as_text(value: Any) -> str:
    """Write a cell's value as text without outer blanks: 12 for 12.0, "" for nothing, JSON for lists and objects."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False, default=str)
    if isinstance(value, bytes):  # some write texts so into .parquet
        return value.decode("utf-8", "backslashreplace").strip()
    return "" if value is None else str(value)


@lru_cache(maxsize=1000)
def say_once(level: str, message: str) -> None:
    """Log a message once, however often the table is read."""
    logger.log(level, message)
