"""Columns by name: a table's rows -> product rows with text, label, id, category and photo addresses."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from config import SheetOptions
from sheets.addresses import is_photo_name
from sheets.cells import DataError, Row, say_once
from sheets.headers import goes_on, header_of, names_again
from sheets.photo_columns import PHOTO_COLUMN, PhotoColumns
from sheets.pictures import Pictures, may_hold_pictures, read_pictures
from sheets.sides import SIDES, SideColumns, find_sides
from sheets.table import read_table
from sheets.workbooks import chosen_sheet, has_formulas_without_value

FIELDS = ("text", "label", "sku_id", "category")
_TITLE_ROWS = 10  # rows above the header, at most
_LOOKED_AT = 100  # rows below it whose cells tell what a column holds


@dataclass(frozen=True, slots=True)
class ProductRow:
    """One row of a sheet, its columns found; "" where a cell is empty."""

    number: int
    text: str
    label: str
    sku_id: str
    category: str
    photos: tuple[tuple[str, str], ...]  # column and address or path of each photo that is named
    faults: tuple[str, ...] = ()  # which pictures of the workbook could not be taken out, and why


def read_sheet(path: str | Path, options: SheetOptions, required: Sequence[str], picture_dir: str | None = None
               ) -> Iterator[ProductRow]:
    """Read the rows below the header; those without text and picture are passed over.

    picture_dir: where pictures inside a workbook are written.
    Raises DataError when the sheet can't be read or lacks a required column.
    """
    path = Path(path)
    rows, numbers, header, columns = _find_header(path, options, required)
    above = numbers[-1]
    places = {field: [header.index(name) for name in names] for field, names in columns.items() if field != "photo"}
    sides = SideColumns() if columns["label"] else find_sides(header, read_mapping(options.column))
    if sides.sides:
        say_once("INFO", f"{path}: labels are read from the columns "
                         + ", ".join(f"{header[place]!r} ({axis})" for place, axis, _ in sides.sides))
    pictures = (read_pictures(path, chosen_sheet(path, options), picture_dir) if may_hold_pictures(path)
                else Pictures())
    upper = list(islice(rows, _LOOKED_AT))
    for place in places["label"]:
        if goes_on(place, header, [cells for _, cells in upper]):
            raise DataError(f"{path}: the columns behind {header[place]!r} have no name and hold numbers, as if a size "
                            "stood in several cells. Name them, such as 长, 宽, 高 or length, width, height")
    taken = {*chain.from_iterable(places.values()), *(place for place, _, _ in sides.sides), sides.unit_place}
    photos = PhotoColumns(path, header, columns["photo"], taken, upper, pictures)
    if picture_dir is not None:
        photos.log(above)
    unfilled = False

    def cell(cells: list[str], field: str) -> str:
        if field == "label" and sides.sides:
            return sides.label(cells)
        return "\n".join(cells[place] for place in places[field] if cells[place])

    for number, cells in photos.with_pictured(chain(upper, rows), above):
        cells += [""] * (len(header) - len(cells))
        product = ProductRow(number, *(cell(cells, field) for field in FIELDS), *photos.of_row(number, cells))
        unfilled = unfilled or not product.text or not product.label
        yield product
    if unfilled and has_formulas_without_value(path):
        say_once("WARNING", f"{path}: it holds formulas whose values are not stored, and such cells read as empty: "
                            "open it in a spreadsheet program and save it again")


def header_rows(path: str | Path, options: SheetOptions, required: Sequence[str]) -> range:
    """Return the numbers of the rows that name the columns: of one, or of several (see sheets/headers.py)."""
    return _find_header(Path(path), options, required)[1]


def _find_header(path: Path, options: SheetOptions, required: Sequence[str]
                 ) -> tuple[Iterable[Row], range, list[str], dict[str, list[str]]]:
    """Take the first of the upper rows that names every required column; title rows above it are passed over."""
    rows = read_table(path, options)
    upper = list(islice(rows, _TITLE_ROWS))
    if not upper:
        raise DataError(f"{path}: is empty. Its first row must name the columns: sku_id, text, label, "
                        "sku_img, spu_img_1, ...")
    mapping = read_mapping(options.column)
    wanted = {name for field in required if field != "label" for name in mapping.get(field, [field])}
    labels = set(mapping.get("label", ["label"])) if "label" in required else set()
    photos = {name for field, names in mapping.items() if field == "photo" or PHOTO_COLUMN.fullmatch(field)
              for name in names}
    known = [*FIELDS, *chain.from_iterable(mapping.values())]
    headers = [header_of(cells, below, known, mapping)
               for (_, cells), (_, below) in zip(upper, [*upper[1:], (0, [])], strict=True)]
    place = next((place for place, (cells, _) in enumerate(headers) if wanted <= set(cells) and (
        labels <= set(cells) or find_sides(cells, mapping).sides) and (
        required or photos & set(cells) or any(map(is_photo_name, cells)))), 0)
    header, height = headers[place]
    if height > 1 and not labels <= set(header):
        mapping.pop("label", None)  # its name stands over the sides
    columns = _find_columns(path, header, mapping, required)
    used = [*chain.from_iterable(columns.values()), *(header[side] for side, _, _ in find_sides(header, mapping).sides)]
    end = place + height
    while end < len(upper) and names_again(upper[end][1], header, used):
        say_once("INFO", f"{path}: row {upper[end][0]} ({', '.join(filter(None, upper[end][1]))[:80]}) names the "
                         "columns once more and is no product")
        end += 1
    return chain(upper[end:], rows), range(upper[place][0], upper[end - 1][0] + 1), header, columns


def read_mapping(pairs: Sequence[str]) -> dict[str, list[str]]:
    """Read the FIELD=NAME pairs of --column; a field may come several times."""
    mapping: dict[str, list[str]] = {}
    for pair in pairs:
        field, _, name = pair.partition("=")
        mapping.setdefault(field.strip(), []).append(name.strip())
    return mapping


def _find_columns(path: Path, header: list[str], mapping: dict[str, list[str]], required: Sequence[str]
                  ) -> dict[str, list[str]]:
    """Return the names of the columns that each field is read from; `photo` stands for all photo columns."""
    photos = {name: mapping.get(name, [name])[0] for name in (*filter(PHOTO_COLUMN.fullmatch, header), *mapping)
              if PHOTO_COLUMN.fullmatch(name)}
    order = sorted(photos, key=lambda name: (name != "sku_img", int(name.rpartition("_")[2]) if name[-1].isdigit()
                                             else 0))
    columns = {field: mapping.get(field, [field] if field in header else []) for field in FIELDS}
    columns["photo"] = list(dict.fromkeys([*(photos[name] for name in order), *mapping.get("photo", [])]))
    for side in filter(mapping.__contains__, SIDES):
        columns[side] = mapping[side]  # so that one that is not there is named
    has_sides = bool(find_sides(header, mapping).sides)
    for field in required:
        columns[field] = columns[field] or ([] if field == "label" and has_sides else [field])
    named = [name for name in header if name]
    used = [name for names in columns.values() for name in names]
    others = [name for name in named if name not in used]
    for name in used:
        if named.count(name) > 1:
            raise DataError(f"{path}: the column {name!r} comes {named.count(name)} times. Keep one of them")
        if name not in named:
            field = next(field for field, names in columns.items() if name in names)
            nearest = difflib.get_close_matches(name, others, n=1, cutoff=0.5)
            way_out = f"Is {nearest[0]!r} meant? Rename it to {name!r}" if nearest else f"Add {name!r}"
            raise DataError(f"{path}: no column {name!r}. Its columns are: {', '.join(named) or 'none'}. {way_out}, or "
                            f"say which column it is: --column {field}=NAME")
    return columns
