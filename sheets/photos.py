"""Photo files -> upright RGB pictures, in worker threads; a file that is no whole photo is refused with the reason."""

import hashlib
import struct
import warnings
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from ground.errors import UserError

LARGEST_FILE = 64 * 2 ** 20  # bytes
LARGEST_SIDE = 4096  # pixels; larger photos are scaled down, so that a product's photos fit in memory
SMALLEST_SIDE = 8  # pixels; smaller ones are spacers and tracking dots, in which nothing can be seen
_MOST_PIXELS = 50_000_000  # to decode, of each worker; a JPEG is decoded at a size of about LARGEST_SIDE
# Formats that Pillow reads by itself (JPEG stands for MPO too); others would start other programs or show no photo.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_WORKERS = 4
# What Pillow's readers raise for a damaged photo, beside OSError for a truncated one.
_DAMAGED = (ValueError, SyntaxError, TypeError, IndexError, KeyError, AttributeError, EOFError, OverflowError,
            ZeroDivisionError, MemoryError, RuntimeError, struct.error, zlib.error)


class PhotoError(UserError):
    """A photo file that can't be used; the text says why."""


def open_photo(path: str | Path) -> Image.Image:
    """Decode one photo: RGB, its first frame, upright as EXIF says, transparency over white, sides of 4096 at most.

    Raises PhotoError with the reason: empty, a web page, no picture, truncated, damaged, too large or too small to see.
    """
    Image.init()  # so that every format is known
    _refuse_by_size(Path(path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large photos are scaled down below; damaged tags are not needed
            with Image.open(path, formats=[name for name in _FORMATS if name in Image.OPEN]) as opened:
                opened.draft(None, (LARGEST_SIDE, LARGEST_SIDE))  # a large JPEG is decoded small
                if opened.width * opened.height > _MOST_PIXELS:
                    raise PhotoError(f"it is too large: {opened.width} x {opened.height} pixels")
                photo = ImageOps.exif_transpose(opened)
            photo = _as_rgb(photo)
            if min(photo.size) < SMALLEST_SIDE:
                raise PhotoError(f"it is too small to see: {photo.width} x {photo.height} pixels")
            return photo
    except PhotoError:
        raise
    except UnidentifiedImageError:
        raise PhotoError(_what_it_is(Path(path))) from None
    except Image.DecompressionBombError as error:
        raise PhotoError(f"it is too large: {error}") from None
    except OSError as error:
        raise PhotoError(f"it is truncated or can't be read: {error}") from None
    except _DAMAGED as error:
        raise PhotoError(f"it is damaged: {error or type(error).__name__}") from None


def _refuse_by_size(path: Path) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise PhotoError(f"it can't be read: {error.strerror}") from None
    if size == 0:
        raise PhotoError("it is empty, 0 bytes")
    if size > LARGEST_FILE:
        raise PhotoError(f"it is too large: {size / 2 ** 20:.0f} MiB, at most {LARGEST_FILE / 2 ** 20:.0f}")


def _what_it_is(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(512).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<script")):
        return "it is a web page, not a photo"
    return "it is no photo in a known format (jpg, png, webp, gif, bmp, tiff, avif)"


def _as_rgb(photo: Image.Image) -> Image.Image:
    if photo.mode in ("I", "F"):
        raise PhotoError("it holds 32-bit measurements, not a photo")
    if photo.mode.startswith("I;16"):
        # Pillow clips 16-bit grey at 255 instead of scaling it, which would turn the photo white.
        see_through = photo.info.pop("transparency", None)
        photo = photo.convert("I").point(lambda value: value * (1 / 256)).convert("L")
        if isinstance(see_through, int):
            photo.info["transparency"] = see_through // 256
    photo.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    if not photo.has_transparency_data:
        return photo.convert("RGB")
    photo = photo.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo).convert("RGB")


def open_photos(paths: Sequence[str | Path]) -> list[tuple[str | Path, Image.Image | PhotoError]]:
    """Decode photos in worker threads, in order: path and picture, or the reason why not; equal files come once."""
    workers = _workers()
    distinct: dict[str, str | Path] = {}
    for path, content in zip(paths, workers.map(content_key, paths), strict=True):
        distinct.setdefault(content, path)
    return list(workers.map(_picture_or_reason, distinct.values()))


def _picture_or_reason(path: str | Path) -> tuple[str | Path, Image.Image | PhotoError]:
    try:
        return path, open_photo(path)
    except PhotoError as problem:
        return path, problem


def content_key(path: str | Path) -> str:
    """Tell files of equal content apart from others: a hash of the bytes; the name where the file can't be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return str(path)


def look_of(photo: Image.Image) -> int | None:
    """Reduce a picture to 64 bits that survive resizing and recompression; None for one without any pattern."""
    grey = photo.convert("L").resize((9, 8), Image.Resampling.BOX)
    darkest, brightest = grey.getextrema()
    if brightest - darkest < 16:
        return None
    levels = grey.tobytes()
    return sum(1 << place for place in range(64)
               if levels[place // 8 * 9 + place % 8] > levels[place // 8 * 9 + place % 8 + 1])


def examine_photos(paths: Iterable[str]) -> Iterator[tuple[str, str, int | None, str]]:
    """Open photos in worker threads, few at a time; yields path, content key, look, and what is wrong with it."""
    workers, waiting = _workers(), deque()
    for path in paths:
        waiting.append(workers.submit(_examine, path))
        if len(waiting) > 4 * _WORKERS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _examine(path: str) -> tuple[str, str, int | None, str]:
    try:
        return path, content_key(path), look_of(open_photo(path)), ""
    except PhotoError as problem:
        return path, content_key(path), None, str(problem)


@cache
def _workers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_WORKERS, thread_name_prefix="photo")
