"""What people write in many forms, in few: signs, blanks, lists, words for about. Standard library only."""

import re

from sizes.units import fold

WEIGHT = r"(?:(?:net |gross )?weight|gewicht|重量|净重|毛重) ?:? ?"
_WEIGHT_BEFORE = re.compile(rf"{WEIGHT}[0-9.,]++ ?(?:kg|g|lbs?|oz|千克|公斤|克|斤)[,; ] ?")  # a weight in front
_SIGNS = str.maketrans({"×": "x", "✕": "x", "✖": "x", "╳": "x", "х": "x", "″": '"', "”": '"', "“": '"', "′": "'",
                        "–": "-", "−": "-", "：": ":", "\r": "\n"})
_LISTS = str.maketrans({"，": ", ", "、": ", "})  # never a decimal comma
_ABOUT = re.compile("(?<![a-z])(?:ca|circa|approx|approximately|about|etwa|rund)(?![a-z])\\.? ?|大?[约約] ?|≈ ?"
                    "|(?<![0-9a-z.)])~ ?(?=[0-9])|(?<=[0-9a-z米寸分])(?:左右|上下)")
_REWRITTEN = (  # what stands for the same in fewer forms
    (re.compile(r"(?<=[0-9])-(?=[0-9]{1,2}/[0-9])"), " "),  # 30-1/2
    (re.compile(r"(?<=[0-9])-(?=(?:inch|inches|in|feet|foot|ft|cm|mm)(?![a-z]))"), " "),  # 6-inch
    (re.compile(r"(?<=[0-9])米([0-9])(?![0-9米.])"), r".\1米"),  # 1米2
    (re.compile(r"(?<=[0-9])'(?=$|[^'])"), "ft"),
)
_REWRITTEN_SIGNS = frozenset("-米'")
_BARS = re.compile(r"[0-9.]++(?: ?\| ?[0-9.]++){1,2}")
_MONTHS = {name: number for number, names in enumerate((
    "jan", "feb|fév", "mar|mär|mrz", "apr|avr", "may|mai", "jun", "jul", "aug|aoû", "sep", "oct|okt", "nov",
    "dec|dez|déc"), start=1) for name in names.split("|")}
_MONTH = f"(?P<month>{'|'.join(_MONTHS)})[.]?"
_DATES = tuple(map(re.compile, (  # as Excel shows them, the year first, last or left out
    r"(?<![0-9])(?P<year>(?:19|20)[0-9]{2})[-/.年](?P<month>[0-9]{1,2})[-/.月](?P<day>[0-9]{1,2})(?![0-9])",
    r"(?<![0-9])(?P<day>[0-9]{1,2})([-/.])(?P<month>[0-9]{1,2})\2(?P<year>(?:19|20)[0-9]{2})(?![0-9])",
    "(?<![0-9])(?P<month>[0-9]{1,2})月(?P<day>[0-9]{1,2})日",
    rf"^(?P<day>[0-9]{{1,2}})[-. ]+{_MONTH}(?:[- ](?:19|20)?(?P<year>[0-9]{{2}}))?$",
    rf"^{_MONTH}[- ](?:19|20)?(?P<year>[0-9]{{2}})$")))
_BLANKS, _LINE_BREAKS = re.compile("[ \t\xa0]+"), re.compile(" ?\n[ \n]*")


def in_one_case(text: str) -> str:
    """Fold a label's signs and blanks: lower case, x for every cross, line breaks without blanks around them."""
    if text.isascii():
        text = text.lower().replace("\r", "\n")
    else:
        text = fold(text.translate(_LISTS)).lower().translate(_SIGNS)
    text = text.replace("''", '"')
    return _LINE_BREAKS.sub("\n", _BLANKS.sub(" ", text)).strip()


def in_fewer_forms(label: str) -> str:
    """Take away what changes no size, and write in one form what may be written in several."""
    label = _WEIGHT_BEFORE.sub("", _ABOUT.sub("", label), count=1).strip()
    if not _REWRITTEN_SIGNS.isdisjoint(label):
        for form, replacement in _REWRITTEN:
            label = form.sub(replacement, label)
    return label.replace("|", ";") if _BARS.fullmatch(label) else label


def typed_before(label: str) -> str:
    """List what may have been typed, as in 12-8 or 8-12, where Excel made a date of it; "" where there is no date."""
    found = next((match.groupdict() for date in _DATES if (match := date.search(label))), None)
    if found is None:
        return ""
    month = str(_MONTHS.get(found["month"]) or int(found["month"]))
    day, year = (str(int(found[part][-2:])) if found.get(part) else "" for part in ("day", "year"))
    orders = [(month, day), (day, month), (month, day, year), (day, month, year), (year, month, day)]
    orders += [(month, year)] if day in ("", "1") else []  # a month begins on its first
    typed = list(dict.fromkeys("-".join(order) for order in orders if all(order)))
    return " or ".join(filter(None, (", ".join(typed[:-1]), typed[-1])))
