"""A table as it lies on the disk, of any kind -> rows of text with their numbers; and tables back as .xlsx or .csv.

Every row keeps the number under which a person sees it: the header is row 1 of most tables, a line of .jsonl and an
entry of .json are a row. Rows are read one after the other, so that a large table need not fit in memory twice.
"""

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from config import SheetOptions
from ground.files import whole_file
from sheets import workbooks
from sheets.cells import DataError, Row, as_text
from sheets.text_files import read_csv, read_json, read_jsonl

_LONGEST_EXCEL_CELL = 32_767
_MOST_EXCEL_ROWS = 1_048_576
_ILLEGAL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f]")  # in XML, which .xlsx is
_CHUNK = 1000  # rows of a .parquet that are Python objects at a time


def read_table(path: str | Path, options: SheetOptions) -> Iterator[Row]:
    """Read a sheet's rows that are not blank, the header first, as text without outer blanks.

    Raises DataError when it can't be read.
    """
    path = Path(path)
    kind = path.suffix.lower()
    readers = {**dict.fromkeys(workbooks.KINDS, workbooks.read_workbook), ".csv": read_csv, ".tsv": read_csv,
               ".jsonl": read_jsonl, ".json": read_json, ".parquet": _read_parquet}
    if kind not in readers:
        raise DataError(f"{path}: a sheet is {', '.join(readers)}, not {kind or 'a file without extension'}. Save it "
                        "as one")
    if options.sheet_name and kind not in workbooks.KINDS:
        raise DataError(f"{path}: --sheet_name {options.sheet_name} is for {', '.join(workbooks.KINDS)}; a {kind} file "
                        "holds one sheet only")
    try:
        yield from (row for row in readers[kind](path, options) if any(row[1]))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file. Give your own sheet with --data_path") from error
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error}. Check that it is a file that you may read") from error


def _read_parquet(path: Path, options: SheetOptions) -> Iterator[Row]:
    """Read a .parquet file, its header as row 1 and its first row as row 2."""
    import pandas as pd  # here, since it costs other kinds of sheets 45 MB

    try:
        # Arrow's own types, since numpy's make floats of integers, ids among them, in a column with a gap.
        frame = pd.read_parquet(path, engine="pyarrow", dtype_backend="pyarrow")
    except ImportError as error:
        raise DataError(f"{path}: reading .parquet takes a package that is not installed: pip install pyarrow. Or save "
                        "it as .csv or .xlsx") from error
    except (ValueError, NotImplementedError) as error:
        raise DataError(f"{path}: is no readable .parquet file: {error}. Write it again, or save it as .csv or "
                        ".xlsx") from error
    if any(name is not None for name in frame.index.names):
        frame = frame.reset_index()
    yield 1, [as_text(name) for name in frame.columns]
    for start in range(0, len(frame), _CHUNK):
        columns = [_column_values(frame.iloc[start:start + _CHUNK, place]) for place in range(frame.shape[1])]
        for number, values in enumerate(zip(*columns, strict=True), start + 2):
            yield number, [as_text(value) for value in values]


def _column_values(column: Any) -> list[Any]:
    arrow = column.array.__arrow_array__()
    if str(arrow.type) != "float":
        return arrow.to_pylist()
    return [value and float(value) for value in arrow.cast("string").to_pylist()]  # 32 bits: 0.1, not 0.1000000015


def write_table(path: str | Path, rows: Iterable[Sequence[str]]) -> None:
    """Write rows of text, whole or not at all, row by row: as .csv or .tsv where the name says so, else as .xlsx.

    In .xlsx every cell is text and never a formula. Raises DataError for more rows than it can hold.
    """
    kind = Path(path).suffix.lower()
    with whole_file(path) as partial:
        if kind not in (".csv", ".tsv"):
            _write_workbook(partial, as_many_as_fit(path, rows))
            return
        # With a mark, or Excel takes UTF-8 for something else.
        with partial.open("w", encoding="utf-8-sig", errors="replace", newline="") as file:
            csv.writer(file, delimiter="\t" if kind == ".tsv" else ",").writerows(rows)


def as_many_as_fit(path: str | Path, rows: Iterable[Any], way_out: str = "write a .csv instead") -> Iterator[Any]:
    """Give the rows of a table on; raise DataError where they are more than the file to be written can hold."""
    for count, row in enumerate(rows, start=1):
        if count > _MOST_EXCEL_ROWS and Path(path).suffix.lower() not in (".csv", ".tsv"):
            raise DataError(f"{path}: a worksheet holds {_MOST_EXCEL_ROWS:,} rows, the header among them, and there "
                            f"are more: {way_out}")
        yield row


def _write_workbook(path: Path, rows: Iterable[Sequence[str]]) -> None:
    # pandas' ExcelWriter needs a table in memory and every cell of the workbook too.
    from openpyxl import Workbook  # here, and below: reading needs no openpyxl
    from openpyxl.cell import WriteOnlyCell

    book = Workbook(write_only=True)
    sheet = book.create_sheet()

    def cell(text: str) -> Any:
        if not text.startswith(("=", "#")):
            return text or None
        marked = WriteOnlyCell(sheet, text)  # or it was taken for a formula, or for an error
        marked.data_type = "s"
        return marked

    try:
        for row in rows:
            sheet.append([cell(_writable(text)) for text in row])
    finally:
        sheet.close()
    book.save(path)


def write_tables(path: str | Path, tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write small tables as .xlsx, whole or not at all: a worksheet each, a header row, text never as a formula."""
    import pandas as pd
    from openpyxl.styles import Font

    tables = {title: list(as_many_as_fit(path, [None, *rows], "take the sheet in parts"))[1:]
              for title, rows in tables.items()}
    with whole_file(path) as partial, partial.open("wb") as file, pd.ExcelWriter(file, engine="openpyxl") as writer:
        for title, rows in tables.items():
            # Of objects, since a column of integers with a gap would become one of floats.
            frame = pd.DataFrame([[*map(_writable, row.values())] for row in rows], dtype=object,
                                 columns=[*map(_writable, rows[0])] if rows else [])
            frame.to_excel(writer, sheet_name=title, index=False, freeze_panes=(1, 0))
            for cell in chain.from_iterable(writer.sheets[title]):
                if cell.value == "":
                    cell.value = None
                elif isinstance(cell.value, str):
                    cell.data_type = "s"  # where it begins with =, openpyxl took it for a formula
                if cell.row == 1:
                    cell.font = Font(bold=True)


def _writable(value: Any) -> Any:
    """Make of a text what a cell can hold."""
    return _ILLEGAL.sub("\N{REPLACEMENT CHARACTER}", value)[:_LONGEST_EXCEL_CELL] if isinstance(value, str) else value
