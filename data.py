"""The sheet: rows of text, label and photo addresses become samples, and every row that can't is named.

A sheet is .xlsx (its first worksheet) or .csv in UTF-8. Its first row names the columns: `text`, `label`, optionally
`sku_id`, `category`, `sku_img` and `spu_img_1` to `spu_img_4`. Photos are read from a cache folder (see
`cached_photo_path`).
"""

import difflib
import hashlib
import json
import os
import random
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
from loguru import logger
from PIL import Image, ImageOps, UnidentifiedImageError

from reward import LabelError, parse_label

PHOTO_COLUMNS = ("sku_img", "spu_img_1", "spu_img_2", "spu_img_3", "spu_img_4")
_COLUMNS = ("sku_id", "text", "label", "category", *PHOTO_COLUMNS)
MissingPhotos = Literal["use_rest", "drop_row", "text_only"]

# What openpyxl and the zip layer under it raise for a file that is damaged or no workbook at all.
_BROKEN_WORKBOOK = (zipfile.BadZipFile, zlib.error, KeyError, ValueError, SyntaxError, EOFError, NotImplementedError)
# What Pillow's readers raise for a truncated, damaged or oversized photo.
_BROKEN_PHOTO = (UnidentifiedImageError, OSError, Image.DecompressionBombError, ValueError, SyntaxError, TypeError,
                 IndexError, EOFError, struct.error)


class DataError(ValueError):
    """A sheet that can't be used; the text says why and what to do."""


class PhotoError(ValueError):
    """A photo file that can't be decoded; the text names sheet, row and file."""


@dataclass(frozen=True)
class Sample:
    """One usable row of a sheet."""

    row: int  # as a person sees it in the sheet: the header is row 1, the first product row 2
    product_id: str  # sku_id, or a hash of text and photo addresses where there is none
    text: str
    label: tuple[float, ...]  # 1 to 3 sizes in cm, or empty when the row has no label and needs none
    photos: tuple[Path, ...]  # files that existed when the sheet was read
    sheet: str  # file name of the sheet, for messages
    category: str = ""  # reports group products by it; nothing else reads it


@dataclass(frozen=True)
class RowProblem:
    """Something wrong with one row. The kind of problem is what stands before the first colon of `problem`."""

    row: int
    product_id: str
    problem: str
    used: bool  # True when the row is used all the same, for example with four of its five photos


def cached_photo_path(address: str, cache_dir: str | Path) -> Path:
    """Name the cache file of a photo address: md5 of the whole address, then its extension without any query string.

    An address without an extension gets ".jpg". The file need not exist.
    """
    extension = os.path.splitext(address.partition("?")[0])[1] or ".jpg"
    return Path(cache_dir) / (hashlib.md5(address.encode("utf-8"), usedforsecurity=False).hexdigest() + extension)


def load_photos(sample: Sample) -> list[Image.Image]:
    """Decode a sample's photos: RGB, turned upright as EXIF says, transparency over white.

    Raises PhotoError, naming sheet, row and file, when one of them can't be read.
    """
    photos = []
    for path in sample.photos:
        try:
            photos.append(_load_photo(path))
        except _BROKEN_PHOTO as error:
            raise PhotoError(f"{sample.sheet} row {sample.row} ({sample.product_id}): photo {path} can't be read: "
                             f"{error}. Replace or delete the file") from error
    return photos


def _load_photo(path: Path) -> Image.Image:
    with Image.open(path) as opened:
        photo = ImageOps.exif_transpose(opened)
    if photo.mode.startswith("I;16"):
        # Pillow clips 16-bit grey at 255 instead of scaling it, which would turn the photo white.
        photo = photo.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if not photo.has_transparency_data:
        return photo.convert("RGB")
    photo = photo.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo).convert("RGB")


def load_samples(data_path: str | Path, image_cache_dir: str | Path, missing_photos: MissingPhotos = "use_rest",
                 require_label: bool = True) -> tuple[list[Sample], list[RowProblem]]:
    """Read a sheet into samples, in its order, and the problems of its rows.

    missing_photos: "use_rest" uses the photos that are there and leaves a row out when none is; "drop_row" leaves it
    out when any is missing; "text_only" uses it even without any. A row that names no photo is always used.
    require_label: leave rows without a readable label out; otherwise they get the label ().
    Raises DataError when the sheet itself can't be read or lacks a required column.
    """
    if missing_photos not in ("use_rest", "drop_row", "text_only"):
        raise ValueError(f"missing_photos is {missing_photos!r}; choose use_rest, drop_row or text_only")
    path = Path(data_path)
    columns, rows = read_table(path)
    _check_columns(path, columns, ("text", "label") if require_label else ("text",))

    samples, problems = [], []
    for number, cells in enumerate(rows, start=2):
        if not any(cells):
            continue
        row = dict(zip(columns, cells, strict=True))
        product_id = _product_id(row)
        label, label_problems = _read_label(row.get("label", ""), require_label)
        photos, photo_problems = _find_photos(row, path.parent, Path(image_cache_dir))
        text_problems = [] if row["text"] else ["text missing"]

        used = not text_problems and not (require_label and label_problems)
        if photo_problems:
            used = used and (missing_photos == "text_only" or (missing_photos == "use_rest" and bool(photos)))
        problems += [RowProblem(number, product_id, problem, used)
                     for problem in text_problems + label_problems + photo_problems]
        if used:
            samples.append(Sample(number, product_id, row["text"], label, photos, path.name,
                                  row.get("category", "")))
    return samples, problems


def read_table(path: Path) -> tuple[list[str], list[list[str]]]:
    """Return the header and all rows below it, blank ones included, as strings without outer blanks."""
    # No header for pandas, and no cell that means "not a number": its own rules rename columns that come twice, and
    # would turn the label "N/A" into a missing one.
    options = {"header": None, "dtype": str, "keep_default_na": False}
    kind = path.suffix.lower()
    if kind not in (".xlsx", ".csv"):
        raise DataError(f"{path}: a sheet is .xlsx or .csv, not {kind or 'a file without extension'}. Save it as one")
    try:
        if kind == ".xlsx":
            table = pd.read_excel(path, engine="openpyxl", **options)
        else:
            table = pd.read_csv(path, encoding="utf-8-sig", skip_blank_lines=False, **options)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file. Give your own sheet with --data_path") from error
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error}. Check that it is a file that you may read") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 ({error}). Save it as 'CSV UTF-8', or as .xlsx") from error
    except pd.errors.EmptyDataError as error:
        raise DataError(f"{path}: is empty. Its first row must name the columns: {', '.join(_COLUMNS)}") from error
    except pd.errors.ParserError as error:
        raise DataError(f"{path}: is no well-formed CSV: {error}. Put a field with commas or line breaks in double "
                        f"quotes, or save it as .xlsx") from error
    except _BROKEN_WORKBOOK as error:
        raise DataError(f"{path}: is no readable Excel workbook: {error}. Open it in a spreadsheet program and save it "
                        f"again as .xlsx or .csv") from error
    if table.empty:
        raise DataError(f"{path}: is empty. Its first row must name the columns: {', '.join(_COLUMNS)}")
    # Excel's own error cells, such as #N/A, arrive as NaN whatever the options say.
    header, *rows = [[cell.strip() for cell in cells] for cells in table.fillna("").values.tolist()]
    return header, rows


def _check_columns(path: Path, columns: list[str], required: Sequence[str]) -> None:
    named = [column for column in columns if column]
    for column in _COLUMNS:
        if named.count(column) > 1:
            raise DataError(f"{path}: the column {column!r} comes {named.count(column)} times. Keep one of them")
    unknown = [column for column in named if column not in _COLUMNS]
    for column in required:
        if column not in named:
            nearest = difflib.get_close_matches(column, unknown, n=1, cutoff=0.5)
            way_out = f"Is {nearest[0]!r} meant? Rename it to {column!r}" if nearest else f"Add {column!r}"
            raise DataError(f"{path}: no column {column!r}. Its columns are: {', '.join(named) or 'none'}. {way_out}")
    for column in unknown:
        if difflib.get_close_matches(column, PHOTO_COLUMNS, n=1, cutoff=0.8):
            logger.warning(f"{path}: the column {column!r} is not read; photo columns are {', '.join(PHOTO_COLUMNS)}")


def _product_id(row: dict[str, str]) -> str:
    if row.get("sku_id"):
        return row["sku_id"]
    identity = json.dumps([row["text"], *(row.get(column, "") for column in PHOTO_COLUMNS)])
    return hashlib.sha256(identity.encode("utf-8")).hexdigest()[:16]


def _read_label(text: str, required: bool) -> tuple[tuple[float, ...], list[str]]:
    if not text:
        return (), ["label missing"] if required else []
    try:
        return parse_label(text), []
    except LabelError as error:
        return (), [f"label unreadable: {text!r}: {error}"]


def _find_photos(row: dict[str, str], sheet_dir: Path, cache_dir: Path) -> tuple[tuple[Path, ...], list[str]]:
    photos, problems = [], []
    for column in PHOTO_COLUMNS:
        address = row.get(column, "")
        if not address:
            continue
        local, cached = sheet_dir / address, cached_photo_path(address, cache_dir)
        # os.path.isfile, since Path.is_file raises on an address longer than a file name may be.
        found = next((path for path in (local, cached) if os.path.isfile(path)), None)
        if found is None:
            problems.append(f"photo missing: {column} {address} (expected as {cached})")
        else:
            photos.append(found)
    return tuple(photos), problems


def _kind(problem: RowProblem) -> str:
    return problem.problem.partition(":")[0]


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def summarise_problems(problems: Sequence[RowProblem], limit: int = 20) -> str:
    """Write one line for each of the first `limit` problems, the number of the others, and how many rows they cost."""
    lines = [f"row {problem.row} ({problem.product_id}): {problem.problem}: {'used' if problem.used else 'left out'}"
             for problem in problems[:limit]]
    if len(problems) > limit:
        lines.append(f"... and {len(problems) - limit} more")
    used = {problem.row for problem in problems if problem.used}
    left_out = {problem.row for problem in problems if not problem.used}
    lines.append(f"{_rows(len(used | left_out))} with problems: {len(left_out)} left out, {len(used)} used")
    return "\n".join(lines)


def require_usable(samples: Sequence[Sample], problems: Sequence[RowProblem], data_path: str | Path,
                   image_cache_dir: str | Path) -> None:
    """Raise DataError when a sheet gave no sample: how many rows it has, what is wrong with them, and the way out."""
    if samples:
        return
    if not problems:
        raise DataError(f"{data_path}: has no rows below its header. Add one row for each product")
    kinds: dict[int, set[str]] = {}
    for problem in problems:
        kinds.setdefault(problem.row, set()).add(_kind(problem))
    names = sorted({kind for of_row in kinds.values() for kind in of_row})
    counts = ", ".join(f"{name} ({_rows(sum(name in of_row for of_row in kinds.values()))})" for name in names)
    message = [f"{data_path}: no row can be used, of {len(kinds)}: {counts}.",
               f"The first: row {problems[0].row} ({problems[0].product_id}): {problems[0].problem}."]
    if any(of_row == {"photo missing"} for of_row in kinds.values()):
        message.append(f"Photos were looked for in {image_cache_dir} under md5(address) + extension. Put them there, "
                       f"or give their folder with --image_cache_dir, or use such rows without photos: "
                       f"--missing_photos text_only.")
    if any(of_row - {"photo missing"} for of_row in kinds.values()):
        message.append("Fill in the text and label of the rows in the sheet.")
    raise DataError(" ".join(message))


def split_held_out(samples: Sequence[Sample], fraction: float) -> tuple[list[Sample], list[Sample]]:
    """Split samples by product into (train, held out), each in the given order.

    fraction: expected share of the products held out, 0 to 1. A hash of its id alone decides a product's side, so
    neither reordering nor adding rows moves a product, and all rows of one product are on one side.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"the fraction of held-out products is {fraction}; it must be from 0 to 1")
    train: list[Sample] = []
    held_out: list[Sample] = []
    for sample in samples:
        (held_out if _unit_hash(sample.product_id) < fraction else train).append(sample)
    return train, held_out


def _unit_hash(text: str) -> float:
    """Hash a text to a number in [0, 1). 53 bits, since more would round up to 1."""
    return (int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") >> 11) / 2**53


def products_of_step(samples_count: int, batch_size: int, step: int, seed: int, rank: int = 0,
                     world_size: int = 1) -> list[int]:
    """List the indices of the `batch_size` products that one rank rolls out in one step, the first step being 0.

    A pure function, so a resumed run goes on where it stopped. The products stand in one endless line, pass after
    pass over the sheet, each pass in a seeded order of its own. A step takes the next batch_size * world_size of the
    line, and rank r takes every world_size-th of those from the r-th on. Over a pass each product comes exactly once;
    one batch holds a product twice only where it runs on into another pass.
    """
    if samples_count < 1:
        raise ValueError("there are no products to take a batch from")
    first = step * batch_size * world_size + rank
    orders: dict[int, list[int]] = {}
    indices = []
    for position in range(first, first + batch_size * world_size, world_size):
        number, place = divmod(position, samples_count)
        if number not in orders:
            orders[number] = list(range(samples_count))
            random.Random(f"{seed}/{number}").shuffle(orders[number])
        indices.append(orders[number][place])
    return indices
