"""Pictures in an .xlsx or .xlsm -> files in the photo cache, each with the row that it belongs to.

A floating picture belongs to the row in which it begins, one in a cell to that of the cell: Excel's own (place in cell,
IMAGE()) and those of WPS, whose cells say =DISPIMG("ID_...",1). A cell merged downwards holds its picture for all its
rows. The links of cells are read with them.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import unquote
from xml.etree.ElementTree import Element, iterparse

from ground.errors import UserError
from ground.files import whole_file
from sheets.addresses import PICTURE, addresses_of
from sheets.cells import DataError, say_once
from sheets.package import Package, attribute, name, opened_package
from sheets.photos import LARGEST_FILE
from sheets.rich_values import picture_values
from sheets.workbooks import stands_in

_KINDS = (".xlsx", ".xlsm")
_PICTURES = re.compile(r"/xl/(?:drawings/|cellimages|richData/)", re.I)
_FORMULAS = dict.fromkeys(_KINDS, (re.compile(r"xl/worksheets/.*\.xml", re.I),
                                   re.compile(rb"<f[^<]*?(?:IMAGE|DISPIMG|HYPERLINK)\(")))
_LINKS = dict.fromkeys(_KINDS, (re.compile(r"xl/worksheets/.*\.rels", re.I), re.compile(rb"/hyperlink[\"']")))
# Of other kinds: where a picture's name or its first bytes stand in the file.
_OTHERS = {".ods": re.compile(rb"Pictures/\w"), ".xlsb": re.compile(rb"xl/media/\w"),
           ".xls": re.compile(rb"\x89PNG\r\n|\xff\xd8\xff[\xe0\xe1]")}
_CALL = re.compile(r'(IMAGE|DISPIMG|HYPERLINK)\(\s*(?:"{1,2}([^"]+)")?')  # two where Google's sheets wrote it
_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
_DRAWN = (".emf", ".wmf", ".svg")
_LOW = 0.75  # of a row's height: a picture that begins lower and ends in the next row belongs to that
_UNITS = 12_700  # of a drawing in a point, in which rows are measured
_MOST_LINKED = 10_000  # cells of one link


class _NotTaken(UserError):
    """A picture that can't be taken out; the text says why."""


@dataclass
class Pictures:
    """What a worksheet shows beside its texts, by the number of the row; columns are counted from 0, which is A."""

    photos: dict[int, list[tuple[int, str]]] = field(default_factory=dict)  # column and address of each picture
    faults: dict[int, list[tuple[int, str]]] = field(default_factory=dict)  # column, and why a picture can't be taken
    links: dict[tuple[int, int], str] = field(default_factory=dict)  # row and column: where a cell leads
    filled: set[tuple[int, int]] = field(default_factory=set)  # row and column of cells that are a picture and no text
    unbound: int = 0  # pictures that lie over no cell


def may_hold_pictures(path: Path) -> bool:
    """Say whether it is worth reading a file's pictures and links; of those that can't be read it warns."""
    kind = path.suffix.lower()
    if kind in _OTHERS:
        with path.open("rb") as file:
            if any(_OTHERS[kind].search(chunk) for chunk in iter(lambda: file.read(2 ** 20), b"")):
                say_once("WARNING", f"{path}: it holds pictures, which are read from .xlsx only: save it as .xlsx")
    if kind not in _KINDS:
        return False
    with opened_package(path) as package:
        return any(map(_PICTURES.match, package)) or stands_in(path, _LINKS) or stands_in(path, _FORMULAS)


def read_pictures(path: Path, sheet_name: str, picture_dir: str | None) -> Pictures:
    """Find the pictures and links of a worksheet; the pictures are written to picture_dir, where one is given.

    Raises DataError when the workbook is damaged or picture_dir can't be written.
    """
    with opened_package(path) as package:
        return _Worksheet(package, package.worksheet(sheet_name), _Taker(package, picture_dir)).read()


class _Taker:
    """Takes pictures out of a workbook, each once."""

    def __init__(self, package: Package, folder: str | None):
        self._package, self._folder = package, folder
        self._taken: dict[str, str] = {}

    def address(self, target: str) -> str:
        """Return the address of a picture: of the file in the cache, which is written, or the one outside."""
        if not target:
            raise _NotTaken("the workbook does not say where it is")
        if not target.startswith("/"):
            return addresses_of(target)[0]
        if target not in self._package:
            raise _NotTaken(f"{target[1:]} is not in the workbook")
        if target not in self._taken:
            self._taken[target] = self._take(target)
        return self._taken[target]

    def _take(self, part: str) -> str:
        ending = PurePosixPath(part).suffix.lower()
        if ending in _DRAWN:
            raise _NotTaken(f"{part[1:]} is a drawing of lines ({ending}), no photo; paste it as a picture")
        if self._package.size(part) > LARGEST_FILE:
            raise _NotTaken(f"{part[1:]} is too large: {self._package.size(part) / 2 ** 20:.0f} MiB, at most "
                            f"{LARGEST_FILE / 2 ** 20:.0f}")
        with self._package.open(part) as file:
            content = file.read()
        file_name = hashlib.md5(content, usedforsecurity=False).hexdigest() + (ending if ending in _ENDINGS else ".jpg")
        if self._folder is not None and not (path := Path(self._folder, file_name)).is_file():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with whole_file(path) as partial:
                    partial.write_bytes(content)
            except OSError as error:
                raise DataError(f"{self._folder}: the workbook's pictures can't be written there: {error}. Give "
                                "another folder with --image_cache_dir") from error
        return PICTURE + file_name


class _Worksheet:
    def __init__(self, package: Package, part: str, taker: _Taker):
        self._package, self._part, self._taker = package, part, taker
        self._in_cells = picture_values(package)
        self._of_wps = _pictures_of_wps(package)
        self._targets = package.targets(part)
        self._found = Pictures()
        self._heights: dict[int, float] = {}  # row, 0 for all others -> points
        self._merged: list[tuple[int, int, int, int]] = []  # left, top, right, bottom of cells merged downwards
        self._shared: dict[str, str] = {}  # formulas that several cells have

    def read(self) -> Pictures:
        """Read the cells first: where they are merged, and how high rows are, decides where pictures belong."""
        in_cells, drawings = [], []
        with self._package.open(self._part) as file:
            number = 0
            for _, element in iterparse(file):
                match name(element):
                    case "row":
                        number = int(element.get("r", number + 1))
                        self._heights |= {number: float(element.get("ht"))} if element.get("ht") else {}
                        in_cells += [(number, *found) for found in self._look_at_cells(number, element)]
                        element.clear()
                    case "sheetFormatPr":
                        self._heights[0] = float(element.get("defaultRowHeight", 15))
                    case "mergeCell":
                        left, top, right, bottom = _corners(element.get("ref", ""))
                        if bottom > top:
                            self._merged.append((left, top, right, bottom))
                    case "hyperlink":
                        self._link(element)
                    case "drawing":
                        drawings.append(self._targets[attribute(element, "id")])
        for number, column, target in in_cells:
            self._found.filled.add((number, column))
            self._add(number, column, target)
        for drawing in drawings:
            self._read_drawing(drawing)
        return self._found

    def _look_at_cells(self, number: int, row: Element) -> Iterator[tuple[int, str]]:
        """Yield column and target of each picture that is the value of a cell."""
        column = -1
        for cell in row:
            column = _corners(cell.get("r", ""))[0] if cell.get("r") else column + 1
            call = self._call(cell)
            if call is not None and call[1] == "HYPERLINK":
                self._found.links |= {(number, column): call[2]} if call[2] else {}
            elif call is not None and call[1] == "DISPIMG":
                yield column, self._of_wps.get(call[2] or "", "")
            elif cell.get("vm") in self._in_cells:
                yield column, self._in_cells[cell.get("vm", "")]
            elif call is not None:
                yield column, call[2] or ""

    def _call(self, cell: Element) -> re.Match[str] | None:
        for formula in cell:
            if name(formula) == "f":
                text = formula.text or self._shared.get(formula.get("si", ""), "")
                if formula.get("si"):  # in the others it names other cells, so that only its kind is known
                    self._shared.setdefault(formula.get("si", ""), re.sub('".*', ")", text))
                return _CALL.search(text)
        return None

    def _link(self, element: Element) -> None:
        target = self._targets.get(attribute(element, "id"), "/")
        left, top, right, bottom = _corners(element.get("ref", ""))
        if not target.startswith("/") and (right - left + 1) * (bottom - top + 1) <= _MOST_LINKED:
            for number in range(top, bottom + 1):
                for column in range(left, right + 1):
                    self._found.links.setdefault((number, column), target if "://" in target else unquote(target))

    def _read_drawing(self, part: str) -> None:
        targets = self._package.targets(part)
        for anchor in self._package.tree(part).iter():
            if not name(anchor).endswith("Anchor"):
                continue
            ends = {name(end): {name(entry): int(entry.text or 0) for entry in end} for end in anchor
                    if name(end) in ("from", "to")}
            for picture in anchor.iter():
                if name(picture) != "blip":
                    continue
                target = targets.get(attribute(picture, "embed") or attribute(picture, "link"), "")
                if "from" not in ends:
                    self._found.unbound += 1
                else:
                    self._add(self._row_of(**ends), ends["from"]["col"], target)

    def _row_of(self, **ends: dict[str, int]) -> int:
        first = ends["from"]
        number = first["row"] + 1
        height = self._heights.get(number, self._heights.get(0, 15)) * _UNITS
        return number + (ends.get("to", first)["row"] == number and first.get("rowOff", 0) > _LOW * height)

    def _add(self, number: int, column: int, target: str) -> None:
        merged = next(((top, bottom) for left, top, right, bottom in self._merged
                       if left <= column <= right and top <= number <= bottom), (number, number))
        try:
            address, fault = self._taker.address(target), ""
        except _NotTaken as problem:
            address, fault = "", str(problem)
        for row in range(merged[0], merged[1] + 1):
            (self._found.faults if fault else self._found.photos).setdefault(row, []).append((column, fault or address))


def _corners(ref: str) -> tuple[int, int, int, int]:
    """Read C2 or C2:D9: left column from 0, top row from 1, right column, bottom row."""
    found = [(sum((ord(sign) - 64) * 26 ** place for place, sign in enumerate(reversed(letters))) - 1, int(number))
             for letters, number in re.findall("([A-Z]+)([0-9]+)", ref)]
    return *found[0], *found[-1]


def _pictures_of_wps(package: Package) -> dict[str, str]:
    """Return the part of each picture by the ID in =DISPIMG("ID_...",1)."""
    part = "/xl/cellimages.xml"
    targets, found = package.targets(part), {}
    for picture in package.tree(part):
        names = [entry.get("name", "") for entry in picture.iter() if name(entry) == "cNvPr"]
        ids = [attribute(entry, "embed") for entry in picture.iter() if name(entry) == "blip"]
        if names and ids:
            found[names[0]] = targets.get(ids[0], "")
    return found
