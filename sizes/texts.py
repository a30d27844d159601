"""The text reader: the sizes that a product's text names, in cm. Standard library only."""

import re
from html import unescape

from sizes.units import NUMBER_WITH_COMMAS, UNIT, fold, to_cm, to_float

_READ, _MOST = 5_000, 60  # characters and sizes of a text that are looked at
_TAG = re.compile("<[a-zA-Z/!][^<>]{0,500}>")
_BREAK = re.compile("<(?:br|/p|/div|/li|/tr|/h[1-6])[ /]*>", re.IGNORECASE)
_ENTITY = re.compile("&(?:[a-zA-Z]{2,8}|#[0-9]{2,6}|#x[0-9a-fA-F]{2,5});")
_BLANKS = re.compile("[ \t\xa0]+")
_AXIS = "(?:[长宽高深厚]度?|(?<![a-z])[lwhd])"
_AXIS_BEFORE = re.compile(rf"{_AXIS} ?:? ?(?=[0-9])")
_BEHIND = rf"(?: ?\({_AXIS}\)| ?{_AXIS}(?![a-z]))?+"
_SIZE = re.compile(rf"(?<![0-9.,a-wyz]){NUMBER_WITH_COMMAS}{_BEHIND}(?: ?\(?(?P<unit>{UNIT})\)?)?+{_BEHIND}"
                   r"(?P<more> ?[x×*] *+(?=[0-9]))?")
_UNIT_BEFORE = re.compile(rf"\((?P<unit>{UNIT})\) ?:? ?$")  # of a whole size: 尺寸(mm): 120*80*150


def as_seen(text: str) -> str:
    """Write a text as a person sees it: without HTML's tags, its entities as signs."""
    if not _TAG.search(text) and not _ENTITY.search(text):
        return text
    return _BLANKS.sub(" ", unescape(_TAG.sub(" ", _BREAK.sub("\n", text)))).strip()


def sizes_in_text(text: str) -> list[float]:
    """List the sizes that a text names, in cm: numbers with a unit, and all of 12 x 8 x 15, one unit for all."""
    sizes, chain, start = [], [], None
    text = _AXIS_BEFORE.sub(" ", fold(as_seen(text[:_READ])).lower())
    for match in _SIZE.finditer(text):
        start = match.start() if start is None else start
        chain.append((to_float(match["number"]), match["unit"]))
        if match["more"]:
            continue
        shared = next((unit for _, unit in reversed(chain) if unit), "") or _stated_before(text[:start])
        shared = shared or ("cm" if len(chain) > 1 else "")
        sizes += [to_cm(number, unit or shared) for number, unit in chain if number is not None and (unit or shared)]
        chain, start = [], None
        if len(sizes) > _MOST:
            break
    return sizes


def _stated_before(text: str) -> str:
    found = _UNIT_BEFORE.search(text[-20:])
    return found["unit"] if found else ""
