"""The answer reader: up to three sizes in cm from what a model wrote, leniently, since they are a model's words.

It never raises. Every scan is linear and the search for JSON is bounded: a hostile answer of 10,000 characters costs
under 1 ms. Standard library only.
"""

import json
import re
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from sizes.units import (
    DECODER,
    DIMENSIONS,
    LARGEST,
    NUMBER,
    NUMBER_WITH_COMMAS,
    UNIT,
    UNIT_KEYS,
    UNITS,
    fold,
    to_cm,
    to_float,
    unit_name,
)

_MOST_OBJECTS, _MOST_DECODED, _MOST_NODES = 16, 4_000, 50  # bounds on the work for one answer
_OWN_UNIT = rf"(?:\s*+[\])]?+\s*+(?P<unit>{UNIT}))?+"
_TEXT_NUMBER = re.compile(NUMBER + _OWN_UNIT)
_VALUE_NUMBER = re.compile(NUMBER_WITH_COMMAS + _OWN_UNIT)
_UNKNOWN_WORD = re.compile(r"\s*+[^\W\d_]")
_QUOTATION = re.compile(r'"(?<![0-9]")(?<![0-9] ")')  # a quote that can't be the inch sign of a number
_UNIT_WORD = re.compile(
    r"(?:mm(?<![a-z]mm)|cm(?<![a-z]cm)|inch(?<![a-z]inch)(?:es)?+|毫米|厘米|公分|英寸|英尺)(?![a-z])"
)
_STATED_UNIT = re.compile(r"units?+'?+\s*+[:=]\s*+(?:'([^']*+)'|([^\s',;{}()\[\]0-9]++))")
_OBJECT_START = re.compile(r'\{\s*+["}]')

_Slot = tuple[float | None, Any]  # a number, and its unit as found ("" where none is stated)


@dataclass(frozen=True)
class Reading:
    """The sizes in an answer: up to three slots in cm, None = missing or unreadable; reason = why none can be read."""

    sizes: tuple[float | None, ...]
    reason: str = ""
    units: tuple[str, ...] = field(default=(), compare=False)  # as found, or cm where none is stated

    @property
    def valid(self) -> bool:
        return any(size is not None for size in self.sizes)


def read_answer(answer: str) -> Reading:
    """Read up to three sizes from the first JSON object in an answer, else from its first three numbers."""
    if not isinstance(answer, str):
        return Reading((), "the answer is not text")
    text = fold(answer)
    found, inside_broken = _find_object(text)
    if found is None:
        slots = _text_slots(_plain(text), "")
    else:  # the unit of a whole object inside a broken one may stand in the broken part
        slots = _object_slots(found, _stated_unit(_plain(text)) if inside_broken else "")
    for _, unit in slots:
        if unit_name(unit) not in UNITS:
            return Reading((), f"the unit {unit_name(unit)[:40]!r} is not a known unit of length")
    sizes = tuple(None if number is None else to_cm(number, unit_name(unit)) for number, unit in slots)
    return Reading(sizes, "" if any(size is not None for size in sizes) else "the answer holds no readable size",
                   tuple(unit_name(unit) for _, unit in slots))


def _find_object(text: str) -> tuple[tuple | None, bool]:
    """Return the first JSON object with a dimension key, else the first; and whether a broken one began before it."""
    first, broken, position, decoded = None, False, 0, 0
    for _ in range(_MOST_OBJECTS):
        opening = _OBJECT_START.search(text, position)
        if opening is None or decoded > _MOST_DECODED:
            break
        try:
            found, position = DECODER.raw_decode(text, opening.start())
        except json.JSONDecodeError as error:
            broken, position = True, opening.start() + 1  # an object inside the broken one may be whole
            decoded += error.pos - opening.start()
            continue
        except (RecursionError, ValueError):  # nested too deep, or an integer longer than Python converts
            break
        decoded += position - opening.start()
        if any(is_dimension for is_dimension, _, _ in _walk(found, "")):
            return found, broken
        first = first or (found, broken)
    return first or (None, broken)


def _walk(root: Any, unit: Any) -> list[tuple[bool, Any, Any]]:
    """List (is a dimension, value, unit in force) in order of appearance. A dimension's own value is not entered."""
    entries, stack = [], [(False, root, unit)]
    for _ in range(_MOST_NODES):
        if not stack:
            break
        is_dimension, value, unit = stack.pop()
        if is_dimension or not isinstance(value, tuple | list):
            entries.append((is_dimension, value, unit))
            continue
        if isinstance(value, tuple):
            pairs = [(key.strip().lower(), child) for key, child in value[:_MOST_NODES]]
        else:  # the "cm" of [12, 8, 15, "cm"] counts as a unit key
            pairs = [("unit" if isinstance(child, str) and child.strip().lower() in UNITS else "", child)
                     for child in value[:_MOST_NODES]]
        unit = next((child for key, child in pairs if key in UNIT_KEYS and child not in (None, "")), unit)
        stack += [(key in DIMENSIONS, child, unit) for key, child in reversed(pairs) if key not in UNIT_KEYS]
    return entries


def _object_slots(found: tuple, unit: Any) -> list[_Slot]:
    entries = _walk(found, unit)
    dimensions = [(value, unit) for is_dimension, value, unit in entries if is_dimension]
    if not dimensions:
        return [slot for _, value, unit in entries[:3] for slot in _leaf_slots(value, unit)][:3]
    slots = []
    for value, unit in dimensions[:3]:
        if isinstance(value, tuple | list):  # {"value": 12, "unit": "cm"}
            _, value, unit = next(iter(_walk(value, unit)), (False, None, unit))
        read = _leaf_slots(value, unit)
        slots.append(read[0] if len(read) == 1 else (None, unit))  # two numbers are not one size
    return slots


def _leaf_slots(value: Any, unit: Any) -> list[_Slot]:
    if isinstance(value, str):
        return _string_slots(_plain(value), unit)
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        return [(None, unit)]
    return [(float(min(value, LARGEST)), unit)]


def _string_slots(text: str, unit: Any) -> list[_Slot]:
    """Read one number with words before it and perhaps a unit; several numbers are read as text."""
    matches = list(islice(_VALUE_NUMBER.finditer(text), 2))
    if not matches:
        return [(None, unit)]
    match, number = matches[0], to_float(matches[0]["number"])
    if len(matches) == 2 or number is None:
        return _text_slots(text, unit)
    unknown = not match["unit"] and _UNKNOWN_WORD.match(text, match.end())  # 12 kg is not a size
    return [(None if unknown or _is_negative(text, match.start()) else number, match["unit"] or unit)]


def _text_slots(text: str, unit: Any) -> list[_Slot]:
    """Read the first three numbers. A number without a unit takes the stated one, else the next one, else `unit`."""
    matches = list(islice(_TEXT_NUMBER.finditer(text), 3))
    stated = _stated_unit(text)
    word = _UNIT_WORD.search(text, matches[-1].end()) if matches else None
    following, slots = word[0] if word else unit, []
    for match in reversed(matches):
        number = None if _is_negative(text, match.start()) else to_float(match["number"])
        slots.append((number, match["unit"] or stated or following))
        following = match["unit"] or following
    return slots[::-1]


def _plain(text: str) -> str:
    """Lower, and turn double quotes into single ones unless each of them may be the inch sign of a number."""
    text = text.lower()
    return text.replace('"', "'") if _QUOTATION.search(text) else text


def _captured(match: re.Match | None) -> str:
    return next((text for text in match.groups() if text), "") if match else ""


def _stated_unit(text: str) -> str:
    """Find the unit that broken JSON or prose states, as in 'unit': 'mm'."""
    return _captured(_STATED_UNIT.search(text.replace("单位", "unit")))


def _is_negative(text: str, start: int) -> bool:
    """Tell the sign of -8 from the separator of 12-8-15 and 12cm-8cm."""
    before, sign = text[max(start - 2, 0):start - 1], text[max(start - 1, 0):start]
    return sign in ("-", "−") and not (before.isalnum() or before in ('"', "″", "”", ")", "]"))
