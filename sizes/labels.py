"""The label reader: one to three sizes in cm from what people write, or a refusal that says what is wrong.

Labels are read strictly, since a wrong label teaches wrongly: what can be read in two ways is refused, never guessed.
Standard library only.
"""

import math
import re
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any, Literal

from ground.errors import UserError
from sizes.forms import WEIGHT, in_fewer_forms, in_one_case, typed_before
from sizes.units import (
    AXES,
    DECODER,
    DIGITS,
    FOOT,
    INCH,
    LATIN_UNITS,
    MM,
    THOUSANDS,
    UNIT_KEYS,
    UNITS,
    any_of,
    to_cm,
    unit_name,
    unit_pattern,
)

_LONGEST = 400  # characters of a label; more is a description
_LETTER = "[lwhdbt长宽高深]"  # an axis in an order of axes such as L x W x H
# An axis, too, ends with its letters, or at the x of 5mmx8mm.
_LETTERS_END = rf"(?=[^a-z]|x ?(?:[0-9.]|{any_of(AXES)})|$)"
_UNIT = unit_pattern(_LETTERS_END)
_AXIS = rf"(?:{any_of(AXES)})"
_TOLERANCE = r"(?:±|\+/-|\+-) ?[0-9.]++"
_FRACTION = r"[0-9]{1,2}/(?:2|4|8|16|32|64)(?![0-9])"
_BROKEN_INCH = rf"(?: {_FRACTION})?"  # the 5/8 of 19 5/8"
# The 5 ft of 5 ft 3 in.
_FEET = rf"(?P<feet>[0-9]{{1,3}}) ?(?:ft\.?|feet|foot) ?(?=[0-9.]++(?: {_FRACTION})? ?(?:in|\"))"
_ITEM = (rf"(?:(?:\((?P<first>{_AXIS})\)|(?P<before>{_AXIS})) ?[:=]? ?)?(?:{_FEET})?"
         rf"(?P<number>{_FRACTION}|-?{DIGITS}{_BROKEN_INCH})(?![0-9²³]|\.[0-9])"
         rf"(?: ?\((?P<inside>{_AXIS})\))?(?: ?(?P<unit>{_UNIT})\.?)?"
         rf"(?(before)|(?: ?(?:\((?P<after>{_AXIS})\)|(?P<behind>{_AXIS}){_LETTERS_END}\.?))?)"
         rf"(?: ?\((?P<again>[0-9.]++) ?(?P<again_unit>{_UNIT})\))?"  # the same size once more, in another unit
         rf"(?: ?\(?{_TOLERANCE}(?: ?(?P<tolerance_unit>{_UNIT}))?\)?)?")
_ITEM_WITH_COMMAS = re.compile(_ITEM.replace("{commas}", "(?:,[0-9]++)*+"))
_ITEM_PLAIN = re.compile(_ITEM.replace("{commas}", ""))
_SEPARATOR = re.compile(rf"(?P<times> ?[x*] ?| by )|(?P<semicolon> ?; ?)|(?P<comma> ?, )|(?P<tight>,)"
                        rf"|(?P<line> ?\n ?)|(?P<space> )|(?P<axis>(?={_AXIS}))")
_AXIS_ORDER = rf"\(?{_LETTER}(?: ?[x*/]? ?{_LETTER}){{1,2}}\)?"
_OPENING = re.compile(  # words that may stand before the sizes, an order of axes, the unit
    rf"(?P<size>(?:产品|商品)?(?:尺寸|规格)|(?:product |item )?(?:size|dimensions?)|measures)?"
    rf" ?(?P<order>{_AXIS_ORDER}(?=[ :=(])|(?:[长宽高深]){{2,3}}(?=[0-9]))? ?(?:\((?P<unit>{_UNIT})\))? ?[:=]? ?")
_COUNT = r"[0-9]++ ?(?:packs?|pcs?|pieces?|count|ct|pk|sets?|个|件|只|片|包|套|条)(?![a-z0-9])"
_EXTRA = (rf"(?:{WEIGHT})?"
          r"(?:[0-9]++(?:[.,][0-9]++)?+ ?(?:kgs?|g|grams?|kilograms?|lbs?|pounds?|oz|ounces?|千克|公斤|克|斤"  # weight
          r"|l|ml|lit(?:er|re)s?|gal(?:lons?)?|升|毫升"  # volume
          rf")(?![a-z0-9])|{_COUNT}|(?:pack|set) of [0-9]++(?![a-z0-9]))\.?")
_AREA = r" ?/ ?[0-9]++(?:[.,][0-9]++)?+ ?(?:m²|m2|qm|㎡|平方米)"
_END = re.compile(rf"(?: ?[,;]?+ ?(?P<unit>{_UNIT})| ?\((?P<unit_inside>{_UNIT})\)| ?\n?(?P<order>{_AXIS_ORDER})"
                  rf"| ?{_TOLERANCE} ?{_UNIT})*+[.。]?(?: ?[,;] ?{_EXTRA}| {_EXTRA}|\n{_EXTRA}"
                  rf"| ?[x*] ?{_COUNT}|{_AREA})*+[.。]?")
_BRACKETS = re.compile(rf"(?:\[ ?(.+?) ?\]|\( ?(.+?) ?\))(?: ?({_UNIT}))?\.?")
_QUOTED_ITEM = re.compile(rf"(['\"])([0-9.]++|{any_of(LATIN_UNITS)})\1")
_SECOND = re.compile(r" ?(?:[/=(|]|\n| or ) ?")  # the same size once more, in another unit
_SIZE_LIKE = re.compile(rf"[0-9] ?(?:{_UNIT}|寸)|[0-9].*(?<![a-z])[mc]m(?![a-z])|[0-9] ?[x*] ?[0-9]|[0-9],[0-9]",
                        re.DOTALL)
_SCREENS = {(640, 480), (800, 600), (1024, 600), (1024, 768), (1280, 720), (1280, 800), (1280, 1024), (1366, 768),
            (1440, 900), (1600, 900), (1600, 1200), (1680, 1050), (1920, 1080), (1920, 1200), (2048, 1536),
            (2160, 1440), (2340, 1080), (2400, 1080), (2560, 1080), (2560, 1440), (2560, 1600), (2880, 1800),
            (3440, 1440), (3840, 2160), (4096, 2160), (5120, 2880), (7680, 4320)}
_PIECES = ("2", "3", "4", "5", "6")  # 2*48*74: a count in front
_POINTED, _LEADING_ZERO = re.compile(r"[1-9][0-9]{0,2}\.[0-9]{3}"), re.compile("-?0[0-9]")
_MISSING = ("", "nan", "n/a", "na", "none", "null", "-", "--", "/", "?", "tbd", "unknown", "无", "暂无", "#n/a")
_ACCEPTED = "accepted are one to three sizes such as 12 8 15, [66.0, 53.0, 73.0, cm], 12 x 8 x 15 inch"

Verdict = Literal["ambiguous", "not positive", "missing", "no size"]


class Label(tuple[float, ...]):
    """A label's one to three sizes in cm, in the order written, a diameter twice.

    axes: what each size is named, l, w, h, d (depth), t (thickness) or round; () where they are not named.
    """

    axes: tuple[str, ...] = ()

    def __new__(cls, sizes: Iterable[float] = (), axes: Iterable[str] = ()) -> "Label":
        """Put sizes and their axes together."""
        label = super().__new__(cls, sizes)
        if axes:  # or a sheet of a million labels holds a million empty dictionaries
            label.axes = tuple(axes)
        return label

    def __str__(self) -> str:
        """Write it for a person: 15 x 12 x 8 cm, axes l w h."""
        named = f", axes {' '.join(self.axes)}" if self.axes else ""
        return f"{' x '.join(f'{size:g}' for size in self)} cm{named}" if self else ""


class LabelError(UserError):
    """Say what was found in a label that can't be trusted, and what is accepted; `verdict` is the kind of fault."""

    def __init__(self, text: str, verdict: Verdict = "ambiguous"):
        super().__init__(text)
        self.verdict = verdict


def parse_label(text: str | Sequence[float], name: str = "label") -> Label:
    """Read a label's one to three sizes in cm, with their axes; raise LabelError rather than guess.

    text: numbers with separators, brackets, axis names and units (cm where none is written), a weight, volume or
    count behind; a JSON object with the keys length, width, height and unit; or numbers in cm that are no string.
    A diameter counts as two sizes. name: what the error calls the text.
    """
    try:
        if isinstance(text, str):
            label = _label_in(text)
        elif text is None or isinstance(text, float) and math.isnan(text):
            raise LabelError("it is missing", "missing")
        else:
            label = Label([_json_number(number) for number in (text if isinstance(text, list | tuple) else [text])],
                          getattr(text, "axes", ()))
        if not 1 <= len(label) <= 3:
            raise LabelError(f"found {len(label)} numbers") if label else LabelError("it is missing", "missing")
        if not all(map(math.isfinite, label)):
            raise LabelError("found a size that is not finite")
        if min(label) <= 0:
            raise LabelError(f"found {min(label):g}, not positive", "not positive")
    except LabelError as fault:
        shown = repr(text[:80]) if isinstance(text, str) else f"of type {type(text).__name__}"
        raise LabelError(f"{name} {shown}: {fault}; {_ACCEPTED}", fault.verdict) from None
    return label


def _label_in(text: str) -> Label:
    label = in_one_case(text)
    if label in _MISSING:
        raise LabelError("it is missing", "missing")
    if len(label) > _LONGEST:
        raise LabelError(f"found {len(label)} characters, a description")
    if label.startswith("{"):
        return _json_label(label)
    try:
        return _written_label(in_fewer_forms(label))
    except LabelError as fault:
        if typed := typed_before(label):
            raise LabelError(f"found a date, which Excel makes of {typed}, with -, / or . between: write it again in a "
                             "cell of the format Text") from None
        if fault.verdict == "ambiguous" and not _SIZE_LIKE.search(label):
            fault.verdict = "no size"
        raise


def _written_label(label: str) -> Label:
    brackets = _BRACKETS.fullmatch(_QUOTED_ITEM.sub(r"\2", label)) if label[:1] in ("[", "(") else None
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


def _read_group(body: str, unit_outside: str | None, listed: bool = False) -> tuple[Label, set[Any], str]:
    """Read one group of sizes: the sizes in cm, the units written, and what is left of the text."""
    opening = _OPENING.match(body)
    if "/" in (opening["order"] or ""):  # B/H = 26 / 51 cm
        body = body[:opening.end()] + re.sub(" ?/ ?", " x ", body[opening.end():])
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
    orders = [order for order in (opening["order"], end["order"]) if order]
    axes = _check_axes(items, separators, orders)
    outside = [unit for unit in (opening["unit"], end["unit"], end["unit_inside"], unit_outside) if unit]
    own = [item["unit"] or item["tolerance_unit"] for item in items]
    units = _units_of(own, outside, separators)
    has_unit = bool(outside or any(own))
    numbers = _numbers_of([item["number"] for item in items], units, separators, bool(axes), has_unit)
    numbers = [number + 12 * int(item["feet"] or 0) for number, item in zip(numbers, items, strict=True)]
    _refuse_no_sizes(items, numbers, units, has_unit, bool(axes or orders), bool(opening["size"]))
    sizes, named = [], axes or [AXES[letter] for order in orders for letter in re.findall(_LETTER, order)]
    for index, (number, unit) in enumerate(zip(numbers, units, strict=True)):
        size, item = to_cm(number, unit), items[index]
        if item["again"] and abs(to_cm(float(item["again"]), item["again_unit"]) - size) > 0.03 * size:
            raise LabelError(f"found more than one size: {item['again']} {item['again_unit']} beside {number:g} {unit}")
        sizes += [size] * (2 if axes and axes[index] == "round" else 1)
    written = {UNITS[unit] for unit in units} if outside or items[-1]["unit"] else set()
    axes_of_sizes = [axis for axis in named for _ in range(2 if axis == "round" else 1)]
    return Label(sizes, axes_of_sizes), written, body[end.end():]


def _check_axes(items: list[re.Match], separators: list[str], orders: list[str]) -> list[str]:
    """Return the axis of each size, or [] where none is named; refuse axes that leave a doubt."""
    written = [[item[group] for group in ("first", "before", "inside", "after", "behind") if item[group]]
               for item in items]
    named = [[AXES[word] for word in of_item] for of_item in written]
    axes = [of_item[0] for of_item in named if of_item]
    if len(items) == 3 and len(axes) == 2 and set(separators) == {"times"} and len(set(axes) - {"round"}) == 2:
        return []  # 60 L x 36 W x 20: three sizes all the same
    if axes == ["round"] and len(items) == 2 and named[0]:  # φ380*30: the other one is the height
        return ["round", "h"]
    if axes and (any(len(of_item) != 1 for of_item in named) or len(set(axes)) < len(axes)):
        raise LabelError("found an axis that is given twice, or not for every size")
    if ["d"] in written and set(axes) <= {"d", "h"}:
        raise LabelError("found a D that may be a depth or a diameter")
    if "round" in axes and len(items) > 2:
        raise LabelError("found a diameter among three sizes")
    for order in orders:
        if axes or len(orders) > 1 or len(re.findall(_LETTER, order)) != len(items):
            raise LabelError("found axes that do not go with the sizes")
    if not axes and {"line", "axis"} & set(separators):
        raise LabelError("found sizes on several lines without axes, which may be variants")
    if len(set(separators)) > 1:
        raise LabelError("found more than one kind of separator")
    return axes


def _refuse_no_sizes(items: list[re.Match], numbers: list[float], units: list[str], has_unit: bool, has_axes: bool,
                     called_size: bool) -> None:
    """Refuse numbers that look like sizes and are none, or may be none."""
    first = items[0]
    if not has_axes and any(item["feet"] for item in items):
        raise LabelError("found several units, which may be parts of one size, as in 5 ft 3 in")
    letter = next((first[group] for group in ("before", "behind") if len(first[group] or "") == 1
                   and first[group].isascii()), None)
    if len(items) == 1 and not has_unit and letter:
        raise LabelError(f"found {letter!r} behind or before one number, which may be a unit of something else")
    if len(items) == 1 and called_size and not has_unit and not has_axes:
        raise LabelError("found one number without a unit, which may be the name of a size")
    if (len(items) == 1 and UNITS[units[0]] == INCH and not has_axes
            and re.fullmatch(r"[0-9]+(\.[0-9])?", first["number"])):
        raise LabelError("found one size in inches, which may be the diagonal of a screen")
    if len(items) == 2 and not has_unit and not has_axes and tuple(sorted(numbers, reverse=True)) in _SCREENS:
        raise LabelError("found two numbers that are pixels of a screen")
    if (len(items) == 3 and not has_axes and first["number"] in _PIECES and not first["unit"]
            and min(numbers[1:]) >= 10 * numbers[0]
            and {item.string[item.end():item.end() + 1] for item in items[:-1]} <= {"x", "*"}):
        raise LabelError(f"found {first['number']} in front of two much larger sizes, which may be a count")


def _units_of(own: list[str | None], outside: list[str], separators: list[str]) -> list[str]:
    """Return the unit of each size: its own, or the one written once for all."""
    if len(outside) > 1 or outside and own[-1] or any(own) and not (own[-1] or outside):
        raise LabelError("found a unit that does not say which sizes it holds for")
    shared = outside[0] if outside else own[-1] or "cm"
    if len({UNITS[unit or shared] for unit in own}) > 1 and set(separators) != {"times"}:
        raise LabelError("found several units, which may be parts of one size, as in 5 ft 3 in")
    return [unit or shared for unit in own]


def _numbers_of(written: list[str], units: list[str], separators: list[str], has_axes: bool, has_unit: bool
                ) -> list[float]:
    """Convert numbers as written, judging their commas and fractions by one another."""
    pointed = [bool(_POINTED.fullmatch(number)) for number in written]
    if any(pointed) and all(UNITS[unit] == MM for unit in units):
        whole = [number for number, points in zip(written, pointed, strict=True) if not points]
        if sum(pointed) < 2 or not whole or not all(re.fullmatch("[1-9][0-9]{2}", number) for number in whole):
            raise LabelError(f"found {written[pointed.index(True)]!r} mm, whose point may separate thousands")
        written = [number.replace(".", "") for number in written]  # as beside a whole 300 mm
    for number in written:
        if _LEADING_ZERO.match(number):
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
        elif (clear and (separators or has_axes or has_unit) and not any(thousands)
              and not any("." in number for number in written) and all(digits.isdigit() for digits in decimals)
              and (len(with_comma) > 1 or len(decimals[0]) == 1 or with_comma[0].startswith("0,"))):
            written = [number.replace(",", ".") for number in written]
        else:
            raise LabelError("found a comma between digits, which may separate sizes, decimals or thousands")
    return [_with_fraction(number) for number in written]


def _with_fraction(number: str) -> float:
    whole, _, fraction = number.rpartition(" ") if "/" in number else (number, "", "0/1")
    numerator, _, denominator = fraction.partition("/")
    return float(whole or 0) + int(numerator) / int(denominator)


def _json_number(number: Any) -> float:
    if isinstance(number, bool) or not isinstance(number, Real):
        raise LabelError(f"found a value of type {type(number).__name__}, not a number")
    try:
        return float(number)
    except OverflowError:
        return math.inf


def _json_label(label: str) -> Label:
    try:
        pairs = [(key.strip(), value) for key, value in DECODER.decode(
            label.replace("'", '"') if label.startswith(("{'", "{ '")) else label)]
    except (ValueError, RecursionError):
        raise LabelError("found JSON that can't be decoded") from None
    units = [value for key, value in pairs if key in UNIT_KEYS]
    if len(units) > 1 or units and not (isinstance(units[0], str) and unit_name(units[0]) in UNITS):
        raise LabelError("found more than one unit, or an unknown one")
    axes = [AXES.get(key) for key, _ in pairs if key not in UNIT_KEYS]
    if None in axes or len(set(axes)) < len(axes):
        raise LabelError("found a key that is unknown or given twice")
    shared = unit_name(units[0]) if units else "cm"
    return Label([_json_size(value, shared) for key, value in pairs if key not in UNIT_KEYS], axes)


def _json_size(value: Any, shared: str) -> float:
    """Read a number, or a text such as "12 cm", in cm."""
    if not isinstance(value, str):
        return to_cm(_json_number(value), shared)
    number = re.fullmatch(rf"({DIGITS.replace('{commas}', '')}) ?({_UNIT})?", in_fewer_forms(value.strip()))
    if number is None:
        raise LabelError(f"found {value[:40]!r}, not one size")
    return to_cm(float(number[1]), number[2] or shared)
