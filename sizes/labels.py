"""The label reader: one to three sizes in cm from what people write, or a refusal that says what is wrong.

Labels are read strictly, since a wrong label teaches wrongly: what can be read in two ways is refused, never guessed.
Standard library only.
"""

import math
import re
from collections.abc import Sequence
from numbers import Real
from typing import Any, Literal

from ground.errors import UserError
from sizes.units import (
    DECODER,
    DIGITS,
    DIMENSIONS,
    FOOT,
    INCH,
    LATIN_UNITS,
    MM,
    THOUSANDS,
    UNIT_KEYS,
    UNITS,
    any_of,
    fold,
    to_cm,
    unit_name,
    unit_pattern,
)

_LONGEST = 400  # characters of a label; more is a description
_ROUND = dict.fromkeys(("diameter", "diam", "dia", "直径", "φ", "ø", "⌀", "Φ"), "round")
_AXES = DIMENSIONS | _ROUND | {letter: letter for letter in "lwhd"} | {
    "long": "l", "wide": "w", "high": "h", "tall": "h", "deep": "d", "thick": "t", "thickness": "t", "厚度": "t",
    "厚": "t"}
# An axis, too, ends with its letters, or at the x of 5mmx8mm.
_LETTERS_END = rf"(?=[^a-z]|x ?(?:[0-9.]|{any_of(_AXES)})|$)"
_UNIT = unit_pattern(_LETTERS_END)
_AXIS = rf"(?:{any_of(_AXES)})"
_TOLERANCE = r"(?:±|\+/-|\+-) ?[0-9.]++"
_BROKEN_INCH = r"(?: [0-9]{1,2}/(?:2|4|8|16|32|64)(?![0-9]))?"  # the 5/8 of 19 5/8"
_ITEM = (rf"(?:(?P<before>{_AXIS}) ?[:=]? ?)?(?P<number>-?{DIGITS}{_BROKEN_INCH})(?![0-9²³]|\.[0-9])"
         rf"(?: ?\((?P<inside>{_AXIS})\))?(?: ?(?P<unit>{_UNIT})\.?)?"
         rf"(?(before)|(?: ?(?:\((?P<after>{_AXIS})\)|(?P<behind>{_AXIS}){_LETTERS_END}))?)"
         rf"(?: ?\(?{_TOLERANCE}(?: ?(?P<tolerance_unit>{_UNIT}))?\)?)?")
_ITEM_WITH_COMMAS = re.compile(_ITEM.replace("{commas}", "(?:,[0-9]++)*+"))
_ITEM_PLAIN = re.compile(_ITEM.replace("{commas}", ""))
_SEPARATOR = re.compile(rf"(?P<times> ?[x*] ?| by )|(?P<semicolon> ?; ?)|(?P<comma> ?, )|(?P<tight>,)"
                        rf"|(?P<line> ?\n ?)|(?P<space> )|(?P<axis>(?={_AXIS}))")
_AXIS_ORDER = r"\(?[lwhd长宽高深](?: ?[x*/]? ?[lwhd长宽高深]){1,2}\)?"
_OPENING = re.compile(  # words that may stand before the sizes, an order of axes, the unit
    rf"(?:(?:产品|商品)?(?:尺寸|规格)|(?:product |item )?(?:size|dimensions?)|measures)?"
    rf" ?(?P<order>{_AXIS_ORDER}(?=[ :=(]))? ?(?:\((?P<unit>{_UNIT})\))? ?[:=]? ?")
_EXTRA = (r"(?:[0-9]++(?:[.,][0-9]++)?+ ?(?:kgs?|g|grams?|kilograms?|lbs?|pounds?|oz|ounces?|千克|公斤|克|斤"  # weight
          r"|l|ml|lit(?:er|re)s?|gal(?:lons?)?|升|毫升"  # volume
          r"|packs?|pcs?|pieces?|count|ct|pk|sets?|个|件|只|片|包|套|条)|(?:pack|set) of [0-9]++)(?![a-z0-9])\.?")
_END = re.compile(rf"(?: ?[,;]?+ ?(?P<unit>{_UNIT})| ?\((?P<unit_inside>{_UNIT})\)| ?\n?(?P<order>{_AXIS_ORDER})"
                  rf"| ?{_TOLERANCE} ?{_UNIT})*+\.?(?: ?[,;] ?{_EXTRA}| {_EXTRA}|\n{_EXTRA})*+")
_BRACKETS = re.compile(rf"(?:\[ ?(.+?) ?\]|\( ?(.+?) ?\))(?: ?({_UNIT}))?\.?")
_QUOTED_ITEM = re.compile(rf"(['\"])([0-9.]++|{any_of(LATIN_UNITS)})\1")
_SECOND = re.compile(r" ?(?:[/=(|]|\n| or ) ?")  # the same size once more, in another unit
_SIZE_LIKE = re.compile(rf"[0-9] ?(?:{_UNIT}|寸)|[0-9].*(?<![a-z])[mc]m(?![a-z])|[0-9] ?[x*] ?[0-9]|[0-9],[0-9]",
                        re.DOTALL)
_SIGNS = str.maketrans({"×": "x", "✕": "x", "✖": "x", "╳": "x", "″": '"', "”": '"', "“": '"', "–": "-", "−": "-",
                        "：": ":", "\r": "\n"})
_BLANKS, _LINE_BREAKS = re.compile("[ \t\xa0]+"), re.compile(" ?\n[ \n]*")
_MISSING = ("", "nan", "n/a", "na", "none", "null", "-", "--", "/", "?", "tbd", "unknown", "无", "暂无", "#n/a")
_ACCEPTED = "accepted are one to three sizes such as 12 8 15, [66.0, 53.0, 73.0, cm], 12 x 8 x 15 inch"

Verdict = Literal["ambiguous", "not positive", "missing", "no size"]


class LabelError(UserError):
    """Say what was found in a label that can't be trusted, and what is accepted; `verdict` is the kind of fault."""

    def __init__(self, text: str, verdict: Verdict = "ambiguous"):
        super().__init__(text)
        self.verdict = verdict


def parse_label(text: str | Sequence[float], name: str = "label") -> tuple[float, ...]:
    """Read a label's one to three sizes in cm, in the order written; raise LabelError rather than guess.

    text: numbers with separators, brackets, axis names and units (cm where none is written), a weight, volume or
    count behind; a JSON object with the keys length, width, height and unit; or numbers in cm that are no string.
    A diameter counts as two sizes. name: what the error calls the text.
    """
    try:
        if isinstance(text, str):
            sizes = _sizes_in(text)
        elif text is None or isinstance(text, float) and math.isnan(text):
            raise LabelError("it is missing", "missing")
        else:
            sizes = [_json_number(number) for number in (text if isinstance(text, list | tuple) else [text])]
        if not 1 <= len(sizes) <= 3:
            raise LabelError(f"found {len(sizes)} numbers") if sizes else LabelError("it is missing", "missing")
        if not all(map(math.isfinite, sizes)):
            raise LabelError("found a size that is not finite")
        if min(sizes) <= 0:
            raise LabelError(f"found {min(sizes):g}, not positive", "not positive")
    except LabelError as fault:
        shown = repr(text[:80]) if isinstance(text, str) else f"of type {type(text).__name__}"
        raise LabelError(f"{name} {shown}: {fault}; {_ACCEPTED}", fault.verdict) from None
    return tuple(sizes)


def _sizes_in(text: str) -> list[float]:
    label = _BLANKS.sub(" ", fold(text).lower().translate(_SIGNS).replace("''", '"')).strip()
    if label in _MISSING:
        raise LabelError("it is missing", "missing")
    if label.startswith("{"):
        return _json_sizes(label)
    if len(label) > _LONGEST:
        raise LabelError(f"found {len(label)} characters, a description")
    try:
        return _written_sizes(_LINE_BREAKS.sub("\n", label))
    except LabelError as fault:
        if fault.verdict == "ambiguous" and not _SIZE_LIKE.search(label):
            fault.verdict = "no size"
        raise


def _written_sizes(label: str) -> list[float]:
    brackets = _BRACKETS.fullmatch(_QUOTED_ITEM.sub(r"\2", label))
    body = (brackets[1] or brackets[2]) if brackets else label
    sizes, units, rest = _read_group(body, brackets[3] if brackets else None, listed=bool(brackets))
    if not rest:
        return sizes
    second = _SECOND.match(rest)
    if second is None:
        raise LabelError(f"found {rest[:40]!r} after the sizes")
    again, other_units, left_over = _read_group(rest[second.end():].removesuffix(")"), None)
    same = len(again) == len(sizes) and all(abs(one - two) <= 0.03 * one for one, two in zip(sizes, again, strict=True))
    if left_over or not same or not units or not other_units or units & other_units:
        raise LabelError(f"found more than one size: {rest[:40]!r} after the first")
    return sizes


def _read_group(body: str, unit_outside: str | None, listed: bool = False) -> tuple[list[float], set[Any], str]:
    """Read one group of sizes: the sizes in cm, the units written, and what is left of the text."""
    opening = _OPENING.match(body)
    item_form = _ITEM_PLAIN if listed and not re.search("[0-9] ?[x*]", body) else _ITEM_WITH_COMMAS
    items, separators, position, end = [], [], opening.end(), None
    while end is None:
        item = item_form.match(body, position)
        if item is None or len(items) == 3:
            raise LabelError(f"found {body[position:position + 40]!r} in place of size {len(items) + 1}")
        items.append(item)
        end = _END.fullmatch(body, item.end())
        separator = _SEPARATOR.match(body, item.end())
        if end is None and (separator is None or item_form.match(body, separator.end()) is None):
            end = _END.match(body, item.end())  # the sizes end here; what follows is left to the caller
        elif end is None:
            separators.append(separator.lastgroup)
            position = separator.end()
    axes = _check_axes(items, separators, [order for order in (opening["order"], end["order"]) if order])
    outside = [unit for unit in (opening["unit"], end["unit"], end["unit_inside"], unit_outside) if unit]
    units = _units_of([item["unit"] or item["tolerance_unit"] for item in items], outside, separators)
    numbers = _numbers_of([item["number"] for item in items], units, separators, bool(axes))
    sizes = []
    for index, (number, unit) in enumerate(zip(numbers, units, strict=True)):
        sizes += [to_cm(number, unit)] * (2 if axes and axes[index] == "round" else 1)
    written = {UNITS[unit] for unit in units} if outside or items[-1]["unit"] else set()
    return sizes, written, body[end.end():]


def _check_axes(items: list[re.Match], separators: list[str], orders: list[str]) -> list[str]:
    """Return the axis of each size, or [] where none is named; refuse axes that leave a doubt."""
    named = [[_AXES[item[group]] for group in ("before", "inside", "after", "behind") if item[group]] for item in items]
    axes = [of_item[0] for of_item in named if of_item]
    if axes == ["round"] and len(items) == 2 and named[0]:  # φ380*30: the other one is the height
        return ["round", "h"]
    if axes and (any(len(of_item) != 1 for of_item in named) or len(set(axes)) < len(axes)):
        raise LabelError("found an axis that is given twice, or not for every size")
    if "d" in axes and len(items) < 3:
        raise LabelError("found a D that may be a depth or a diameter")
    if "round" in axes and len(items) > 2:
        raise LabelError("found a diameter among three sizes")
    for order in orders:
        if axes or len(orders) > 1 or len(re.findall("[lwhd长宽高深]", order)) != len(items):
            raise LabelError("found axes that do not go with the sizes")
    if not axes and {"line", "axis"} & set(separators):
        raise LabelError("found sizes on several lines without axes, which may be variants")
    if len(set(separators)) > 1:
        raise LabelError("found more than one kind of separator")
    return axes


def _units_of(own: list[str | None], outside: list[str], separators: list[str]) -> list[str]:
    """Return the unit of each size: its own, or the one written once for all."""
    if len(outside) > 1 or outside and own[-1] or any(own) and not (own[-1] or outside):
        raise LabelError("found a unit that does not say which sizes it holds for")
    shared = outside[0] if outside else own[-1] or "cm"
    if len({UNITS[unit or shared] for unit in own}) > 1 and set(separators) != {"times"}:
        raise LabelError("found several units, which may be parts of one size, as in 5 ft 3 in")
    return [unit or shared for unit in own]


def _numbers_of(written: list[str], units: list[str], separators: list[str], has_axes: bool) -> list[float]:
    """Convert numbers as written, judging their commas and fractions by one another."""
    for number, unit in zip(written, units, strict=True):
        if UNITS[unit] == MM and re.fullmatch(r"[1-9][0-9]{0,2}\.[0-9]{3}", number):
            raise LabelError(f"found {number!r} mm, whose point may separate thousands")
        if re.match("-?0[0-9]", number):
            raise LabelError(f"found {number!r}, a number that begins with 0")
        if number.startswith("-") and "space" in separators + ["" if len(written) > 1 else "single"]:
            raise LabelError("found a minus that may be a range")
        numerator, _, denominator = number.rpartition(" ")[2].partition("/")
        if denominator and ("space" in separators or int(numerator) >= int(denominator) or "." in number
                            or not all(UNITS[unit] in (INCH, FOOT) for unit in units)):
            raise LabelError(f"found {number!r}, which may be a fraction or variants")
    with_comma = [number for number in written if "," in number]
    if with_comma:
        clear = set(separators) <= {"times", "semicolon"} or has_axes
        decimals = [number.partition(",")[2] for number in with_comma]
        thousands = [bool(THOUSANDS.match(number)) and number.count(",") == 1 for number in with_comma]
        if clear and all(thousands) and (any("." in number for number in with_comma)
                                         or all(UNITS[unit] == MM for unit in units)):
            written = [number.replace(",", "") for number in written]
        elif (clear and (separators or has_axes) and not any(thousands) and not any("." in number for number in written)
              and all(digits.isdigit() for digits in decimals)
              and (len(with_comma) > 1 or len(decimals[0]) == 1 or with_comma[0].startswith("0,"))):
            written = [number.replace(",", ".") for number in written]
        else:
            raise LabelError("found a comma between digits, which may separate sizes, decimals or thousands")
    return [_with_fraction(number) for number in written]


def _with_fraction(number: str) -> float:
    whole, _, fraction = number.partition(" ")
    numerator, _, denominator = fraction.partition("/")
    return float(whole) + (int(numerator) / int(denominator) if fraction else 0)


def _json_number(number: Any) -> float:
    if isinstance(number, bool) or not isinstance(number, Real):
        raise LabelError(f"found a value of type {type(number).__name__}, not a number")
    try:
        return float(number)
    except OverflowError:
        return math.inf


def _json_sizes(label: str) -> list[float]:
    try:
        pairs = [(key.strip(), value) for key, value in DECODER.decode(label)]
    except (ValueError, RecursionError):
        raise LabelError("found JSON that can't be decoded") from None
    units = [value for key, value in pairs if key in UNIT_KEYS]
    if len(units) > 1 or units and not (isinstance(units[0], str) and unit_name(units[0]) in UNITS):
        raise LabelError("found more than one unit, or an unknown one")
    axes = [DIMENSIONS.get(key) for key, _ in pairs if key not in UNIT_KEYS]
    if None in axes or len(set(axes)) < len(axes):
        raise LabelError("found a key that is unknown or given twice")
    numbers = [_json_number(value) for key, value in pairs if key not in UNIT_KEYS]
    return [to_cm(number, unit_name(units[0]) if units else "cm") for number in numbers]
