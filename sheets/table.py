"""A table as it lies on the disk: .xlsx, .csv or .jsonl -> rows of text with their numbers; and back as .xlsx.

Every row keeps the number under which a person sees it: the header is row 1 of most tables, a line of .jsonl is a row.
Rows are read one after the other, so that a large table need not fit in memory twice.
"""

import codecs
import csv
import json
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from charset_normalizer import from_bytes
from loguru import logger
from openpyxl import Workbook
from openpyxl.cell import WriteOnlyCell
from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
from python_calamine import CalamineError, CalamineWorkbook, SheetTypeEnum, SheetVisibleEnum

from config import SheetOptions
from ground.errors import UserError
from ground.files import whole_file

_LONGEST_CELL = 10_000_000  # characters
_LONGEST_EXCEL_CELL = 32_767
_ENCODINGS = ("gb18030", "cp1252", "big5", "shift_jis", "euc_kr", "cp1251", "cp1250")  # the likelier ones first
_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
         (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_NO_VALUE = re.compile(rb"<f(?: [^>]*)?(?:/>|>[^<]*</f>)(?:<v ?/>|<v></v>)?</c>")

Row = tuple[int, list[str]]  # a row's number and its cells, without outer blanks


class DataError(UserError):
    """A sheet that can't be used; the text says why and what to do."""


def read_table(path: str | Path, options: SheetOptions) -> Iterator[Row]:
    """Read a sheet's rows that are not blank, the header first, as text without outer blanks.

    Raises DataError when it can't be read.
    """
    path = Path(path)
    kind = path.suffix.lower()
    reader = {".xlsx": _read_workbook, ".csv": _read_csv, ".jsonl": _read_jsonl}.get(kind)
    if reader is None:
        raise DataError(f"{path}: a sheet is .xlsx, .csv or .jsonl, not {kind or 'a file without extension'}. Save it "
                        "as one")
    if options.sheet_name and kind != ".xlsx":
        raise DataError(f"{path}: --sheet_name {options.sheet_name} is for .xlsx; a {kind} file holds one sheet only")
    try:
        yield from (row for row in reader(path, options) if any(row[1]))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file. Give your own sheet with --data_path") from error
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error}. Check that it is a file that you may read") from error


def _read_workbook(path: Path, options: SheetOptions) -> Iterator[Row]:
    with path.open("rb"):  # a missing file or a folder says so in Python's words
        pass
    try:
        with CalamineWorkbook.from_path(path) as book:
            sheet = book.get_sheet_by_name(_choose_sheet(path, book, options.sheet_name))
            left = sheet.start[1] if sheet.start else 0
            merged: dict[int, dict[int, int]] = {}  # top row -> column -> last row of a cell merged downwards
            for (top, column), (bottom, _) in sheet.merged_cell_ranges or []:
                if bottom > top and 0 <= column - left < sheet.width:
                    merged.setdefault(top, {})[column - left] = bottom
            above: dict[int, tuple[int, str]] = {}  # column -> last row and text of the merged cell it is in
            for index, values in enumerate(sheet.iter_rows()):
                cells = [_as_text(value) for value in values]
                if any(cells):
                    for column, (bottom, text) in above.items():
                        cells[column] = text if index <= bottom else cells[column]
                above |= {column: (bottom, cells[column]) for column, bottom in merged.get(index, {}).items()}
                yield index + 1, cells
    except CalamineError as error:
        raise DataError(f"{path}: is no readable Excel workbook: {error}. Open it in a spreadsheet program and save it "
                        "again as .xlsx or .csv") from error


@lru_cache(maxsize=1000)
def say_once(level: str, message: str) -> None:
    """Log a message once, however often the table is read."""
    logger.log(level, message)


def _choose_sheet(path: Path, book: CalamineWorkbook, wanted: str | None) -> str:
    """Take the named worksheet, or the first that is not hidden; says so when there are several."""
    sheets = [sheet for sheet in book.sheets_metadata if sheet.typ == SheetTypeEnum.WorkSheet]
    names = [sheet.name for sheet in sheets]
    if wanted:
        if wanted not in names:
            raise DataError(f"{path}: no worksheet {wanted!r}. Its worksheets are: {', '.join(names)}. Give one with "
                            "--sheet_name")
        return wanted
    shown = [sheet.name for sheet in sheets if sheet.visible == SheetVisibleEnum.Visible] or names
    if not shown:
        raise DataError(f"{path}: holds no worksheet")
    if len(shown) > 1:
        say_once("INFO", f"{path}: worksheet {shown[0]!r} is read; the others: {', '.join(shown[1:])} (--sheet_name)")
    return shown[0]


def _as_text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return value.strip() if isinstance(value, str) else str(value)


def has_formulas_without_value(path: Path) -> bool:
    """Say whether a workbook holds a formula that no spreadsheet program has worked out yet."""
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.startswith("xl/worksheets/") and name.endswith(".xml"):
                    with archive.open(name) as file:
                        rest = b""
                        while chunk := file.read(2 ** 20):
                            if _NO_VALUE.search(rest + chunk):
                                return True
                            rest = chunk[-4096:]
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise DataError(f"{path}: is damaged: {error}. Open it in a spreadsheet program and save it again") from error
    return False


def _read_csv(path: Path, options: SheetOptions) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST_CELL)
    encoding = options.encoding or guess_encoding(path)
    width = None
    try:
        with path.open(encoding=encoding, newline="") as file:
            separator = _separator(path, file.readline())
            file.seek(0)
            reader = csv.reader(file, delimiter=separator, strict=True)
            for number, cells in enumerate(reader, start=1):
                cells = [cell.strip() for cell in cells]
                width = width or len(cells)
                if any(cells[width:]):
                    raise DataError(f"{path}: is no well-formed CSV: row {number}, line {reader.line_num} has "
                                    f"{len(cells)} fields, the first row {width}. Put a field with commas or line "
                                    "breaks in double quotes, or save it as .xlsx")
                yield number, cells[:width]
    except (UnicodeDecodeError, LookupError) as error:
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

    Raises DataError when nothing fits.
    """
    with path.open("rb") as file:
        start = file.read(4)
        for mark, encoding in _BOMS:
            if start.startswith(mark):
                return encoding
        file.seek(0)
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            while chunk := file.read(2 ** 20):
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
            return "utf-8"
        except UnicodeDecodeError:
            file.seek(0)
            sample = file.read(2 ** 16).rpartition(b"\n")[0] or start
    found = from_bytes(sample, cp_isolation=[*_ENCODINGS])
    best = found.best()
    fitting = {name for match in found if match.chaos <= best.chaos
               for name in (match.encoding, *match.could_be_from_charset)} if best else set()
    guess = next((encoding for encoding in _ENCODINGS if encoding in fitting), None)
    if guess is None:
        raise DataError(f"{path}: is not UTF-8 and in no encoding that could be guessed. Say it with --encoding, or "
                        "save the file as 'CSV UTF-8' or .xlsx")
    first_line = sample.splitlines()[0].decode(guess, "replace")[:80]
    say_once("WARNING", f"{path}: is not UTF-8; read as {guess}, which is a guess: its first line reads "
                        f"{first_line!r}. Say another with --encoding")
    return guess


def _read_jsonl(path: Path, options: SheetOptions) -> Iterator[Row]:
    """Read one JSON object a line; the header is made of all keys, in order of appearance."""
    header: dict[str, int] = {}
    for _, found in _json_lines(path, options):
        for key in found:
            header.setdefault(key.strip(), len(header))
    yield 0, list(header)
    for number, found in _json_lines(path, options):
        cells = [""] * len(header)
        for key, value in found.items():
            cells[header[key.strip()]] = ("" if value is None else _as_text(value) if not isinstance(value, dict | list)
                                          else json.dumps(value, ensure_ascii=False))
        yield number, cells


def _json_lines(path: Path, options: SheetOptions) -> Iterator[tuple[int, dict[str, Any]]]:
    encoding = options.encoding or "utf-8-sig"
    try:
        with path.open(encoding=encoding) as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                yield number, _json_object(path, number, line)
    except (UnicodeDecodeError, LookupError) as error:
        raise DataError(f"{path}: can't be read as {encoding} ({error}). Say its encoding with --encoding") from error


def _json_object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:  # an integer may also be longer than Python converts
        raise DataError(f"{path}: line {number} is no JSON object: {error}. Each line must be one") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: line {number} is no JSON object, such as {{\"text\": \"a mug\", \"label\": "
                        "\"12 8 15\"}")
    return found


def write_table(path: str | Path, rows: Iterable[Sequence[str]]) -> None:
    """Write rows of text as .xlsx, whole or not at all, row by row; every cell is text and never a formula."""
    book = Workbook(write_only=True)
    sheet = book.create_sheet()
    for row in rows:
        cells = []
        for text in row:
            cell = WriteOnlyCell(sheet, ILLEGAL_CHARACTERS_RE.sub("\N{REPLACEMENT CHARACTER}", text)
                                 [:_LONGEST_EXCEL_CELL])
            cell.data_type = "s"
            cells.append(cell)
        sheet.append(cells)
    with whole_file(path) as partial:
        book.save(partial)
