"""Rows that name columns: names written otherwise than asked for, in two rows under one name, or a second time."""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from sheets.photo_columns import PHOTO_COLUMN
from sheets.sides import SIDES, find_sides, is_side, unit_in

_OF_WHAT = "(?:商品|产品|產品|宝贝|货品|物品|包装|外箱|product |item |main )?"
_NAMES = re.compile(  # of columns, as shops write them, below their technical names
    rf"{_OF_WHAT}(?:标题|標題|名称|名稱|名|品名|描述|说明|文本|文字|详情|title|name|description|text|タイトル|商品名|상품명)"
    rf"|{_OF_WHAT}(?:尺寸|规格|規格|大小|标签|标注|size|sizes|dimensions?|label|サイズ|寸法|크기)"
    rf"|{_OF_WHAT}(?:编号|編號|编码|货号|貨號|款号|型号|id|sku|sku ?(?:id|编码|编号|码)|no\.?|商品id)"
    rf"|{_OF_WHAT}(?:类目|類目|分类|分類|类别|品类|category|カテゴリ|카테고리)"
    rf"|{_OF_WHAT}(?:主|副|首|附|细节|详情|白底|场景|缩略)?(?:图|圖|图片|圖片|照片|画像|写真|사진|image|img|photo|picture|pic)s?"
    r"(?: ?(?:链接|地址|网址|url|link))?[ _]?[0-9]{0,2}"
    "|单位|units?|必填|选填|可选|required|optional")
_NUMBER = re.compile(r"[0-9]+(?:[.,][0-9]+)?")


def _plain_name(name: str) -> str:
    """Write a name in lower case and half width, without a file's mark and blanks around it."""
    return " ".join(unicodedata.normalize("NFKC", name.replace("\ufeff", "").replace("\u200b", "")).lower().split())


def header_of(cells: Sequence[str], below: Sequence[str], known: Iterable[str], mapping: Mapping[str, Sequence[str]]
              ) -> tuple[list[str], int]:
    """Return the names that a row, or it and the one below, gives to the columns, and how many rows that are.

    Where only case, width or blanks differ, as in Text and a LABEL behind a file's mark, they are written as known.
    """
    above, below = _in_known_names(cells, known), _in_known_names(below, known)
    both = _under_one_name(above, below, mapping)
    return (both, 2) if both else (above, 1)


def _in_known_names(cells: Sequence[str], known: Iterable[str]) -> list[str]:
    names = {_plain_name(name): name for name in known}
    written = []
    for cell in cells:
        plain = _plain_name(cell)
        name = names.get(plain, plain if PHOTO_COLUMN.fullmatch(plain) else cell)
        written.append(cell if name in cells else name)
    return written


def _under_one_name(above: Sequence[str], below: Sequence[str], mapping: Mapping[str, Sequence[str]]) -> list[str]:
    """Make one header of two rows where the lower one names sides below a single name: label over 长, 宽, 高.

    A unit in that name holds for them. Empty where the rows are no such header.
    """
    places = [place for place, _, _ in find_sides(below, mapping).sides]
    if not places or len(below) > len(above) or not above[places[0]]:
        return []
    name = above[places[0]]
    others = [place for place in range(len(below)) if place not in places and below[place] not in ("", above[place])]
    unit = unit_in(name)
    if (any(above[place] not in ("", name) for place in places) or not all(_is_name(below[place]) for place in others)
            or unit and any(side in mapping for side in SIDES)):
        return []
    header = [upper or lower for upper, lower in zip(above, [*below, *[""] * len(above)], strict=False)]
    for place in places:
        header[place] = below[place] if unit_in(below[place]) or not unit else f"{below[place]}({unit})"
    return header


def names_again(cells: Sequence[str], header: Sequence[str], used: Iterable[str]) -> bool:
    """Say whether a row names the columns once more: each cell that would be read is a name, and two are at least."""
    places = {header.index(name) for name in used if name in header}
    texts = [cells[place] for place in places if place < len(cells) and cells[place]]
    return len(texts) > 1 and all(map(_is_name, texts))


def _is_name(cell: str) -> bool:
    plain = _plain_name(cell)
    return is_side(cell) or any(form.fullmatch(re.sub(r" ?[(\[][a-z]*[)\]]$|\*$", "", plain))
                                for form in (_NAMES, PHOTO_COLUMN))


def goes_on(place: int, header: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    """Say whether a column of numbers goes on in one without a name, as below a label that is merged over three."""
    if any(header[place + 1:place + 2]):
        return False
    filled = [[cell for cell in row[place:place + 2] if cell] for row in rows]
    return max(map(len, filled), default=0) > 1 and all(_NUMBER.fullmatch(cell) for row in filled for cell in row)
