"""The parts of an .xlsx as XML, and what they name each other: Open Packaging Conventions (ECMA-376, part 2)."""

import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from xml.etree.ElementTree import Element, ParseError, fromstring
from zipfile import BadZipFile, ZipFile
from zlib import error as ZlibError

from ground.errors import UserError
from sheets.cells import DataError


class Package:
    """An opened workbook's parts: /xl/workbook.xml. Capitals don't count, since programs differ in them."""

    def __init__(self, archive: ZipFile):
        self._archive = archive
        self._names = {f"/{name}".lower(): name for name in archive.namelist()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, part: str) -> bool:
        return part.lower() in self._names

    def size(self, part: str) -> int:
        """Return how many bytes a part has."""
        return self._archive.getinfo(self._names[part.lower()]).file_size

    def open(self, part: str) -> IO[bytes]:
        """Open a part to read it."""
        return self._archive.open(self._names[part.lower()])

    def tree(self, part: str) -> Element:
        """Read a part as XML; one that is not there is empty."""
        if part not in self:
            return Element("none")
        with self.open(part) as file:
            return fromstring(file.read())

    def targets(self, part: str) -> dict[str, str]:
        """Return what a part names by id: other parts, which begin with /, and addresses outside."""
        folder, name = posixpath.split(part)
        found = {}
        for entry in self.tree(posixpath.join(folder, "_rels", f"{name}.rels")):
            target = entry.get("Target", "")
            if entry.get("TargetMode") != "External":
                target = posixpath.normpath(posixpath.join(folder, target))
            found[entry.get("Id", "")] = target
        return found

    def worksheet(self, title: str) -> str:
        """Return the part that holds the worksheet of this name."""
        book = next(target for target in self.targets("/").values() if target.lower().endswith("workbook.xml"))
        ids = {sheet.get("name"): attribute(sheet, "id") for sheet in self.tree(book).iter() if name(sheet) == "sheet"}
        return self.targets(book)[ids[title]]


@contextmanager
def opened_package(path: Path) -> Iterator[Package]:
    """Open an .xlsx; raises DataError where it is damaged."""
    try:
        with ZipFile(path) as archive:
            yield Package(archive)
    except UserError:
        raise
    except (BadZipFile, ZlibError, EOFError, RuntimeError, ParseError, LookupError, ValueError, StopIteration) as error:
        raise DataError(f"{path}: is damaged: {error!r}. Open it in a spreadsheet program and save it again") from error


def name(element: Element) -> str:
    """Return an element's name without its namespace, of which the two kinds of the format have different ones."""
    return element.tag.rpartition("}")[2]


def attribute(element: Element, wanted: str) -> str:
    """Return an attribute's value by its name without namespace; "" where there is none."""
    return next((value for key, value in element.items() if key.rpartition("}")[2] == wanted), "")
