"""Numbers with units: what units there are, how a number looks, how both become centimetres. Standard library only.

Labels, answers and texts are read by three grammars of their own, all made of these parts.
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

LARGEST = 1e9  # cm; larger numbers are cut to it, so that an answer's sizes stay finite
_MOST_RUNS = 200  # full-width runs and fractions turned, so that the work for one text stays bounded

# cm = number * first / second: whole numbers, so that 3 mm is exactly 0.3 cm.
CM, MM, DM, M, INCH, FOOT, YARD = (1, 1), (1, 10), (10, 1), (100, 1), (254, 100), (3048, 100), (9144, 100)
LATIN_UNITS = {
    "mm": MM, "cm": CM, "cms": CM, "m": M, "in": INCH, "inch": INCH, "inches": INCH, "ft": FOOT, "foot": FOOT,
    "feet": FOOT, "yd": YARD, "yard": YARD, "yards": YARD, "dm": DM,
    "millimeter": MM, "millimetre": MM, "centimeter": CM, "centimetre": CM, "meter": M, "metre": M,
    "millimeters": MM, "millimetres": MM, "centimeters": CM, "centimetres": CM, "meters": M, "metres": M,
}
UNITS = LATIN_UNITS | {
    '"': INCH, "″": INCH, "”": INCH, "毫米": MM, "㎜": MM, "厘米": CM, "公分": CM, "㎝": CM, "分米": DM, "米": M,
    "英寸": INCH, "吋": INCH, "英尺": FOOT, "мм": MM, "см": CM, "м": M,
}
UNIT_KEYS = ("unit", "units", "单位")
DIMENSIONS = {
    "length": "l", "width": "w", "height": "h", "depth": "d", "长度": "l", "宽度": "w", "高度": "h", "深度": "d",
    "长": "l", "宽": "w", "高": "h", "深": "d",
}
# Every word for an axis: l, w, h, d depth, t thickness, round a diameter.
_ROUND = dict.fromkeys(("diameter", "diam", "dia", "直径", "φ", "ø", "⌀", "Φ"), "round")
AXES = DIMENSIONS | _ROUND | {letter: letter for letter in "lwhdt"} | {
    "long": "l", "wide": "w", "breadth": "w", "base": "w", "high": "h", "tall": "h", "deep": "d", "thick": "t",
    "thickness": "t",
    "厚度": "t", "厚": "t", "長": "l", "寬": "w",
    "länge": "l", "lang": "l", "breite": "w", "breit": "w", "b": "w", "höhe": "h", "hoch": "h", "tiefe": "d",
    "tief": "d", "dicke": "t", "durchmesser": "round",
    "長さ": "l", "縦": "l", "幅": "w", "横幅": "w", "横": "w", "高さ": "h", "奥行": "d", "奥行き": "d", "厚さ": "t",
    "厚み": "t"}

SCREENS = {(640, 480), (800, 600), (1024, 600), (1024, 768), (1280, 720), (1280, 800), (1280, 1024), (1366, 768),
           (1440, 900), (1600, 900), (1600, 1200), (1680, 1050), (1920, 1080), (1920, 1200), (2048, 1536),
           (2160, 1440), (2340, 1080), (2400, 1080), (2560, 1080), (2560, 1440), (2560, 1600), (2880, 1800),
           (3440, 1440), (3840, 2160), (4096, 2160), (5120, 2880), (7680, 4320)}  # in pixels


def any_of(words: Iterable[str]) -> str:
    """Write a pattern for any of some words, the longest first."""
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))


def unit_pattern(end: str) -> str:
    """Write a pattern for any unit; end: what must follow a unit of Latin letters."""
    return rf"(?:(?:{any_of(LATIN_UNITS)}){end}|{any_of(UNITS.keys() - LATIN_UNITS.keys())})"


# The patterns see lower-case text; ++ and *+ never backtrack. A number begins with a plain character and looks behind
# only after it: that is what lets re skip to the next candidate quickly. A unit ends with its letters, or at the x of
# 5mmx8mm.
UNIT = unit_pattern(r"(?=[^a-z]|x ?[0-9.]|$)")
DIGITS = "(?:[0-9]++{commas}(?:[.][0-9]++)?+|[.][0-9]++)"
_NUMBER = r"(?P<number>[0-9.](?:(?<=[0-9]){whole}(?:\.[0-9]++)?+|(?<=\.)(?<![0-9.]\.)[0-9]++)(?:e[+-]?+[0-9]++)?+)"
NUMBER = _NUMBER.replace("{whole}", "[0-9]*+")
NUMBER_WITH_COMMAS = _NUMBER.replace("{whole}", "[0-9]*+(?:,[0-9]++)*+")
_FULL_WIDTH = re.compile("[\uff01\uff03-\uff3b\uff3d-\uff5e\u3000]+")  # without quote and backslash, JSON's own signs
_FRACTION = re.compile("[¼-¾⅐-⅞]")
_FOLDED = re.compile(f"{_FULL_WIDTH.pattern[:-2]}¼-¾⅐-⅞]")
_MIXED_FRACTION = re.compile("(?<![0-9.,/])([0-9]{0,6}+) ?([¼-¾⅐-⅞])(?![0-9¼-¾⅐-⅞])")
THOUSANDS = re.compile(r"[1-9][0-9]{0,2}(?:,[0-9]{3})++(?![0-9,])")
# Objects become tuples of pairs: a repeated key is seen, and an array (a list) is never taken for an object.
DECODER = json.JSONDecoder(object_pairs_hook=tuple, parse_constant=lambda _: None)


def fold(text: str) -> str:
    """Turn full-width signs into ASCII and 19⅝ into 19.625: the first of them, so that the work stays bounded."""
    if text.isascii() or not _FOLDED.search(text):
        return text
    text = _FULL_WIDTH.sub(lambda run: unicodedata.normalize("NFKC", run[0]), text, count=_MOST_RUNS)
    if _FRACTION.search(text):
        text = _MIXED_FRACTION.sub(lambda mixed: str(int(mixed[1] or 0) + unicodedata.numeric(mixed[2])), text,
                                   count=_MOST_RUNS)
    return text


def unit_name(unit: Any) -> str:
    """Name a unit as UNITS does: lower case, without blanks, full stop and remark; cm where there is none."""
    if isinstance(unit, list) and unit and all(one == unit[0] for one in unit):
        unit = unit[0]
    if not isinstance(unit, str):
        return f"of type {type(unit).__name__}"
    return unit.lower().partition("(")[0].strip(" \t\r\n.。") or "cm"


def to_cm(number: float, unit: str) -> float:
    """Convert a number in one of UNITS to cm."""
    first, second = UNITS[unit]
    return number * first / second


def as_written(number: float, digits: int = 6) -> str:
    """Write a positive number as a person does: so many digits that matter, and no exponent."""
    short = f"{number:.{digits}g}"
    return short if "e" not in short else f"{number:.0f}" if number >= 1 else f"{number:.6f}".rstrip("0").rstrip(".")


def counts_first(numbers: Sequence[float]) -> bool:
    """Tell whether three numbers may be two sizes with a count in front, as in 2*48*74."""
    return len(numbers) == 3 and numbers[0] in (2, 3, 4, 5, 6) and min(numbers[1:]) >= 10 * numbers[0]


def to_float(digits: str) -> float | None:
    """Convert 12, 12.5, 1,200 and the decimal comma of 12,5; any other use of commas is None."""
    if THOUSANDS.match(digits):
        digits = digits.replace(",", "")
    elif digits.count(",") == 1 and "." not in digits:
        digits = digits.replace(",", ".")
    return None if "," in digits else min(float(digits), LARGEST)
