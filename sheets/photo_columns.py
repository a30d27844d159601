"""Which columns of a sheet name photos; the photos of each row, pictures inside the workbook among them."""

import heapq
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path

from sheets.addresses import addresses_of, is_address, is_photo_name
from sheets.cells import Row, say_once
from sheets.pictures import Pictures

PHOTO_COLUMN = re.compile(r"sku_img|spu_img_[0-9]+")


class PhotoColumns:
    """The photo columns: those that are named, or else those whose cells look like photo addresses.

    named: columns of --column or of names that are known. taken: places that are read as something else. upper: the
    first rows below the header, which tell what a column holds.
    """

    def __init__(self, path: Path, header: Sequence[str], named: Sequence[str], taken: Collection[int | None],
                 upper: Sequence[Row], pictures: Pictures):
        self._path, self._header, self._named, self._pictures = path, header, named, pictures
        others = [place for place, name in enumerate(header) if place not in taken and name not in named]
        cells = {place: [self._text(number, place, row[place]) for number, row in upper if place < len(row)]
                 for place in others}
        found = [place for place in others if _look_like_photos(header[place], cells[place])]
        self._places = [header.index(name) for name in named] or found
        self._left = [place for place in others if any(cells[place]) and place not in self._places
                      and (place in found or is_photo_name(header[place]))]

    def log(self, above: int) -> None:
        """Say which columns are read by their look, and what is not read. above: the number of the header."""
        if self._places and not self._named:
            names = ", ".join(repr(self._name(place)) for place in self._places)
            say_once("INFO", f"{self._path}: photos are read from the columns {names}, by the look of their cells; "
                             "--column photo=NAME says which")
        for name in map(self._name, self._left):
            say_once("WARNING", f"{self._path}: the column {name!r} is not read; where it holds photos: "
                                f"--column photo={name}")
        if not self._places and not self._pictures.photos:
            say_once("WARNING", f"{self._path}: no photo column is read, so products have no photos; photo columns are "
                                "sku_img, spu_img_1, spu_img_2, ..., or say which: --column photo=NAME")
        lost = self._pictures.unbound + sum(len(found) for number, found in self._pictures.photos.items()
                                            if number <= above)
        if lost:
            say_once("WARNING", f"{self._path}: {lost} pictures lie beside or above the rows of products, and are not "
                                "read")

    def with_pictured(self, rows: Iterable[Row], above: int) -> Iterator[Row]:
        """Add the rows that hold a picture and no text."""
        pictured = sorted({number for found in (self._pictures.photos, self._pictures.faults) for number in found
                           if number > above})
        last = above
        for number, cells in heapq.merge(rows, ((number, []) for number in pictured), key=lambda row: row[0]):
            if number != last or cells:
                yield number, cells
            last = number

    def of_row(self, number: int, cells: Sequence[str]) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
        """Return column and address of each photo of a row, and what can't be taken out of the workbook and why."""
        photos = [(self._name(place), address) for place in self._places
                  for address in addresses_of(self._text(number, place, cells[place]))]
        photos += [(self._name(place), address)
                   for place, address in sorted(self._pictures.photos.get(number, ()), key=itemgetter(0))]
        return tuple(photos), tuple(f"{self._name(place)}: {fault}"
                                    for place, fault in self._pictures.faults.get(number, ()))

    def _text(self, number: int, place: int, text: str) -> str:
        if (number, place) in self._pictures.filled:
            return ""
        return text if "://" in text else self._pictures.links.get((number, place), text)

    def _name(self, place: int) -> str:
        return (self._header[place] if place < len(self._header) else "") or f"column {_letters(place)}"


def _look_like_photos(name: str, cells: Sequence[str]) -> bool:
    named = is_photo_name(name)
    addresses = [address for cell in cells for address in addresses_of(cell)]
    return (2 * sum(is_address(address, certain=not named) for address in addresses) > len(addresses)
            or (named and not addresses))


def _letters(place: int) -> str:
    return (_letters(place // 26 - 1) if place >= 26 else "") + chr(ord("A") + place % 26)
