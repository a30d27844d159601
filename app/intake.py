"""A request's body becomes a product: text and photo files, each looked at before it is let in.

Fields that are not known are refused by name, so that a misspelt one is not passed over in silence.
"""

import asyncio
import base64
import binascii
import itertools
import json
import shutil
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
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
from sheets.photos import PhotoError, check_photo, content_key
from sheets.samples import cached_photo_path, key_of
from sizes.texts import as_seen

MOST_PHOTOS = 5
_FIELDS = ("text", "photos", "samples", "id")
_IN_MEMORY = 2 ** 20  # bytes of a body; the rest lies in a file
_AT_ONCE = 2 ** 16  # bytes of JSON that are parsed sooner than a thread is found for them
_LONGEST_ID = 200
_PHOTOS = [f"photos[{place}]" for place in range(MOST_PHOTOS)]
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
        # One for all, since to make and to remove it waits for the disk; not in /tmp, where idle folders are cleared.
        self._folder = TemporaryDirectory(prefix="photos-", dir=options.state_dir)
        self._number = itertools.count()

    def close(self) -> None:
        """Remove the folder that photos lie in."""
        self._folder.cleanup()

    @contextmanager
    def room(self) -> Iterator["Room"]:
        """Give a request's photos names of their own; the files go when the block ends."""
        room = Room(Path(self._folder.name) / str(next(self._number)))
        try:
            yield room
        finally:
            room.clear()

    @asynccontextmanager
    async def product(self, request: Request) -> AsyncIterator[Asked]:
        """Read /extract's body, JSON or multipart; its photos go when the block ends."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        with self.room() as room:
            if kind == "application/json":
                fields, photos = await self._of_json(request, room)
            elif kind == "multipart/form-data":
                fields, photos = await self._of_form(request, room)
            else:
                raise Refusal(415, "wrong_type", "send application/json or multipart/form-data", "Content-Type")
            text = self.clean_text(fields["text"], "text")
            files = await self.fetch_missing(photos, room, _PHOTOS)
            samples = fields["samples"] or self._options.samples
            yield Asked(Product(text, files, samples, greedy=samples == 1, key=room.key(text, files)),
                        None if fields["id"] is None else without_halves(fields["id"]))

    async def _of_json(self, request: Request, room: "Room") -> tuple[dict[str, Any], list[str | Path]]:
        async with self.json_body(request) as body:
            fields = check_fields(body)
            return fields, await self.keep(fields.pop("photos"), room, _PHOTOS)

    async def _of_form(self, request: Request, room: "Room") -> tuple[dict[str, Any], list[str | Path]]:
        async with request.form(max_files=MOST_PHOTOS + 1, max_fields=100) as form, self._few:
            fields, photos = form_fields(form)
            return fields, await self.keep(photos, room, _PHOTOS)

    @asynccontextmanager
    async def json_body(self, request: Request) -> AsyncIterator[Any]:
        """Read a JSON body, through a file where it is large; raises Refusal for what is none.

        Few bodies are in memory at a time: they are let go when the block ends, in which keep() puts photos into files.
        """
        with SpooledTemporaryFile(max_size=_IN_MEMORY) as file:
            async for chunk in request.stream():
                file.write(chunk)
            async with self._few:
                yield read_json(file) if file.tell() <= _AT_ONCE else await asyncio.to_thread(read_json, file)

    def clean_text(self, text: str, field: str) -> str:
        """Write the product's text as a person sees it, as in training; raises Refusal when it is too long or empty."""
        if len(text) > self._options.max_text:
            raise Refusal(422, "text_too_long", f"{len(text):,} characters, at most {self._options.max_text:,}", field)
        seen = as_seen(without_halves(text).strip())
        if not seen:
            raise Refusal(422, "no_text", "the product's text is empty", field)
        return seen

    async def keep(self, photos: Sequence[str | UploadFile], room: "Room", fields: Sequence[str]) -> list[str | Path]:
        """Put photos into files, from data: URLs and uploads, and look at each; addresses are left as they are.

        fields: the name of each, for the Refusal that is raised.
        """
        if len(photos) > MOST_PHOTOS:
            raise Refusal(422, "too_many_photos", f"{len(photos)} photos, at most {MOST_PHOTOS}", "photos")
        with self._counting():
            return await asyncio.to_thread(self._kept, photos, room, fields) if photos else []

    def _kept(self, photos: Sequence[str | UploadFile], room: "Room", fields: Sequence[str]) -> list[str | Path]:
        kept = []
        for photo, field in zip(photos, fields, strict=False):
            path = photo if _is_address(photo) else keep_photo(photo, room, field, self._most_bytes)
            kept.append(path if path is photo else self._checked(path, room, field))
        return kept

    async def fetch_missing(self, photos: Sequence[str | Path], room: "Room", fields: Sequence[str]
                            ) -> tuple[Path, ...]:
        """Fetch the photos that keep() has left as addresses; raises Refusal."""
        with self._counting():
            return tuple([await self._fetched(photo, room, field) if isinstance(photo, str) else photo
                          for photo, field in zip(photos, fields, strict=False)])

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Count a photo that is refused in the block."""
        try:
            yield
        except Refusal as refusal:
            self._metrics.photo_failures.labels(refusal.code).inc()
            raise

    @property
    def _most_bytes(self) -> int:
        return int(self._options.max_photo_mb * 2 ** 20)

    def _checked(self, path: Path, room: "Room", field: str) -> Path:
        if path.stat().st_size > self._most_bytes:
            raise Refusal(413, "photo_too_large", f"larger than {self._options.max_photo_mb:g} MiB", field)
        try:
            check_photo(path, int(self._options.max_megapixels * 1e6))
        except PhotoError as problem:
            raise Refusal(413 if "too large" in str(problem) else 422, "bad_photo", str(problem), field) from None
        room.hashes[path] = content_key(path)
        return path

    async def _fetched(self, address: str, room: "Room", field: str) -> Path:
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
        folder = room.next()
        folder.mkdir()  # two requests may want the same
        found = await asyncio.to_thread(fetch_straight, address, folder, options)
        if found:
            raise Refusal(422, "not_fetched", found, field)
        return await asyncio.to_thread(self._checked, cached_photo_path(address, folder), room, field)


class Room:
    """Where the photos of one request lie, and what is in them."""

    def __init__(self, stem: Path):
        self._stem, self._paths = stem, []
        self.hashes: dict[Path, str] = {}

    def next(self) -> Path:
        """Name a file, or a folder, that is not there yet."""
        self._paths.append(self._stem.with_name(f"{self._stem.name}-{len(self._paths)}"))
        return self._paths[-1]

    def key(self, text: str, photos: Sequence[Path]) -> str:
        """Tell a product from others: a hash of its text and photos."""
        return key_of(text, [self.hashes[path] for path in photos])

    def clear(self) -> None:
        """Remove them all."""
        for path in self._paths:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


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


def _is_address(photo: Any) -> bool:
    return isinstance(photo, str) and photo.startswith(("http://", "https://"))


def keep_photo(photo: str | UploadFile, room: Room, field: str, most_bytes: int) -> Path:
    """Write a photo into a file, cut behind the limit; raises Refusal naming the field for a data: URL that is none."""
    content = photo_of_url(photo, field, most_bytes) if isinstance(photo, str) else photo.file.read(most_bytes + 1)
    path = room.next()
    path.write_bytes(content)
    return path


def photo_of_url(photo: str, field: str, most_bytes: int) -> bytes:
    """Take the bytes out of a data: URL; raises Refusal naming the field."""
    head, comma, data = photo.partition(",")
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        raise Refusal(422, "bad_photo", "give a photo as data:image/...;base64,...", field)
    if len(data) > most_bytes * 4 // 3 + 4:
        raise Refusal(413, "photo_too_large", f"larger than {most_bytes / 2 ** 20:g} MiB", field)
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise Refusal(422, "bad_photo", "the data: URL is no base64", field) from None
