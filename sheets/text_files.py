"""Text files (.csv, .tsv, .jsonl, .json) -> rows of text with their numbers.

pandas reads none of them, since it would read wrong in silence what is refused or kept here. pd.read_csv takes text
behind a closing quote for part of the field, or, with its Python engine and a rule for long rows, drops such a row; and
it refuses a row with empty fields at its end. pd.read_json makes 1.2345678901234568e+17 of an id of 18 digits in a
column with a gap, loses blank lines, so that every later row has a wrong number, and names no line in its errors.
"""

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from config import SheetOptions
from sheets.cells import DataError, Row, as_text, say_once
from sheets.encodings import likely_encodings

_LONGEST_CELL = 10_000_000  # characters
_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
         (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_LOOKED_AT = 2 ** 16  # bytes that a guess is made from
# Excel obeys such a first line and shows the next one as row 1.
_TOLD = re.compile(r"""\ufeff?"?sep=([^\w\r\n"])"?[,;\t ]*[\r\n]*""", re.IGNORECASE)

_Objects = Iterable[tuple[int, dict[str, Any]]]


def read_csv(path: Path, options: SheetOptions) -> Iterator[Row]:
    """Read every row of a .csv, whose first line tells what its fields are parted by, or of a .tsv.

    A first line such as sep=; is Excel's and no row. Raises DataError when it can't be read for certain.
    """
    csv.field_size_limit(_LONGEST_CELL)
    encoding = options.encoding or guess_encoding(path)
    width = None
    try:
        with path.open(encoding=encoding, newline="") as file:
            first_line = file.readline()
            told = _TOLD.fullmatch(first_line)
            separator = told[1] if told else "\t" if path.suffix.lower() == ".tsv" else _separator(path, first_line)
            if not told:
                file.seek(0)
            reader = csv.reader(file, delimiter=separator, strict=True)
            for number, cells in enumerate(reader, start=1):
                cells = [cell.strip() for cell in cells]
                width = width or len(cells)
                if any(cells[width:]):
                    raise DataError(f"{path}: is no well-formed CSV: row {number}, line {reader.line_num + bool(told)} "
                                    f"has {len(cells)} fields, the first row {width}. Put a field with commas or line "
                                    "breaks in double quotes, or save it as .xlsx")
                yield number, cells[:width]
    except (UnicodeError, LookupError) as error:  # a UTF-16 without its mark is no UnicodeDecodeError
        raise DataError(f"{path}: can't be read as {encoding} ({error}). Say its encoding with --encoding, or save it "
                        "as 'CSV UTF-8' or .xlsx") from error
    except csv.Error as error:
        raise DataError(f"{path}: is no well-formed CSV: {error}. Put a field with commas or line breaks in double "
                        "quotes, or save it as .xlsx") from error


def _separator(path: Path, first_line: str) -> str:
    separator = max(",;\t", key=first_line.count)
    if separator != ",":
        say_once("INFO", f"{path}: its first line is cut at {separator!r}, so every line is")
    return separator


def guess_encoding(path: Path) -> str:
    """Tell a text file's encoding by its mark, or UTF-8 where it is that throughout; else guess, and say so.

    Raises DataError when nothing fits, or several that read otherwise.
    """
    with path.open("rb") as file:
        start = file.read(_LOOKED_AT)
        for mark, encoding in _BOMS:
            if start.startswith(mark):
                return encoding
        if b"\0" in start:
            return _utf_16(path, start)
        file.seek(0)
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            while chunk := file.read(2 ** 20):
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
            return "utf-8"
        except UnicodeDecodeError:
            file.seek(0)
            sample = b""
            for line in file:
                sample += b"" if line.isascii() else line
                if len(sample) >= _LOOKED_AT:
                    break
    found = likely_encodings(sample)
    if not found:
        raise DataError(f"{path}: {_damage(sample) or 'is not UTF-8 and in no encoding that could be guessed'}. Say it "
                        "with --encoding, or save the file as 'CSV UTF-8' or .xlsx")
    lines = zip(*(sample.decode(encoding).split("\n") for encoding in found[:2]), strict=True)
    shown = _shown(next(readings for readings in lines if len(readings) == 1 or len(set(readings)) > 1))
    if len(found) > 1:
        raise DataError(f"{path}: is not UTF-8 and may be in {found[0]}: {shown[0]} or in {found[1]}: {shown[1]}. Say "
                        "which with --encoding, or save the file as 'CSV UTF-8' or .xlsx")
    _say_guess(path, found[0], shown[0])
    return found[0]


def _shown(readings: Sequence[str]) -> list[str]:
    """Cut the readings of a line to where they differ, or to what is not ASCII in a single one."""
    places = (place for place, signs in enumerate(zip(*readings, strict=False))
              if len(set(signs)) > 1 or len(signs) == 1 and not signs[0].isascii())
    start = max(0, next(places, 0) - 40)
    return [repr(reading[start:start + 80].strip()) for reading in readings]


def _damage(sample: bytes) -> str:
    """Say where a text that is UTF-8 for the greater part is not."""
    lines = [line for line in sample.decode("utf-8", "replace").split("\n") if "\ufffd" in line]
    others = sum(sign > "\x7f" for sign in sample.decode("utf-8", "ignore"))
    broken = f"is UTF-8 with {len(lines)} damaged lines, the first of them {lines[0].strip()[:80]!r}" if lines else ""
    return broken if others > 4 * sum(line.count("\ufffd") for line in lines) else ""


def _utf_16(path: Path, start: bytes) -> str:
    """Tell the order of UTF-16's bytes by where those of ASCII are zero."""
    encoding = "utf-16-le" if start[1::2].count(0) > start[::2].count(0) else "utf-16-be"
    text = codecs.getincrementaldecoder(encoding)("replace").decode(start)
    if "\0" in text or "\ufffd" in text:
        raise DataError(f"{path}: holds zero bytes, and is no text in UTF-16. Save it as 'CSV UTF-8' or .xlsx")
    lines = text.split("\n")
    _say_guess(path, encoding, *_shown([next((line for line in lines if not line.isascii()), lines[0])]))
    return encoding


def _say_guess(path: Path, encoding: str, line: str) -> None:
    say_once("WARNING", f"{path}: is not UTF-8; read as {encoding}, which is a guess: a line of it reads {line}. Say "
                        "another with --encoding")


def read_jsonl(path: Path, options: SheetOptions) -> Iterator[Row]:
    """Read one JSON object a line; the header is made of all keys, in order of appearance."""
    return _rows(lambda: _json_lines(path, options))  # the file is read twice, and never as a whole


def read_json(path: Path, options: SheetOptions) -> Iterator[Row]:
    """Read a JSON list of objects: the first is row 1; the header is made of all keys, in order of appearance."""
    objects = list(_json_list(path, options))
    return _rows(lambda: objects)


def _rows(objects: Callable[[], _Objects]) -> Iterator[Row]:
    header: dict[str, int] = {}
    for _, found in objects():
        for key in found:
            header.setdefault(key.strip(), len(header))
    yield 0, list(header)
    for number, found in objects():
        cells = [""] * len(header)
        for key, value in found.items():
            cells[header[key.strip()]] = as_text(value)
        yield number, cells


def _json_lines(path: Path, options: SheetOptions) -> _Objects:
    with _decoded(path, options) as encoding, path.open(encoding=encoding) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except (ValueError, RecursionError) as error:  # an integer may also be longer than Python converts
                raise DataError(f"{path}: line {number} is no JSON object: {error}. Each line must be one") from error
            yield number, _object(f"{path}: line {number}", found)


def _json_list(path: Path, options: SheetOptions) -> _Objects:
    with _decoded(path, options) as encoding:
        text = path.read_text(encoding)
    try:
        found = json.loads(text or "[]")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is no JSON: {error}. It must be one list of objects; a file with an object a line is "
                        ".jsonl") from error
    if not isinstance(found, list):
        raise DataError(f"{path}: is no list of JSON objects. Put [ ] around them, or save each on a line as .jsonl")
    return [(number, _object(f"{path}: entry {number} of the list", item)) for number, item in enumerate(found, 1)]


@contextmanager
def _decoded(path: Path, options: SheetOptions) -> Iterator[str]:
    """Give a JSON file's encoding to read it with; raises DataError where it is not in it."""
    encoding = options.encoding or "utf-8-sig"
    try:
        yield encoding
    except (UnicodeError, LookupError) as error:
        raise DataError(f"{path}: can't be read as {encoding} ({error}). Say its encoding with --encoding") from error


def _object(place: str, found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise DataError(f"{place} is no JSON object, such as {{\"text\": \"a mug\", \"label\": \"12 8 15\"}}")
    return found
