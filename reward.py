"""The reward of an answer: read the sizes in it, compare them with the label's. Pure functions, no torch.

    sort both sides descending;  reward = max(0, 1 - (1/N) * sum_i |pred_i - true_i| / true_i),  N = label dimensions

Labels are read strictly, since a wrong label teaches wrongly; answers leniently, since they are a model's words.
Every scan is linear and the search for JSON is bounded: a hostile answer of 10,000 characters costs under 1 ms.
"""

import json
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from numbers import Real
from typing import Any

SUCCESS_REWARD = 0.9
_LARGEST = 1e9  # cm; an answer's larger numbers are cut to it, so that its sizes stay finite
_MOST_OBJECTS, _MOST_DECODED, _MOST_NODES, _MOST_RUNS = 16, 4_000, 50, 200  # bounds on the work for one answer

# cm = number * first / second: whole numbers, so that 3 mm is exactly 0.3 cm.
_CM, _MM, _M, _INCH, _FOOT = (1, 1), (1, 10), (100, 1), (254, 100), (3048, 100)
_LATIN_UNITS = {
    "mm": _MM, "cm": _CM, "m": _M, "in": _INCH, "inch": _INCH, "inches": _INCH, "ft": _FOOT, "foot": _FOOT,
    "feet": _FOOT, "millimeters": _MM, "millimetres": _MM, "centimeters": _CM, "centimetres": _CM, "meters": _M,
    "metres": _M,
}
_UNITS = _LATIN_UNITS | {
    '"': _INCH, "″": _INCH, "”": _INCH, "毫米": _MM, "㎜": _MM, "厘米": _CM, "公分": _CM, "㎝": _CM, "米": _M,
    "英寸": _INCH, "英尺": _FOOT,
}
_UNIT_KEYS = ("unit", "units", "单位")
_DIMENSIONS = {
    "length": "l", "width": "w", "height": "h", "depth": "d", "长度": "l", "宽度": "w", "高度": "h", "深度": "d",
    "长": "l", "宽": "w", "高": "h", "深": "d",
}
_AXES = _DIMENSIONS | {letter: letter for letter in "lwhd"}


def _any_of(words: Iterable[str]) -> str:
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))


# The patterns see lower-case text; ++ and *+ never backtrack. Each search pattern begins with a plain character, and
# looks behind only after it: that is what lets re skip to the next candidate quickly.
# A unit ends with its letters, or at the x of 5mmx8mm.
_UNIT = rf"(?:(?:{_any_of(_LATIN_UNITS)})(?=[^a-z]|x ?[0-9.]|$)|{_any_of(_UNITS.keys() - _LATIN_UNITS.keys())})"
_AXIS = rf"(?:{_any_of(_AXES)})"
_NUMBER = r"(?P<number>[0-9.](?:(?<=[0-9]){whole}(?:\.[0-9]++)?+|(?<=\.)(?<![0-9.]\.)[0-9]++)(?:e[+-]?+[0-9]++)?+)"
_OWN_UNIT = rf"(?:\s*+[\])]?+\s*+(?P<unit>{_UNIT}))?+"
_TEXT_NUMBER = re.compile(_NUMBER.replace("{whole}", "[0-9]*+") + _OWN_UNIT)
_VALUE_NUMBER = re.compile(_NUMBER.replace("{whole}", "[0-9]*+(?:,[0-9]++)*+") + _OWN_UNIT)
_THOUSANDS = re.compile(r"[1-9][0-9]{0,2}(?:,[0-9]{3})++(?![0-9,])")
_UNKNOWN_WORD = re.compile(r"\s*+[^\W\d_]")
_QUOTATION = re.compile(r'"(?<![0-9]")(?<![0-9] ")')  # a quote that can't be the inch sign of a number
_UNIT_WORD = re.compile(
    r"(?:mm(?<![a-z]mm)|cm(?<![a-z]cm)|inch(?<![a-z]inch)(?:es)?+|毫米|厘米|公分|英寸|英尺)(?![a-z])"
)
_STATED_UNIT = re.compile(r"units?+'?+\s*+[:=]\s*+(?:'([^']*+)'|([^\s',;{}()\[\]0-9]++))")
_FULL_WIDTH = re.compile("[\uff01\uff03-\uff3b\uff3d-\uff5e\u3000]+")  # without quote and backslash, JSON's own signs
_OBJECT_START = re.compile(r'\{\s*+["}]')
# Objects become tuples of pairs: a repeated key is seen, and an array (a list) is never taken for an object.
_DECODER = json.JSONDecoder(object_pairs_hook=tuple, parse_constant=lambda _: None)

_LABEL_ITEM = re.compile(
    rf"(?:({_AXIS}) ?[:=]? ?)?(?P<number>-?(?:(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?+|\.[0-9]++))"
    rf"(?: ?\(({_AXIS})\))?(?: ?(?P<unit>{_UNIT})\.?)?(?: ?\(({_AXIS})\))?"
)
_LABEL_SEPARATOR = re.compile(
    r"(?P<times> ?[x×*] ?| by )|(?P<semicolon> ?; ?)|(?P<comma> ?, )|(?P<tight>,)|(?P<space> )"
)
_LABEL_END = re.compile(rf"(?:(?: ?[,;])? ?(?:({_UNIT})|\(({_UNIT})\)))?\.?")
_LABEL_BRACKETS = re.compile(rf"(?:\[ ?(.+?) ?\]|\( ?(.+?) ?\))(?: ?({_UNIT}))?\.?")
_ACCEPTED = "accepted are one to three sizes such as 12 8 15, [66.0, 53.0, 73.0, cm], 12 x 8 x 15 inch"

_Slot = tuple[float | None, Any]  # a number, and its unit as found ("" where none is stated)


class LabelError(ValueError):
    """Say what was found in a label that can't be trusted, and what is accepted."""


@dataclass(frozen=True)
class Reading:
    """The sizes in an answer: up to three slots in cm, None = missing or unreadable; reason = why none can be read."""

    sizes: tuple[float | None, ...]
    reason: str = ""
    units: tuple[str, ...] = field(default=(), compare=False)  # as found, or cm where none is stated

    @property
    def valid(self) -> bool:
        return any(size is not None for size in self.sizes)


@dataclass(frozen=True)
class RewardParts:
    """A reward and what it is made of: sizes in cm, descending; one error per label dimension, largest first.

    named: the parts of a reward of the user's own, weighted; their sum is then the reward.
    """

    reward: float
    sizes: tuple[float, ...]
    errors: tuple[float, ...]
    valid: bool
    reason: str
    named: tuple[tuple[str, float], ...] = ()


def calculate_reward(answer: str, sample_label: str | Sequence[float]) -> float:
    """Score an answer in [0, 1] against a label: a label string, or numbers in cm. Never raises."""
    return score_answer(answer, sample_label).reward


def score_answer(answer: str, label: str | Sequence[float]) -> RewardParts:
    """Score an answer and keep the parts. An unreadable label scores 0.0, not valid, and is the reason."""
    reading = read_answer(answer)
    sizes = tuple(sorted((size for size in reading.sizes if size is not None), reverse=True))
    try:
        true_sizes = sorted(parse_label(label), reverse=True)
    except LabelError as error:
        return RewardParts(0.0, sizes, (), False, reading.reason or str(error))
    errors = [abs(size - true) / true for size, true in zip(sizes, true_sizes, strict=False)]
    errors += [1.0] * (len(true_sizes) - len(sizes))  # no credit for what the answer lacks
    reward = max(0.0, 1 - sum(errors) / len(true_sizes))
    return RewardParts(reward, sizes, tuple(errors), reading.valid, reading.reason)


def read_answer(answer: str) -> Reading:
    """Read up to three sizes from the first JSON object in an answer, else from its first three numbers."""
    if not isinstance(answer, str):
        return Reading((), "the answer is not text")
    text = _fold(answer)
    found, inside_broken = _find_object(text)
    if found is None:
        slots = _text_slots(_plain(text), "")
    else:  # the unit of a whole object inside a broken one may stand in the broken part
        slots = _object_slots(found, _stated_unit(_plain(text)) if inside_broken else "")
    for _, unit in slots:
        if _unit_name(unit) not in _UNITS:
            return Reading((), f"the unit {_unit_name(unit)[:40]!r} is not a known unit of length")
    sizes = tuple(None if number is None else _to_cm(number, _unit_name(unit)) for number, unit in slots)
    return Reading(sizes, "" if any(size is not None for size in sizes) else "the answer holds no readable size",
                   tuple(_unit_name(unit) for _, unit in slots))


def _find_object(text: str) -> tuple[tuple | None, bool]:
    """Return the first JSON object with a dimension key, else the first; and whether a broken one began before it."""
    first, broken, position, decoded = None, False, 0, 0
    for _ in range(_MOST_OBJECTS):
        opening = _OBJECT_START.search(text, position)
        if opening is None or decoded > _MOST_DECODED:
            break
        try:
            found, position = _DECODER.raw_decode(text, opening.start())
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
            pairs = [("unit" if isinstance(child, str) and child.strip().lower() in _UNITS else "", child)
                     for child in value[:_MOST_NODES]]
        unit = next((child for key, child in pairs if key in _UNIT_KEYS and child not in (None, "")), unit)
        stack += [(key in _DIMENSIONS, child, unit) for key, child in reversed(pairs) if key not in _UNIT_KEYS]
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
    return [(float(min(value, _LARGEST)), unit)]


def _string_slots(text: str, unit: Any) -> list[_Slot]:
    """Read one number with words before it and perhaps a unit; several numbers are read as text."""
    matches = list(islice(_VALUE_NUMBER.finditer(text), 2))
    if not matches:
        return [(None, unit)]
    match, number = matches[0], _to_float(matches[0]["number"])
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
        number = None if _is_negative(text, match.start()) else _to_float(match["number"])
        slots.append((number, match["unit"] or stated or following))
        following = match["unit"] or following
    return slots[::-1]


def parse_label(text: str | Sequence[float]) -> tuple[float, ...]:
    """Read a label's one to three sizes in cm, in the order written; raise LabelError rather than guess.

    text: numbers with separators, brackets, axis names and units (cm where none is written); a JSON object with the
    keys length, width, height and unit; or numbers in cm that are no string.
    """
    try:
        if isinstance(text, str):
            label = re.sub(r"[ \t]+", " ", _fold(text).lower()).strip()
            if label in ("", "nan", "n/a", "none", "null"):
                raise LabelError("it is missing")
            sizes = _json_sizes(label) if label.startswith("{") else _written_sizes(label)
        elif text is None or isinstance(text, float) and math.isnan(text):
            raise LabelError("it is missing")
        else:
            sizes = [_label_number(number) for number in (text if isinstance(text, list | tuple) else [text])]
        if not 1 <= len(sizes) <= 3:
            raise LabelError(f"found {len(sizes)} numbers" if sizes else "it is missing")
        if not all(map(math.isfinite, sizes)):
            raise LabelError("found a size that is not finite")
        if min(sizes) <= 0:
            raise LabelError(f"found {min(sizes):g}, not positive")
    except LabelError as fault:
        shown = repr(text[:80]) if isinstance(text, str) else f"of type {type(text).__name__}"
        raise LabelError(f"label {shown}: {fault}; {_ACCEPTED}") from None
    return tuple(sizes)


def _label_number(number: Any) -> float:
    if isinstance(number, bool) or not isinstance(number, Real):
        raise LabelError(f"found a value of type {type(number).__name__}, not a number")
    try:
        return float(number)
    except OverflowError:
        return math.inf


def _json_sizes(label: str) -> list[float]:
    try:
        pairs = [(key.strip(), value) for key, value in _DECODER.decode(label)]
    except (ValueError, RecursionError):
        raise LabelError("found JSON that can't be decoded") from None
    units = [value for key, value in pairs if key in _UNIT_KEYS]
    if len(units) > 1 or units and not (isinstance(units[0], str) and _unit_name(units[0]) in _UNITS):
        raise LabelError("found more than one unit, or an unknown one")
    axes = [_DIMENSIONS.get(key) for key, _ in pairs if key not in _UNIT_KEYS]
    if None in axes or len(set(axes)) < len(axes):
        raise LabelError("found a key that is unknown or given twice")
    numbers = [_label_number(value) for key, value in pairs if key not in _UNIT_KEYS]
    return [_to_cm(number, _unit_name(units[0]) if units else "cm") for number in numbers]


def _written_sizes(label: str) -> list[float]:
    brackets = _LABEL_BRACKETS.fullmatch(label)
    body = (brackets[1] or brackets[2]) if brackets else label
    if brackets is None and re.search("[0-9],[0-9]", body):
        raise LabelError("found a comma between digits, which may separate sizes, decimals or thousands")
    items, separators, position, end = [], set(), 0, None
    while end is None:
        item = _LABEL_ITEM.match(body, position)
        if item is None or len(items) == 3:
            raise LabelError(f"found {body[position:position + 40]!r} in place of size {len(items) + 1}")
        items.append(item)
        end = _LABEL_END.fullmatch(body, item.end())
        separator = _LABEL_SEPARATOR.match(body, item.end())
        if end is None and separator is None:
            raise LabelError(f"found {body[item.end():item.end() + 40]!r} after {item[0]!r}")
        if end is None:
            separators.add(separator.lastgroup)
            position = separator.end()
    if len(separators) > 1:
        raise LabelError("found more than one kind of separator")
    axes = [item[group] for item in items for group in (1, 3, 5) if item[group]]
    if axes and (len(axes) != len(items) or len({_AXES[axis] for axis in axes}) < len(axes)):
        raise LabelError("found an axis that is given twice, or not for every size")
    if "d" in axes and len(items) < 3:
        raise LabelError("found a D that may be a depth or a diameter")
    own_units = [item["unit"] for item in items]
    units_at_end = [unit for unit in (own_units[-1], _captured(end), brackets and brackets[3]) if unit]
    if len(units_at_end) > 1 or any(own_units) and not units_at_end:
        raise LabelError("found a unit that does not say which sizes it holds for")
    units = [unit or (units_at_end or ["cm"])[0] for unit in own_units]
    if len({_UNITS[unit] for unit in units}) > 1 and separators != {"times"}:
        raise LabelError("found several units, which may be parts of one size, as in 5 ft 3 in")
    return [_to_cm(float(item["number"]), unit) for item, unit in zip(items, units, strict=True)]


def _fold(text: str) -> str:
    """Turn full-width signs into ASCII: only the first runs of them, so that the work stays bounded."""
    return _FULL_WIDTH.sub(lambda run: unicodedata.normalize("NFKC", run[0]), text, count=_MOST_RUNS)


def _plain(text: str) -> str:
    """Lower, and turn double quotes into single ones unless each of them may be the inch sign of a number."""
    text = text.lower()
    return text.replace('"', "'") if _QUOTATION.search(text) else text


def _captured(match: re.Match | None) -> str:
    return next((text for text in match.groups() if text), "") if match else ""


def _stated_unit(text: str) -> str:
    """Find the unit that broken JSON or prose states, as in 'unit': 'mm'."""
    return _captured(_STATED_UNIT.search(text.replace("单位", "unit")))


def _unit_name(unit: Any) -> str:
    if not isinstance(unit, str):
        return f"of type {type(unit).__name__}"
    return unit.lower().strip(" \t\r\n.。") or "cm"


def _to_cm(number: float, unit: str) -> float:
    first, second = _UNITS[unit]
    return number * first / second


def _to_float(digits: str) -> float | None:
    """Convert 12, 12.5, 1,200 and the decimal comma of 12,5; any other use of commas is None."""
    if _THOUSANDS.match(digits):
        digits = digits.replace(",", "")
    elif digits.count(",") == 1 and "." not in digits:
        digits = digits.replace(",", ".")
    return None if "," in digits else min(float(digits), _LARGEST)


def _is_negative(text: str, start: int) -> bool:
    """Tell the sign of -8 from the separator of 12-8-15 and 12cm-8cm."""
    before, sign = text[max(start - 2, 0):start - 1], text[max(start - 1, 0):start]
    return sign in ("-", "−") and not (before.isalnum() or before in ('"', "″", "”", ")", "]"))


if __name__ == "__main__":
    import sys

    from doctor import main

    sys.exit(main(sys.argv[1:]))
