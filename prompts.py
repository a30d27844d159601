"""The wording that asks for a product's size. Pure strings; each model family wraps them in its own chat format."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sizes.units import as_written

# No numbers in it: small models give them back.
_ANSWER = '{"length": number, "width": number, "height": number, "unit": "cm"}'

_KEYS = {"l": "length", "w": "width", "h": "height"}
_WORDING = {
    "zh": {
        "photos": "请结合商品的 {count} 张图片和下面的文字，判断这件商品的实际尺寸。",
        "text_only": "请根据下面的商品文字，判断这件商品的实际尺寸。",
        "task": "商品文字：\n{text}\n\n给出长、宽、高，单位厘米。只输出一个 JSON 对象，"
                f"键为 length、width、height、unit，不要输出其他任何内容。格式示例：{_ANSWER}",
    },
    "en": {
        "photos": "Work out how large this product really is from its {count} photo(s) and the text below.",
        "text_only": "Work out how large this product really is from the text below.",
        "task": "Product text:\n{text}\n\nGive its length, width and height in centimetres. Reply with a single JSON "
                f"object with the keys length, width, height and unit, and nothing else. Format: {_ANSWER}",
    },
}


def build_prompt(input_text: str, images: Sequence[Any], language: str = "zh", template: str | None = None) -> str:
    """Ask for length, width and height in cm from a product's text and photos, as one JSON object.

    images: the photos themselves, only counted here; they are never part of the string. template: a wording of
    the user's own in which {text} stands for the product's text.
    """
    if template is not None:
        return template.replace("{text}", input_text)
    wording = _WORDING[language]
    opening = wording["photos"].replace("{count}", str(len(images))) if len(images) else wording["text_only"]
    return opening + "\n" + wording["task"].replace("{text}", input_text)


def write_answer(label: Sequence[float]) -> str:
    """Write a Label, or plain sizes, as the answer that is asked for: in cm, each size under the axis that it names.

    A depth, a diameter's two sides and sizes without a name take the keys that are left, in order. What the label does
    not say is left out. Sizes are written to 0.1 mm, small ones finer.
    """
    axes = getattr(label, "axes", ()) or [""] * len(label)
    keys = [_KEYS.get(axis, "thickness" if axis == "t" and len(label) < 3 else "") for axis in axes]
    free = [key for key in _KEYS.values() if key not in keys]
    sizes = {key or free.pop(0): _plain_number(size) for key, size in zip(keys, label, strict=True)}
    order = [*_KEYS.values(), "thickness"]
    return json.dumps({key: sizes[key] for key in sorted(sizes, key=order.index)} | {"unit": "cm"})


def _plain_number(size: float) -> int | float:
    number = float(as_written(size, max(4, len(str(int(size))) + 2)))
    return int(number) if number.is_integer() else number


def read_template(prompt_file: str | None) -> str | None:
    """Read a prompt file; None stays None. One trailing line break, which editors add, is not part of the prompt."""
    return None if prompt_file is None else Path(prompt_file).read_text(encoding="utf-8").removesuffix("\n")
