"""Workbooks (.xlsx, .xlsm, .xls, .xlsb, .ods) -> rows of text with the numbers under which a person sees them."""

import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from python_calamine import CalamineError, CalamineSheet, CalamineWorkbook, SheetTypeEnum, SheetVisibleEnum

from config import SheetOptions
from sheets.cells import DataError, Row, as_text, say_once

KINDS = (".xlsx", ".xlsm", ".xls", ".xlsb", ".ods")
_NO_VALUE = dict.fromkeys((".xlsx", ".xlsm"), (re.compile(r"xl/worksheets/.*\.xml"), re.compile(
    rb"<f(?: [^>]*)?(?:/>|>[^<]*</f>)(?:<v ?/>|<v></v>)?</c>")))
# A cell merged over rows, where python-calamine knows none. In .xlsb: record 176, its first row and another last one.
_MERGED = {".ods": (re.compile(r"content\.xml"), re.compile(rb'number-rows-spanned="(?!1")')),
           ".xlsb": (re.compile(r"xl/worksheets/.*\.bin"), re.compile(rb"\xb0\x01\x10(?s:(.{4})(?!\1).{12})"))}


def read_workbook(path: Path, options: SheetOptions) -> Iterator[Row]:
    """Read every row of a worksheet, blank ones too; a cell merged downwards holds for all its rows.

    Raises DataError when it can't be read.
    """
    with path.open("rb"):  # a missing file or a folder says so in Python's words
        pass
    # By the reader under pd.read_excel, row by row: that one holds the whole table twice (200,000 rows of 8 cells: 511
    # MB and 6 s, not 227 MB and 3 s) and makes 2024-05-01 00:00:00 out of a date.
    try:
        with CalamineWorkbook.from_path(path) as book:
            sheet = book.get_sheet_by_name(_choose_sheet(path, book, options.sheet_name))
        if sheet.merged_cell_ranges is None and stands_in(path, _MERGED):
            say_once("WARNING", f"{path}: it holds cells merged over several rows, and in a {path.suffix.lower()} file "
                                "these count for the first of them only: fill in the others, or save it as .xlsx")
        yield from _rows(sheet)
    except (CalamineError, *_panics()) as error:
        raise DataError(f"{path}: is no readable Excel workbook: {error}. Open it in a spreadsheet program and save it "
                        "again as .xlsx or .csv") from error


def chosen_sheet(path: Path, options: SheetOptions) -> str:
    """Return the name of the worksheet that is read."""
    with CalamineWorkbook.from_path(path) as book:
        return _choose_sheet(path, book, options.sheet_name)


def _panics() -> list[type[BaseException]]:
    """The errors by which compiled code gives up on a damaged .xls or .xlsb: in no module, and no Exception either."""
    return [kind for kind in BaseException.__subclasses__() if kind.__name__ == "PanicException"]


def _rows(sheet: CalamineSheet) -> Iterator[Row]:
    before = [""] * (sheet.start[1] if sheet.start else 0)  # so that the first cell is that of column A
    merged: dict[int, dict[int, int]] = {}  # top row -> column -> last row of a cell merged downwards
    for (top, column), (bottom, _) in sheet.merged_cell_ranges or []:
        if bottom > top and 0 <= column - len(before) < sheet.width:
            merged.setdefault(top, {})[column] = bottom
    above: dict[int, tuple[int, str]] = {}  # column -> last row and text of the merged cell it is in
    for index, values in enumerate(sheet.iter_rows()):
        cells = [*before, *(value.strip() if type(value) is str else as_text(value) for value in values)]
        if any(cells):
            for column, (bottom, text) in above.items():
                cells[column] = text if index <= bottom else cells[column]
        above |= {column: (bottom, cells[column]) for column, bottom in merged.get(index, {}).items()}
        yield index + 1, cells


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


def has_formulas_without_value(path: Path) -> bool:
    """Say whether a workbook holds a formula that no spreadsheet program has worked out yet."""
    return stands_in(path, _NO_VALUE)


def stands_in(path: Path, marks: Mapping[str, tuple[re.Pattern[str], re.Pattern[bytes]]]) -> bool:
    """Say whether the mark of its kind stands in one of a workbook's parts."""
    if path.suffix.lower() not in marks:
        return False
    part, mark = marks[path.suffix.lower()]
    try:
        with zipfile.ZipFile(path) as archive:
            for name in filter(part.fullmatch, archive.namelist()):
                with archive.open(name) as file:
                    rest = b""
                    while chunk := file.read(2 ** 20):
                        if mark.search(rest + chunk):
                            return True
                        rest = chunk[-4096:]
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: is damaged: {error}. Open it in a spreadsheet program and save it again") from error
    return False
