"""A request's body becomes a product: text and photo files, each looked at before it is let in.

Fields that are not known are refused by name, so that a misspelt one is not passed over in silence.
"""

import asyncio
import base64
import binascii
import json
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import SpooledTemporaryFile, TemporaryDirectory
from typing import IO, Any
from urllib.parse import urlsplit

from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request

from app.metrics import Metrics
from app.refusals import Refusal
from app.waiting import Product
from config import FetchOptions, ServiceOptions
from sheets.fetch import fetch, make_session
from sheets.photos import PhotoError, check_photo
from sheets.samples import cached_photo_path
from sizes.texts import as_seen

MOST_PHOTOS = 5
_FIELDS = ("text", "photos", "samples", "id")
_IN_MEMORY = 2 ** 20  # bytes of a body; the rest lies in a file
_LONGEST_ID = 200
FETCH_SECONDS = 10.0


@dataclass(frozen=True)
class Asked:
    """A product as it was asked for; id: the client's own, given back."""

    product: Product
    id: str | None = None


class Intake:
    """Reads bodies within the limits, few at a time."""

    def __init__(self, options: ServiceOptions, metrics: Metrics):
        self._options, self._metrics = options, metrics
        self._few = asyncio.Semaphore(options.decode_at_once)

    @asynccontextmanager
    async def product(self, request: Request) -> AsyncIterator[Asked]:
        """Read /extract's body, JSON or multipart; its photos lie in a folder that goes when the block ends."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        with TemporaryDirectory(prefix="vlm-photos-") as folder:
            if kind == "application/json":
                fields = check_fields(await self.json_body(request))
                photos = fields.pop("photos")
            elif kind == "multipart/form-data":
                async with request.form(max_files=MOST_PHOTOS + 1, max_fields=100) as form:
                    fields, photos = form_fields(form)
                    photos = await self._in_thread(keep_files, photos, Path(folder), self._most_bytes)
            else:
                raise Refusal(415, "wrong_type", "send application/json or multipart/form-data", "Content-Type")
            text = self.clean_text(fields["text"], "text")
            files = await self.photo_files(photos, Path(folder), [f"photos[{n}]" for n in range(len(photos))])
            samples = fields["samples"] or self._options.samples
            yield Asked(Product(text, files, samples, greedy=samples == 1),
                        None if fields["id"] is None else without_halves(fields["id"]))

    async def json_body(self, request: Request) -> Any:
        """Read a JSON body, through a file where it is large; raises Refusal for what is none."""
        with SpooledTemporaryFile(max_size=_IN_MEMORY) as file:
            async for chunk in request.stream():
                file.write(chunk)
            return await self._in_thread(read_json, file)

    def clean_text(self, text: str, field: str) -> str:
        """Write the product's text as a person sees it, as in training; raises Refusal when it is too long or empty."""
        if len(text) > self._options.max_text:
            raise Refusal(422, "text_too_long", f"{len(text):,} characters, at most {self._options.max_text:,}", field)
        seen = as_seen(without_halves(text).strip())
        if not seen:
            raise Refusal(422, "no_text", "the product's text is empty", field)
        return seen

    @property
    def _most_bytes(self) -> int:
        return int(self._options.max_photo_mb * 2 ** 20)

    async def photo_files(self, photos: Sequence[str | Path], folder: Path, fields: Sequence[str]
                          ) -> tuple[Path, ...]:
        """Put photos into files, from data: URLs and addresses, and look at each; raises Refusal naming its field."""
        if len(photos) > MOST_PHOTOS:
            raise Refusal(422, "too_many_photos", f"{len(photos)} photos, at most {MOST_PHOTOS}", "photos")
        files = []
        for photo, field in zip(photos, fields, strict=True):
            try:
                if isinstance(photo, str) and photo.startswith(("http://", "https://")):
                    photo = await self._fetched(photo, folder, field)
                files.append(await self._in_thread(self._checked, photo, folder, field))
            except Refusal as refusal:
                self._metrics.photo_failures.labels(refusal.code).inc()
                raise
        return tuple(files)

    def _checked(self, photo: str | Path, folder: Path, field: str) -> Path:
        path = photo if isinstance(photo, Path) else keep_data_url(photo, folder, field, self._most_bytes)
        if path.stat().st_size > self._most_bytes:
            raise Refusal(413, "photo_too_large", f"larger than {self._options.max_photo_mb:g} MiB", field)
        try:
            check_photo(path, int(self._options.max_megapixels * 1e6))
        except PhotoError as problem:
            raise Refusal(413 if "too large" in str(problem) else 422, "bad_photo", str(problem), field) from None
        return path

    async def _fetched(self, address: str, folder: Path, field: str) -> Path:
        """Fetch a photo from a host that is listed, straight: no redirects, no proxies."""
        try:
            host = (urlsplit(address).hostname or "").lower()
        except ValueError:
            host = ""
        if host not in map(str.lower, self._options.fetch_hosts):
            raise Refusal(422, "host_not_listed", "photos are not fetched from there (--fetch_hosts): send a data: URL "
                                                  "or a file", field)
        options = FetchOptions(retries=0, timeout=FETCH_SECONDS, deadline=FETCH_SECONDS,
                               max_file_mb=max(1, int(self._options.max_photo_mb)))
        found = await asyncio.to_thread(fetch_straight, address, folder, options)
        if found:
            raise Refusal(422, "not_fetched", found, field)
        return cached_photo_path(address, folder)

    async def _in_thread(self, work: Any, *args: Any) -> Any:
        async with self._few:
            return await asyncio.to_thread(work, *args)


def without_halves(text: str) -> str:
    """Put a sign in place of half characters, which JSON can bring and UTF-8 can't hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def fetch_straight(address: str, folder: Path, options: FetchOptions) -> str:
    """Fetch one photo into a folder; returns why it could not be had, or ""."""
    with make_session(options) as session:
        session.trust_env, session.max_redirects = False, 0
        return fetch(session, address, folder, options).reason


def read_json(file: IO[bytes]) -> Any:
    """Parse a file of JSON; raises Refusal for what is none."""
    file.seek(0)
    try:
        return json.load(file)
    except (ValueError, RecursionError):
        raise Refusal(400, "bad_json", "the body is no JSON") from None


def check_fields(body: Any) -> dict[str, Any]:
    """Check the fields of a JSON request, and fill in those not given; raises Refusal naming the field."""
    if not isinstance(body, dict):
        raise Refusal(422, "bad_field", "the body must be a JSON object")
    unknown = sorted(set(body) - set(_FIELDS))
    if unknown:
        raise Refusal(422, "unknown_field", f"the fields are {', '.join(_FIELDS)}", unknown[0][:100])
    if not isinstance(body.get("text"), str):
        raise Refusal(422, "bad_field", "text is missing, or no string", "text")
    photos = body.get("photos") or []
    if not isinstance(photos, list):
        raise Refusal(422, "bad_field", "photos must be a list of data: URLs", "photos")
    for place, photo in enumerate(photos):
        if not isinstance(photo, str):
            raise Refusal(422, "bad_field", "a photo must be a string, a data: URL", f"photos[{place}]")
    samples, own = body.get("samples"), body.get("id")
    if samples is not None and (type(samples) is not int or not 1 <= samples <= 16):
        raise Refusal(422, "bad_field", "samples must be a whole number from 1 to 16", "samples")
    if own is not None and (not isinstance(own, str) or len(own) > _LONGEST_ID):
        raise Refusal(422, "bad_field", f"id must be a string of at most {_LONGEST_ID} characters", "id")
    return {"text": body["text"], "photos": photos, "samples": samples, "id": own}


def form_fields(form: FormData) -> tuple[dict[str, Any], list[UploadFile]]:
    """Take the fields and the photos out of a form; raises Refusal naming a wrong one."""
    files = [value for name, value in form.multi_items() if isinstance(value, UploadFile) and name == "photos"]
    words: dict[str, Any] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile) and name == "photos":
            continue
        if name in words or isinstance(value, UploadFile) or name == "photos":
            raise Refusal(422, "bad_field", "give photos as files, the other fields once and as text", name[:100])
        words[name] = value
    if words.get("samples", "").strip().isdecimal():
        words["samples"] = int(words["samples"].strip()[:4])
    return check_fields(words), files


def keep_files(uploads: Sequence[UploadFile], folder: Path, most_bytes: int) -> list[Path]:
    """Write the uploaded photos into files; one that is too large is cut behind the limit, where it is refused."""
    paths = []
    for place, upload in enumerate(uploads):
        paths.append(folder / f"upload-{place}")
        with paths[-1].open("wb") as file:
            if (upload.size or 0) > most_bytes:
                file.truncate(most_bytes + 1)
            else:
                shutil.copyfileobj(upload.file, file)
    return paths


def keep_data_url(photo: str, folder: Path, field: str, most_bytes: int) -> Path:
    """Write a data: URL's photo into a file; raises Refusal naming the field."""
    head, comma, data = photo.partition(",")
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        raise Refusal(422, "bad_photo", "give a photo as data:image/...;base64,...", field)
    if len(data) > most_bytes * 4 // 3 + 4:
        raise Refusal(413, "photo_too_large", f"larger than {most_bytes / 2 ** 20:g} MiB", field)
    try:
        content = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise Refusal(422, "bad_photo", "the data: URL is no base64", field) from None
    path = folder / f"data-{len(list(folder.iterdir()))}"
    path.write_bytes(content)
    return path
