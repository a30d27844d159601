"""Photo files -> upright RGB pictures, in worker threads; a file that is no whole photo is refused with the reason."""

import hashlib
import io
import struct
import warnings
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from ground.errors import UserError

LARGEST_FILE = 64 * 2 ** 20  # bytes
LARGEST_SIDE = 4096  # pixels; larger photos are scaled down, so that a product's photos fit in memory
SMALLEST_SIDE = 8  # pixels; smaller ones are spacers and tracking dots, in which nothing can be seen
_MOST_PIXELS = 50_000_000  # to decode, of each worker; a JPEG is decoded at a size of about LARGEST_SIDE
# Formats that Pillow reads by itself (JPEG stands for MPO too); others would start other programs or show no photo.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_WORKERS = 4
_GLANCE, _THUMBNAIL = 512, 96  # pixels of a side that will do to look at a photo, and of what is kept of it
# What Pillow's readers raise for a damaged photo, beside OSError for a truncated one.
_DAMAGED = (ValueError, SyntaxError, TypeError, IndexError, KeyError, AttributeError, EOFError, OverflowError,
            ZeroDivisionError, MemoryError, RuntimeError, struct.error, zlib.error)


class PhotoError(UserError):
    """A photo file that can't be used; the text says why."""


@dataclass(frozen=True, slots=True)
class SeenPhoto:
    """What is kept of a photo that was opened."""

    content: str  # its content_key
    look: int | None = None  # its look_of
    fault: str = ""  # why it can't be used
    thumbnail: bytes = b""  # a JPEG of a few KB


def open_photo(path: str | Path, enough: int = LARGEST_SIDE) -> Image.Image:
    """Decode one photo: RGB, its first frame, upright as EXIF says, transparency over white, sides of 4096 at most.

    enough: pixels of a side that will do, for which a JPEG is decoded smaller, in less time.
    Raises PhotoError with the reason: empty, a web page, no picture, truncated, damaged, too large or too small to see.
    """
    with _opened(path) as opened:
        opened.draft(None, (LARGEST_SIDE, LARGEST_SIDE))  # a large JPEG is decoded small
        _refuse_by_pixels(opened, _MOST_PIXELS)
        width, height = (side * min(1, LARGEST_SIDE / max(opened.size)) for side in opened.size)
        if min(width, height) < SMALLEST_SIDE:
            raise PhotoError(f"it is too small to see: {width:.0f} x {height:.0f} pixels")
        photo = _as_rgb(ImageOps.exif_transpose(opened)) if enough == LARGEST_SIDE else None
    if photo is None:
        with _opened(path) as opened:  # again, since draft acts once
            opened.draft(None, (enough, enough))
            photo = _as_rgb(ImageOps.exif_transpose(opened))
    return photo


def check_photo(path: str | Path, most_pixels: int) -> None:
    """Look at a photo file's head: raises PhotoError where it is none or has more pixels; decodes nothing."""
    with _opened(path) as opened:
        _refuse_by_pixels(opened, most_pixels)


def _refuse_by_pixels(opened: Image.Image, most_pixels: int) -> None:
    if opened.width * opened.height > most_pixels:
        raise PhotoError(f"it is too large: {opened.width} x {opened.height} pixels, at most {most_pixels:,} in all")


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """Open a photo file; whatever Pillow raises in the block becomes a PhotoError with the reason."""
    Image.init()  # so that every format is known
    _refuse_by_size(Path(path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large photos are scaled down; damaged tags are not needed
            with Image.open(path, formats=[name for name in _FORMATS if name in Image.OPEN]) as opened:
                yield opened
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


def open_photos(paths: Sequence[str | Path], at_once: int = _WORKERS
                ) -> list[tuple[str | Path, Image.Image | PhotoError]]:
    """Decode photos in worker threads, in order: path and picture, or the reason why not; equal files come once."""
    workers = _workers(at_once)
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


def examine_photos(paths: Iterable[str]) -> Iterator[tuple[str, SeenPhoto]]:
    """Look at photos in worker threads, few at a time and those of equal content once; yields each with its path."""
    workers, looks = _workers(), {}

    def looking() -> Iterator[tuple[str, Future]]:
        for path, content in _few_ahead((path, workers.submit(content_key, path)) for path in paths):
            if content not in looks:
                looks[content] = workers.submit(_look_at, path, content)
            yield path, looks[content]

    yield from _few_ahead(looking())


def _few_ahead(started: Iterable[tuple[str, Future]]) -> Iterator[tuple[str, Any]]:
    waiting = deque()
    for path, work in started:
        waiting.append((path, work))
        if len(waiting) > 4 * _WORKERS:
            path, work = waiting.popleft()
            yield path, work.result()
    yield from ((path, work.result()) for path, work in waiting)


def _look_at(path: str, content: str) -> SeenPhoto:
    try:
        photo = open_photo(path, _GLANCE)
    except PhotoError as problem:
        return SeenPhoto(content, fault=str(problem))
    look, packed = look_of(photo), io.BytesIO()
    photo.thumbnail((_THUMBNAIL, _THUMBNAIL))
    photo.save(packed, "JPEG", quality=80)
    return SeenPhoto(content, look, thumbnail=packed.getvalue())


@cache
def _workers(count: int = _WORKERS) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="photo")
