"""The text reader: the sizes that a product's text names, in cm. Standard library only."""

import re
from collections.abc import Iterator
from html import unescape

from sizes.forms import LISTS
from sizes.units import NUMBER_WITH_COMMAS, SCREENS, UNIT, counts_first, fold, to_cm, to_float

_READ, _MOST = 5_000, 60  # characters and sizes of a text that are looked at
_TAG = re.compile("<[a-zA-Z/!][^<>]{0,500}>")
_BREAK = re.compile("<(?:br|/p|/div|/li|/tr|/h[1-6])[ /]*>", re.IGNORECASE)
_ENTITY = re.compile("&(?:[a-zA-Z]{2,8}|#[0-9]{2,6}|#x[0-9a-fA-F]{2,5});")
_BLANKS = re.compile("[ \t\xa0]+")
_AXIS = "(?:[长宽高深厚]度?|(?<![a-z])[lwhd])"
_AXIS_BEFORE = re.compile(r"(?:[长宽高深厚]度?|(?<![a-z0-9])[lwhd]) ?:? ?(?=[0-9])")
_BEHIND = rf"(?: ?\({_AXIS}\)| ?{_AXIS}(?![a-z]))?+"
# Not of an area, a volume or a speed; nor the word of 3 in 1 and 12 in stock.
_LENGTH = (rf"(?! ?in (?:[0-9]|(?:stock|one|a|all|the|total|each|every)(?![a-z])))(?P<unit>{UNIT})"
           r"(?![²³^]|[23](?![0-9]|\.[0-9])| ?/ ?(?:s|sec|h|min)(?![a-z]))")
_SIZE = re.compile(rf"(?<![0-9.a-wyz])(?<![0-9],){NUMBER_WITH_COMMAS}(?P<axis>{_BEHIND})(?: ?\(?{_LENGTH}\)?)?+"
                   rf"{_BEHIND}(?P<more> ?[x×*] *+(?=[0-9]))?")
# What makes a measure of another kind, or a count, of numbers without a unit of length: 2 x 500 ml, 3*20片.
_OTHER = re.compile(r"[a-z%°]| ?(?:kgs?|g|mg|lbs?|pounds?|oz|ounces?|l|ml|cl|lit(?:er|re)s?|gal|w|watts?|k?v|m?ah?|hz"
                    r"|px|pixels?|dpi|pcs?|pieces?|packs?|sets?|stücke?|stk|hours?|h|min|[cdm]?m ?[²³23])(?![a-z])"
                    r"| ?(?:千克|公斤|克|斤|毫升|升|瓦|伏|像素|平方|立方|小时|分钟|[件个只片张套包瓶盒袋支])")
_UNIT_BEFORE = re.compile(rf"\((?P<unit>{UNIT})\) ?:? ?$")  # of a whole size: 尺寸(mm): 120*80*150


def as_seen(text: str) -> str:
    """Write a text as a person sees it: without HTML's tags, its entities as signs."""
    if not _TAG.search(text) and not _ENTITY.search(text):
        return text
    return _BLANKS.sub(" ", unescape(_TAG.sub(" ", _BREAK.sub("\n", text)))).strip()


def sizes_in_text(text: str) -> list[float]:
    """List the sizes that a text names, in cm: numbers with a unit, and all of 12 x 8 x 15, one unit for all."""
    sizes, chain = [], []
    text = _AXIS_BEFORE.sub(" ", fold(as_seen(text[:_READ]).translate(LISTS)).lower())
    for match in _SIZE.finditer(text):
        chain.append(match)
        if match["more"]:
            continue
        sizes += _sizes_of(chain)
        chain = []
        if len(sizes) > _MOST:
            break
    return sizes


def _sizes_of(chain: list[re.Match]) -> Iterator[float]:
    """Give the numbers of one size in cm; none where they count, or measure something else."""
    first, last = chain[0], chain[-1]
    numbers = [to_float(match["number"]) for match in chain]
    known = [number for number in numbers if number is not None]
    shared = next((match["unit"] for match in reversed(chain) if match["unit"]), "") or _stated_before(first)
    if not shared and (len(chain) == 1 or tuple(sorted(known, reverse=True)) in SCREENS
                       or last["axis"] and not first["axis"] or _OTHER.match(last.string, last.end())):  # 2 x 60W
        return
    if (counts_first(known) and not first["unit"] and not first["axis"]
            and {match["more"] for match in chain[:-1]} <= {"x", "*"}):
        return
    for match, number in zip(chain, numbers, strict=True):
        if number is not None:
            yield to_cm(number, match["unit"] or shared or "cm")


def _stated_before(first: re.Match) -> str:
    found = _UNIT_BEFORE.search(first.string[max(first.start() - 20, 0):first.start()])
    return found["unit"] if found else ""
