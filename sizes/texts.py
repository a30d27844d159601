"""The text reader: the sizes that a product's text names, in cm. Standard library only."""

import re

from sizes.units import NUMBER, UNIT, to_cm

_READ, _MOST = 5_000, 60  # characters and sizes of a text that are looked at
_AXIS_BEFORE = re.compile("(?:[长宽高深厚]|(?<![a-z])[lwhd]) ?:? ?(?=[0-9])")
_SIZE = re.compile(rf"(?<![0-9.,a-wyz]){NUMBER} ?(?P<unit>{UNIT})?+(?: ?\([lwhd]\))?"
                   r"(?P<more> ?[x×*] ?(?=[0-9]))?")


def sizes_in_text(text: str) -> list[float]:
    """List the sizes that a text names, in cm: numbers with a unit, and all of 12 x 8 x 15, the unit at its end."""
    sizes, chain = [], []
    for match in _SIZE.finditer(_AXIS_BEFORE.sub("", text[:_READ].lower())):
        chain.append((float(match["number"]), match["unit"]))
        if match["more"]:
            continue
        shared = next((unit for _, unit in reversed(chain) if unit), "cm" if len(chain) > 1 else None)
        sizes += [to_cm(number, unit or shared) for number, unit in chain if unit or shared]
        chain = []
        if len(sizes) > _MOST:
            break
    return sizes
