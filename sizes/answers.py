"""The answer reader: up to three sizes in cm from what a model wrote, leniently, since they are a model's words.

What it thought aloud is not the answer; what it numbers or counts, and what has another unit than a length, is no size.

It never raises. Every scan is linear and the search for JSON is bounded: a hostile answer of 10,000 characters costs
under 1 ms. Standard library only.
"""

import json
import re
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

from sizes.units import (
    AXES,
    DECODER,
    DIMENSIONS,
    LARGEST,
    NUMBER,
    NUMBER_WITH_COMMAS,
    UNIT,
    UNIT_KEYS,
    UNITS,
    any_of,
    fold,
    to_cm,
    to_float,
    unit_name,
)

_MOST_OBJECTS, _MOST_DECODED, _MOST_NODES = 16, 4_000, 50  # bounds on the work for one answer
_OWN_UNIT = rf"(?:\s*+[\])]?+\s*+(?P<unit>{UNIT}))?+"
_TEXT_NUMBER = re.compile(NUMBER + _OWN_UNIT)
_VALUE_NUMBER = re.compile(NUMBER_WITH_COMMAS + _OWN_UNIT)
# Keys of a dimension: length, product_length, length_mm, length (inch), 长（厘米）; with _unit behind, its unit.
_KEY = re.compile(rf"(?:\w+_)?(?P<axis>{any_of([*DIMENSIONS, 'breadth', 'l', 'w', 'h', 'd', 'thickness', 'diameter'])})"
                  rf"(?:[ _]?[(\[]?(?:(?P<unit>{UNIT})|(?P<of>units?))[)\]]?)?")
_SIZE_KEYS = ("", "size", "sizes", "dimension", "dimensions", "measurements", "answer", "result", "value", "尺寸",
              "规格")
_THOUGHT, _THINKING = "</think>", "<think>"
_BEHIND = re.compile(rf"\s*+({UNIT})(?![a-z])")  # a unit behind an object
# Numbers that are no sizes: of a list or a photo, of pieces, with another unit, of a date or version.
_MARK_OF_LIST = re.compile(r"[.)、](?![0-9])")
_PHOTO_BEFORE = re.compile(r"(?:图片?|照片|photo|image|picture|fig(?:ure)?\.?) ?#?$")
_OTHER_BEHIND = re.compile(
    r" ?(?:(?:photos?|images?|pictures?|pcs|pieces?|packs?|kgs?|g|mg|lbs?|pounds?|oz|ounces?|ml|px|pixels?)(?![a-z])"
    r"|张|件|个|只|片|套|克|公斤|千克|斤|毫升|升|像素|%|元|岁|\.[0-9])")
_MOST_NUMBERS = 60  # looked at for three that are sizes
_INCH_SIGN = re.compile("([0-9])''")
_UNKNOWN_WORD = re.compile(r"\s*+[^\W\d_]")
_QUOTATION = re.compile(r'"(?<![0-9]")(?<![0-9] ")')  # a quote that can't be the inch sign of a number
_UNIT_WORD = re.compile(
    r"(?:mm(?<![a-z]mm)|cm(?<![a-z]cm)|inch(?<![a-z]inch)(?:es)?+|毫米|厘米|公分|英寸|英尺)(?![a-z])"
)
_STATED_UNIT = re.compile(r"units?+'?+\s*+[:=]\s*+(?:'([^']*+)'|([^\s',;{}()\[\]0-9]++))")
_OBJECT_START = re.compile(r'\{\s*+["}]')

# Words that name a number's axis, before or behind it.
_AXIS_BEFORE = re.compile(rf"(?<![a-z])({any_of(AXES)}) ?[:=(]?(?:是|为|约|about|=)* ?$")
_AXIS_BEHIND = re.compile(rf" ?\(?({any_of(AXES)})(?![a-z])")

_Slot = tuple[float | None, Any, str]  # a number, its unit as found ("" where none is stated), its axis


@dataclass(frozen=True)
class Reading:
    """The sizes in an answer: up to three slots in cm, None = missing or unreadable; reason = why none can be read.

    axes: what each slot is named, as in a Label; "" where it is not.
    """

    sizes: tuple[float | None, ...]
    reason: str = ""
    units: tuple[str, ...] = field(default=(), compare=False)  # as found, or cm where none is stated
    axes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def valid(self) -> bool:
        return any(size is not None for size in self.sizes)


def read_answer(answer: str) -> Reading:
    """Read up to three sizes from the first JSON object in an answer, else from its first three numbers."""
    if not isinstance(answer, str):
        return Reading((), "the answer is not text")
    text = fold(answer.rpartition(_THOUGHT)[2].partition(_THINKING)[0])
    found, inside_broken, end = _find_object(text)
    if found is None:
        plain = _plain(text)
        slots = _text_slots(_INCH_SIGN.sub(r'\1"', plain) if "''" in plain else plain, "")
    else:  # the unit of a whole object inside a broken one may stand in the broken part
        behind = _BEHIND.match(text[end:end + 40].lower())
        slots = _object_slots(found, _stated_unit(_plain(text)) if inside_broken else behind[1] if behind else "")
    for _, unit, _ in slots:
        if unit_name(unit) not in UNITS:
            return Reading((), f"the unit {unit_name(unit)[:40]!r} is not a known unit of length")
    sizes = tuple(None if number is None else to_cm(number, unit_name(unit)) for number, unit, _ in slots)
    return Reading(sizes, "" if any(size is not None for size in sizes) else "the answer holds no readable size",
                   tuple(unit_name(unit) for _, unit, _ in slots), tuple(axis for *_, axis in slots))


def _find_object(text: str) -> tuple[tuple | None, bool, int]:
    """Return the last JSON object with a dimension key, else the first; whether a broken one began before; its end."""
    best, other, broken, position, decoded = None, None, False, 0, 0
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
        if _has_axis(found):
            best, broken = (found, broken, position), False
        other = other or (found, broken, position)
    return best or other or (None, broken, 0)


def _has_axis(root: tuple) -> bool:
    """Tell whether an object names a dimension anywhere, without listing all that is in it."""
    stack: list[Any] = [root]
    for _ in range(_MOST_NODES):
        if not stack:
            break
        value = stack.pop()
        pairs = value[:_MOST_NODES] if isinstance(value, tuple) else [("", child) for child in value[:_MOST_NODES]]
        if any(_read_key(key.strip().lower())[0] for key, _ in pairs):
            return True
        stack += [child for _, child in pairs if isinstance(child, tuple | list)]
    return False


class _Entry(NamedTuple):
    """A value in a JSON object that is no container, or a dimension's own value, with what holds for it."""

    axis: str  # "" for what is no dimension
    key: str
    depth: int
    value: Any
    unit: Any


def _walk(root: Any, unit: Any) -> list[_Entry]:
    """List the entries in order of appearance. A dimension's own value is not entered."""
    entries, stack = [], [_Entry("", "", 0, root, unit)]
    for _ in range(_MOST_NODES):
        if not stack:
            break
        entry = stack.pop()
        if entry.axis or not isinstance(entry.value, tuple | list):
            entries.append(entry)
            continue
        if isinstance(entry.value, tuple):
            pairs = [(key.strip().lower(), child) for key, child in entry.value[:_MOST_NODES]]
        else:  # the "cm" of [12, 8, 15, "cm"] counts as a unit key
            pairs = [("unit" if isinstance(child, str) and child.strip().lower() in UNITS else entry.key, child)
                     for child in entry.value[:_MOST_NODES]]
        stack += reversed(_children(pairs, entry))
    return entries


def _children(pairs: list[tuple[str, Any]], parent: _Entry) -> list[_Entry]:
    """The entries of one container: units taken out and put where they hold."""
    unit = next((child for key, child in pairs if key in UNIT_KEYS and child not in (None, "")), parent.unit)
    read = [(key, *_read_key(key), child) for key, child in pairs if key not in UNIT_KEYS]
    units_of = {axis: child for _, axis, _, is_unit, child in read if is_unit}
    return [_Entry(axis, key, parent.depth + 1, child, own or units_of.get(axis) or unit)
            for key, axis, own, is_unit, child in read if not is_unit]


@lru_cache(1024)
def _read_key(key: str) -> tuple[str, str, bool]:
    """The dimension that a key names, "" for none; the unit in it; whether it stands for the dimension's unit."""
    match = _KEY.fullmatch(key) if len(key) <= 40 else None
    return (match["axis"], match["unit"] or "", bool(match["of"])) if match else ("", "", False)


def _object_slots(found: tuple, unit: Any) -> list[_Slot]:
    """Read the dimensions of the depth that has most of them; without any, what is called a size."""
    entries = _walk(found, unit)
    dimensions = [entry for entry in entries if entry.axis]
    if not dimensions:
        sizes = [entry for entry in entries if entry.key in _SIZE_KEYS]
        return [slot for entry in sizes[:3] for slot in _leaf_slots(entry.value, entry.unit)][:3]
    depths = [entry.depth for entry in dimensions]
    fullest = max(sorted(set(depths)), key=depths.count)
    slots = []
    for axis, _, _, value, unit in [entry for entry in dimensions if entry.depth == fullest][:3]:
        if isinstance(value, tuple | list):  # {"value": 12, "unit": "cm"}
            inner = [entry for entry in _walk(value, unit) if not isinstance(entry.value, str) or entry.value]
            value, unit = (inner[0].value, inner[0].unit) if len(inner) == 1 else (None, unit)
        read = _leaf_slots(value, unit)
        number, unit, _ = read[0] if len(read) == 1 else (None, unit, "")  # two numbers are not one size
        slots.append((number, unit, AXES[axis]))
    return slots


def _leaf_slots(value: Any, unit: Any) -> list[_Slot]:
    if isinstance(value, str):
        return _string_slots(_plain(value), unit)
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        return [(None, unit, "")]
    return [(float(min(value, LARGEST)), unit, "")]


def _string_slots(text: str, unit: Any) -> list[_Slot]:
    """Read one number with words before it and perhaps a unit; several numbers are read as text."""
    matches = list(islice(_VALUE_NUMBER.finditer(text), 2))
    if not matches:
        return [(None, unit, "")]
    match, number = matches[0], to_float(matches[0]["number"])
    if len(matches) == 2 or number is None:
        return _text_slots(text, unit)
    unknown = not match["unit"] and _UNKNOWN_WORD.match(text, match.end())  # 12 kg is not a size
    return [(None if unknown or _is_negative(text, match.start()) else number, match["unit"] or unit, "")]


def _text_slots(text: str, unit: Any) -> list[_Slot]:
    """Read the first three numbers. A number without a unit takes the stated one, else the next one, else `unit`."""
    numbers = islice(_TEXT_NUMBER.finditer(text), _MOST_NUMBERS)
    matches = list(islice((match for match in numbers if match["unit"] or not _is_no_size(text, match)), 3))
    stated = _stated_unit(text)
    word = _UNIT_WORD.search(text, matches[-1].end()) if matches else None
    following, slots = word[0] if word else unit, []
    for match in reversed(matches):
        number = None if _is_negative(text, match.start()) else to_float(match["number"])
        slots.append((number, match["unit"] or stated or following, _axis_around(text, match)))
        following = match["unit"] or following
    return slots[::-1]


def _axis_around(text: str, match: re.Match) -> str:
    start, end = match.span()
    found = _AXIS_BEFORE.search(text[max(start - 14, 0):start]) or _AXIS_BEHIND.match(text[end:end + 14])
    return AXES[found[1]] if found else ""


def _is_no_size(text: str, match: re.Match) -> bool:
    """Tell numbers that stand for something else than a size by what is around them."""
    start, end = match.span("number")
    before = text[max(start - 10, 0):start]
    numbers_a_line = end - start <= 2 and before.rpartition("\n")[2].strip(" \t") == "" and (
        start <= 10 or "\n" in before) and _MARK_OF_LIST.match(text, end)
    return bool(numbers_a_line or _PHOTO_BEFORE.search(before) or _OTHER_BEHIND.match(text, end)
                or before[-1:] == "." and before[-2:-1].isdigit())


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
