"""A label that stands in columns of its own, one for each side: found by name or named, put together as one text."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sizes.units import AXES, UNIT, UNIT_KEYS, any_of, fold

SIDES = ("length", "width", "height", "unit")
_WORDS = {"l": "length", "w": "width", "h": "height", "d": "depth", "t": "thickness", "round": "diameter"}
_NAME = re.compile(rf"({any_of(AXES)})(?: ?[(\[]?({UNIT})[)\]]?)?")  # 长, Height in, 高(mm)


@dataclass(frozen=True)
class SideColumns:
    """Where the sides of a label stand: the column's place, the axis, the unit in the column's name."""

    sides: tuple[tuple[int, str, str], ...] = ()
    unit_place: int | None = None

    def label(self, cells: Sequence[str]) -> str:
        """Put a row's sides together: length: 12 cm, width: 8 cm, height: 15 cm."""
        shared = cells[self.unit_place] if self.unit_place is not None else ""
        parts = [f"{axis}: {cells[place]} {'' if _has_unit(cells[place]) else unit or shared}".rstrip()
                 for place, axis, unit in self.sides if cells[place]]
        return ", ".join(parts)


def find_sides(header: Sequence[str], mapping: Mapping[str, Sequence[str]]) -> SideColumns:
    """Find the columns of sides: those of --column length=..., else two or more that are named as sides are."""
    if any(side in mapping for side in SIDES[:3]):
        named = {name: side for side in SIDES[:3] for name in mapping.get(side, ()) if name in header}
        found = [(header.index(name), side, unit_in(name)) for name, side in named.items()]
    else:
        matches = [(place, match) for place, name in enumerate(header) if (match := _NAME.fullmatch(_plain(name)))]
        found = [(place, _WORDS[AXES[match[1]]], match[2] or "") for place, match in matches]
        if len({axis for _, axis, _ in found}) < max(2, len(found)):  # one alone, or two of a kind: of something else
            found = []
    units = mapping.get("unit") or [name for name in header if _plain(name) in UNIT_KEYS]
    return SideColumns(tuple(found), header.index(units[0]) if found and units and units[0] in header else None)


def is_side(name: str) -> bool:
    """Say whether a column is named as a side is: 长, Height in, 高(mm)."""
    return _NAME.fullmatch(_plain(name)) is not None


def unit_in(name: str) -> str:
    """Return the unit in a column's name, mm of 高(mm); "" where there is none."""
    found = re.search(rf"[ (\[]({UNIT})[)\]]?$", _plain(name))
    return found[1] if found else ""


def _has_unit(cell: str) -> bool:
    return re.search("[^0-9., ]", cell) is not None


def _plain(name: str) -> str:
    return fold(name).strip().lower()
