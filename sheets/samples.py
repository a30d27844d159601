"""Rows -> samples: every row of a sheet that can't be trained on is named.

Photos are local files or lie in a cache folder (see `cached_photo_path`); they are decoded when asked for.
"""

import hashlib
import json
import os
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from sys import intern
from typing import NamedTuple, get_args

from loguru import logger
from PIL import Image

from config import MissingPhotos, PartialLabels, SheetOptions
from sheets.addresses import PICTURE
from sheets.columns import ProductRow, read_sheet
from sheets.photos import PhotoError, content_key, open_photos
from sizes.labels import Label, LabelError, parse_label
from sizes.texts import as_seen
from sizes.units import as_written

CONTRADICTION = 0.05  # labels of one product that differ by more on a side can't both be true
_LARGEST_SIZE, _SMALLEST_SIZE = 10_000.0, 0.01  # cm; beyond 100 m or below 0.1 mm a label is wrong
_PHOTO_EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".mpo"}
_PLACEHOLDER = (224, 224)
FETCHED = "python download_images.py fetches it"  # a photo that is missing
_FAULTS = {"ambiguous": "label ambiguous", "not positive": "label not positive", "missing": "label missing",
           "no size": "label without a size"}


@dataclass(frozen=True, slots=True)
class Sample:
    """One usable row of a sheet."""

    row: int  # as a person sees it in the sheet: the header is row 1, the first product row 2
    product_id: str  # sku_id, or a hash of text and photo addresses where there is none
    text: str
    label: Label  # 1 to 3 sizes in cm with their axes, or empty when the row has no label and needs none
    photos: tuple[str, ...]  # files that existed when the sheet was read, or will be placeholders
    sheet: str  # file name and, where one was named, worksheet; with the row it tells samples apart
    missing_photos: MissingPhotos = "drop_row"  # what to do when one of them turns out to be broken
    written_label: str = ""  # as it stands in the sheet
    category: str = ""
    by_content: bool = False  # it is known by its text and photos, not by sheet and row: answered alike wherever it is

    @property
    def key(self) -> str:
        """What prepared prompts and random numbers go by."""
        return _content_of(self.text, self.photos) if self.by_content else f"{self.sheet}/{self.row}"


class RowProblem(NamedTuple):
    """Something wrong with one row. The kind of problem is what stands before the first colon of `problem`."""

    row: int
    product_id: str
    problem: str
    used: bool  # True when the row is used all the same, for example with four of its five photos

    @property
    def kind(self) -> str:
        """What kind of problem it is, as in "photo missing"."""
        return self.problem.partition(":")[0]

    @property
    def detail(self) -> str:
        """What stands behind the kind, or the kind where nothing does."""
        return self.problem.partition(": ")[2] or self.problem


class JudgedRow(NamedTuple):
    """A row of a sheet as it stands there, what it is read as, what is wrong with it, and whether it can be used."""

    row: ProductRow
    sample: Sample
    problems: list[str]
    used: bool


def cached_photo_path(address: str, cache_dir: str | Path) -> Path:
    """Name the cache file of a photo address: md5 of the whole address, then its extension.

    The extension is that of a photo format before any ? or #, else ".jpg". The file need not exist.
    """
    return Path(cache_dir) / _cached_name(address)


def _cached_name(address: str) -> str:
    if address.startswith(PICTURE):
        return address.removeprefix(PICTURE).rpartition("/")[2]  # a cell may say so too, and must not leave the cache
    # Strings, here and below: a sheet may name a million photos.
    name = address.partition("?")[0].partition("#")[0].rpartition("/")[2]
    _, dot, extension = name.rpartition(".")
    extension = "." + extension if dot and "." + extension.lower() in _PHOTO_EXTENSIONS else ".jpg"
    return hashlib.md5(address.encode("utf-8", "surrogatepass"), usedforsecurity=False).hexdigest() + extension


def find_cached_photo(address: str, cache_dir: str | Path) -> str | None:
    """Find an address's file in the cache, under its name or one that follows the extension to the letter."""
    return _find_cached(address, f"{cache_dir}/{_cached_name(address)}")


def _find_cached(address: str, path: str) -> str | None:
    if os.path.isfile(path):  # Path.is_file raises on an address too long for a file
        return path
    stem, _, extension = path.rpartition(".")
    if "?" in address or not address.endswith("." + extension):
        for whole in (address.partition("?")[0], address):
            older = stem + os.path.splitext(whole)[1]
            if older != path and os.path.isfile(older):
                return older
    return None


@lru_cache(maxsize=1_000)
def _content_of(text: str, photos: tuple[str, ...]) -> str:
    """A hash of a text and the bytes of photo files."""
    return key_of(text, [content_key(photo) for photo in photos])


def key_of(text: str, contents: Sequence[str]) -> str:
    """A hash of a text and of what is in its photos, the content_key of each."""
    parts = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(), *contents]
    return hashlib.sha256("/".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def load_photos(sample: Sample) -> list[Image.Image]:
    """Decode a sample's photos: RGB, turned upright as EXIF says, transparency over white; equal files count once.

    A photo that can't be used is named in the log and left out, where sample.missing_photos allows it; otherwise
    PhotoError names sheet, row and file.
    """
    rule, photos = sample.missing_photos, []
    for path, photo in open_photos(sample.photos):
        if isinstance(photo, Image.Image):
            photos.append(photo)
            continue
        message = (f"{sample.sheet} row {sample.row} ({sample.product_id}): photo {path} can't be used: {photo}. "
                   "Replace or delete the file")
        if rule == "drop_row" or rule == "use_rest" and len(sample.photos) == 1:
            raise PhotoError(message)
        if os.path.isfile(path):  # that another one is missing was said when the sheet was read
            _warn_once(message)
        if rule == "placeholder":
            photos.append(Image.new("RGB", _PLACEHOLDER, (128, 128, 128)))
    if sample.photos and not photos and rule == "use_rest":
        raise PhotoError(f"{sample.sheet} row {sample.row} ({sample.product_id}): none of its {len(sample.photos)} "
                         "photos can be used, see above")
    return photos


@lru_cache(maxsize=10_000)
def _warn_once(message: str) -> None:
    logger.warning(message)


def load_samples(data_path: str | Path, image_cache_dir: str | Path, missing_photos: MissingPhotos = "use_rest",
                 require_label: bool = True, reading: SheetOptions | None = None,
                 partial_labels: PartialLabels = "axis", local_photos: bool = True
                 ) -> tuple[list[Sample], list[RowProblem]]:
    """Read a sheet into samples, in its order, and the problems of its rows.

    missing_photos: "use_rest" uses the photos that are there and leaves a row out when none is; "drop_row" leaves it
    out when any is missing; "text_only" uses it even without any; "placeholder" puts grey pictures in their place.
    A row that names no photo is always used.
    require_label: leave rows without a trustworthy label out; otherwise they get the label ().
    partial_labels: labels of one or two sizes keep their axes ("axis"), lose them ("largest") or are left out ("skip").
    local_photos: take the files that a sheet names by their path, too.
    Raises DataError when the sheet itself can't be read or lacks a required column.
    """
    samples, problems = read_rows(data_path, image_cache_dir, missing_photos, require_label, reading, partial_labels,
                                  local_photos)
    doubts = doubtful_labels(samples)
    if not doubts:
        return samples, problems
    if require_label:  # what is said of a row that is now left out must not call it used
        problems = [problem._replace(used=problem.used and problem.row not in doubts) for problem in problems]
    problems += [RowProblem(sample.row, sample.product_id, doubts[sample.row], not require_label)
                 for sample in samples if sample.row in doubts]
    samples = [sample if sample.row not in doubts else replace(sample, label=Label()) for sample in samples
               if sample.row not in doubts or not require_label]
    return samples, sorted(problems, key=lambda problem: problem.row)


def read_rows(data_path: str | Path, image_cache_dir: str | Path, missing_photos: MissingPhotos, require_label: bool,
              reading: SheetOptions | None = None, partial_labels: PartialLabels = "axis", local_photos: bool = True
              ) -> tuple[list[Sample], list[RowProblem]]:
    """Do what load_samples does, but take each label that can be read, likely or not."""
    samples, problems = [], []
    for judged in judge_rows(data_path, image_cache_dir, missing_photos, require_label, reading, partial_labels,
                             local_photos):
        sample, used = judged.sample, judged.used
        problems += [RowProblem(sample.row, sample.product_id, problem, used) for problem in judged.problems]
        if used:
            samples.append(sample)
    return samples, problems


def judge_rows(data_path: str | Path, image_cache_dir: str | Path, missing_photos: MissingPhotos, require_label: bool,
               reading: SheetOptions | None = None, partial_labels: PartialLabels = "axis", local_photos: bool = True
               ) -> Iterator[JudgedRow]:
    """Judge a sheet's rows one after the other, each by itself: see load_samples."""
    if missing_photos not in get_args(MissingPhotos):
        raise ValueError(f"missing_photos is {missing_photos!r}; choose {', '.join(get_args(MissingPhotos))}")
    path, cache_dir = Path(data_path), str(image_cache_dir)
    sheet_dir = str(path.parent) if local_photos else None
    reading = reading or SheetOptions()
    sheet = f"{path.name} [{reading.sheet_name}]" if reading.sheet_name else path.name
    for row in read_sheet(path, reading, ("text", "label") if require_label else ("text",), cache_dir):
        label, label_problems = _read_label(row.label, require_label, partial_labels)
        photos, photo_problems = _find_photos(row, sheet_dir, cache_dir, missing_photos)
        text = as_seen(row.text)
        text_problems = [] if text else ["text missing"]

        used = not text_problems and not (require_label and label_problems)
        if photo_problems:
            used = used and (missing_photos in ("text_only", "placeholder")
                             or (missing_photos == "use_rest" and bool(photos)))
        notes = ["text holds HTML: it is read as a person sees it, without tags"] if text != row.text else []
        sample = Sample(row.number, row.sku_id or _identity(row), text, label, photos, sheet, missing_photos, row.label,
                        intern(row.category))
        yield JudgedRow(row, sample, text_problems + notes + label_problems + photo_problems, used)


def _identity(row: ProductRow) -> str:
    addresses = [address for _, address in row.photos]
    identity = json.dumps([row.text, *addresses, *[""] * (5 - len(addresses))])  # as when there were five columns
    return hashlib.sha256(identity.encode("utf-8")).hexdigest()[:16]


def _read_label(text: str, required: bool, partial: PartialLabels) -> tuple[Label, list[str]]:
    if not text:
        return Label(), ["label missing"] if required else []
    try:
        label = parse_label(text)
    except LabelError as error:
        if error.verdict == "missing" and not required:
            return Label(), []
        return Label(), [f"{_FAULTS[error.verdict]}: {str(error).removeprefix('label ')}"]
    if len(label) == 3 or partial == "axis":
        return label, []
    if partial == "skip":
        return label, [f"label partial: {text!r} gives {len(label)} of three sizes, and such labels are skipped"]
    return Label(label), []


def _find_photos(row: ProductRow, sheet_dir: str | None, cache_dir: str, missing_photos: MissingPhotos
                 ) -> tuple[tuple[str, ...], list[str]]:
    photos: dict[str, None] = {}  # in order, each once
    problems = []
    for column, address in row.photos:
        named = sheet_dir is None or "://" in address or address.startswith(PICTURE)
        local = None if named else os.path.join(sheet_dir, address)
        expected = f"{cache_dir}/{_cached_name(address)}"
        found = local if local and os.path.isfile(local) else _find_cached(address, expected)
        if found is None:
            way_out = f"; {FETCHED}" if address[:4].lower() == "http" else ""
            problems.append(f"photo missing: {column} {address} (expected as {local or expected}{way_out})")
            if missing_photos == "placeholder":
                photos[expected] = None
        else:
            photos[found] = None
    for fault in row.faults:
        problems.append(f"photo missing: {fault}")
        if missing_photos == "placeholder":
            photos[f"{cache_dir}/{fault}"] = None
    return tuple(photos), problems


def doubtful_labels(samples: Sequence[Sample]) -> dict[int, str]:
    """Say of each row whose label nobody can trust why: no product is so large or small, or labels of one product
    contradict each other."""
    doubts = {}
    for sample in samples:
        for size in sample.label:
            if not _SMALLEST_SIZE <= size <= _LARGEST_SIZE:
                doubts[sample.row] = (f"label impossible: {sample.written_label!r}: no product has a side of "
                                      f"{as_written(size)} cm")
    for group in rows_of_products(samples):
        one, other = most_different(group)
        if other is not None and label_gap(one.label, other.label) > CONTRADICTION:
            for sample in group:
                against = one if sample is not one else other
                doubts[sample.row] = (f"labels contradict: {sample.written_label!r} here, {against.written_label!r} in "
                                      f"row {against.row} for the same product")
    return doubts


def rows_of_products(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Group the labelled samples of products that have several."""
    groups: dict[str, list[Sample]] = {}
    several = come_again(sample.product_id for sample in samples if sample.label)
    for sample in samples:
        if sample.label and hash(sample.product_id) in several:
            groups.setdefault(sample.product_id, []).append(sample)
    return [group for group in groups.values() if len(group) > 1]


def come_again(keys: Iterable[Hashable]) -> set[int]:
    """Return the hashes of the keys that come more than once; a few others may be among them."""
    hashes = sorted(map(hash, keys))  # of a million keys a third of the memory that a dictionary takes
    return {one for one, other in pairwise(hashes) if one == other}


def most_different(group: Sequence[Sample]) -> tuple[Sample, Sample | None]:
    """Return the first sample of a product and the one whose label differs most from it; None when none is written
    differently."""
    others = [sample for sample in group if sample.written_label != group[0].written_label]
    return group[0], max(others, key=lambda other: label_gap(group[0].label, other.label), default=None)


def label_gap(one: Sequence[float], other: Sequence[float]) -> float:
    """Say by what share of the larger one two labels differ on a side, sorted; infinite when one has more sides."""
    if len(one) != len(other):
        return float("inf")
    return max(abs(a - b) / max(a, b) for a, b in zip(sorted(one), sorted(other), strict=True))
