"""Cells -> photo addresses."""

import json
import re
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

PICTURE = "picture:"  # an address of what was taken out of a workbook: behind it stands the name of a file in the cache
_WEB = re.compile(r"(?:https?:|file:)?//\S", re.I)
_ENDING = r"\.(?:jpe?g|png|webp|gif|bmp|tiff?|avif|mpo|heic)"
_HOLDS_ENDING = re.compile(rf"[^\s.]{_ENDING}(?![a-z0-9])", re.I)
_ENDS_SO = re.compile(rf"[^\s.]{_ENDING}\Z", re.I)
_ONE = re.compile(r"(?!//|file:)[^\s,;|，；、\\]+")  # surely one address, and as it should be
_GAP = re.compile(r"\s*[,;|，；、]\s*|\s+")
_NAME = re.compile("image|img|photo|pic(?![a-z])|pics|picture|thumbnail|bild(?!schirm)|foto|图|圖|照片|画像|写真|사진",
                   re.I)


def addresses_of(cell: str) -> list[str]:
    """Read a photo cell: one address, several with a comma, semicolon, bar, blank or line break between, or JSON.

    //host becomes https://host, file:// a path, and each \\ in a path a /.
    """
    if _ONE.fullmatch(cell) and cell[0] != "[":
        return [cell]
    if cell.startswith("["):
        try:
            return [_plain(address) for entry in json.loads(cell) if (address := _of_entry(entry))]
        except (ValueError, RecursionError):
            pass
    return [_plain(address) for line in cell.splitlines() for address in _split(line.strip()) if address]


def _of_entry(entry: Any) -> str:
    if isinstance(entry, dict):
        entry = next((entry[key] for key in ("url", "src", "path") if entry.get(key)), entry)
    return str(entry).strip() if entry else ""


def _split(line: str) -> list[str]:
    """Cut where an address begins, or behind a file's name: a comma or a blank may also be part of one."""
    found, start = [], 0
    for gap in _GAP.finditer(line):
        left, right = line[start:gap.start()], line[gap.end():]
        if _WEB.match(right) or not right or (
                not _WEB.match(left) and _ENDS_SO.search(left) and _HOLDS_ENDING.search(right)):
            found.append(left)
            start = gap.end()
    return [*found, line[start:]]


def _plain(address: str) -> str:
    if address.startswith("//"):
        return "https:" + address
    if address[:7].lower() == "file://":
        try:
            return url2pathname(urlsplit(address).path)
        except ValueError:
            return address
    return address if "://" in address else address.replace("\\", "/")


def is_address(text: str, certain: bool = False) -> bool:
    """Say whether a text looks like a photo's address; certain: only with a photo's ending."""
    if len(text) > 2000:
        return False
    if text.startswith(PICTURE) or _WEB.match(text):
        return not certain or _HOLDS_ENDING.search(text) is not None
    return "://" not in text and _ENDS_SO.search(text) is not None


def is_photo_name(name: str) -> bool:
    """Say whether a column is named as columns of photos are: image_url, 主图, photos."""
    return _NAME.search(name) is not None
