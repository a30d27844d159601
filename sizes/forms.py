"""What people write in many forms, in few: signs, blanks, lists, words for about. Standard library only."""

import re

from sizes.units import fold

WEIGHT = r"(?:(?:net |gross )?weight|gewicht|重量|净重|毛重) ?:? ?"
_WEIGHT_BEFORE = re.compile(rf"{WEIGHT}[0-9.,]++ ?(?:kg|g|lbs?|oz|千克|公斤|克|斤)[,; ] ?")  # a weight in front
_SIGNS = str.maketrans({"×": "x", "✕": "x", "✖": "x", "╳": "x", "х": "x", "″": '"', "”": '"', "“": '"', "′": "'",
                        "–": "-", "−": "-", "：": ":", "\r": "\n"})
LISTS = str.maketrans({"，": ", ", "、": ", "})  # never a decimal comma
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
_BLANKS, _LINE_BREAKS = re.compile("[ \t\xa0]+"), re.compile(" ?\n[ \n]*")


def in_one_case(text: str) -> str:
    """Fold a label's signs and blanks: lower case, x for every cross, line breaks without blanks around them."""
    if text.isascii():
        text = text.lower().replace("\r", "\n")
    else:
        text = fold(text.translate(LISTS)).lower().translate(_SIGNS)
    text = text.replace("''", '"')
    return _LINE_BREAKS.sub("\n", _BLANKS.sub(" ", text)).strip()


def in_fewer_forms(label: str) -> str:
    """Take away what changes no size, and write in one form what may be written in several."""
    label = _WEIGHT_BEFORE.sub("", _ABOUT.sub("", label), count=1).strip()
    if not _REWRITTEN_SIGNS.isdisjoint(label):
        for form, replacement in _REWRITTEN:
            label = form.sub(replacement, label)
    return label.replace("|", ";") if _BARS.fullmatch(label) else label
