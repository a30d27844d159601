"""Who may come in: the host asked for, the key, the size of a body and the time it takes. And what is logged of it.

An ASGI middleware around everything. Logs hold sizes and hashes, never texts, keys or what stands behind a ?.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import json
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from loguru import logger

from app.metrics import Metrics
from app.refusals import Refusal
from config import ServiceOptions
from ground.errors import OptionError

Message = MutableMapping[str, Any]
Receive, Send = Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]

OPEN_TO_ALL = ("/", "/livez", "/health")
ENDPOINTS = (*OPEN_TO_ALL, "/metrics", "/extract", "/extract_sheet", "/v1/models", "/v1/chat/completions")
_LEAST_PACE = 100_000  # bytes a second with which a body may take longer than body_seconds
_HOST = re.compile(r"(?:\[(?P<six>[0-9a-fA-F:.]+)\]|(?P<name>[\w.-]+))(?::[0-9]{1,5})?", re.ASCII)
_SECONDS_AWAY = 10  # to read a refused body away, so that the client gets to see the answer
_HEADERS = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"),
            (b"x-frame-options", b"DENY"), (b"cross-origin-resource-policy", b"same-origin"))


def read_keys(path: str | None) -> list[bytes]:
    """Read the keys of a file, one a line, as SHA-256; raises OptionError when there is none in it."""
    if path is None:
        return []
    keys = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    keys = [key for key in keys if key and not key.startswith("#")]
    if not keys or min(map(len, keys)) < 16:
        raise OptionError(f"--key_file {path}: give keys of at least 16 characters, one a line, such as those of "
                          "openssl rand -hex 32")
    return [hashlib.sha256(key.encode()).digest() for key in keys]


class Door:
    """Looks at every request before the application does."""

    def __init__(self, app: Callable[..., Awaitable[None]], options: ServiceOptions, keys: Sequence[bytes],
                 metrics: Metrics):
        self.app, self._options, self._keys, self._metrics = app, options, keys, metrics

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Let a request in, or say why not."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        visit = Visit(scope, receive, send, self._options)
        try:
            visit.known = self._check(scope, visit.headers)
            await self.app({**scope, "visit": visit}, visit.receive, visit.send)
        except Refusal as refusal:
            await visit.refuse(refusal)
        finally:
            self._note(visit)

    def _check(self, scope: Message, headers: dict[bytes, bytes]) -> bool:
        """Raise Refusal for who may not come in; returns whether a key was shown, or none is needed."""
        host = headers.get(b"host", b"").decode("latin-1")
        if not self._is_allowed(host):
            raise Refusal(400, "wrong_host", "this service does not answer to that Host; its owner can allow the name "
                                             "with --allowed_hosts")
        origin = headers.get(b"origin")
        if origin is not None and _place_of(origin.decode("latin-1")) != host.lower():
            raise Refusal(403, "other_site", "pages of other sites may not ask this service")
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        given = hashlib.sha256(key.strip()).digest()
        # All are compared, so that the time says nothing.
        equal = [hmac.compare_digest(given, known) for known in self._keys]
        known = not self._keys or kind.lower() == b"bearer" and any(equal)
        if not known and scope["path"] not in OPEN_TO_ALL:
            raise Refusal(401, "wrong_key", "send a valid key: Authorization: Bearer KEY")
        return known

    def _is_allowed(self, host: str) -> bool:
        """Plain addresses, which no other site's name can stand for, this machine's name for itself, and those given.
        """
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = (match["six"] or match["name"]).lower()
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in {"localhost", *map(str.lower, self._options.allowed_hosts)}
        return True

    def _note(self, visit: "Visit") -> None:
        path = visit.path if visit.path in ENDPOINTS else "/extract_sheet" if visit.path.startswith("/extract_sheet/") \
            else "other"
        outcome = str(visit.status) if visit.status else "left"
        seconds = time.monotonic() - visit.began
        self._metrics.requests.labels(path, outcome).inc()
        self._metrics.seconds.labels(path).observe(seconds)
        if path not in ("/livez", "/health", "/metrics") or visit.status >= 400:
            logger.info(f"{visit.method} {path} {outcome} {visit.received} B in, {1000 * seconds:.0f} ms{visit.asked}")


def _place_of(origin: str) -> str:
    """The host and port that a page came from; "" for an origin that is none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


class Visit:
    """One request: what came of its body and what was answered. The application finds it in scope["visit"]."""

    def __init__(self, scope: Message, receive: Receive, send: Send, options: ServiceOptions):
        self.method, self.path = scope["method"], scope["path"]
        self.headers = dict(scope["headers"])
        self.began, self.received, self.status = time.monotonic(), 0, 0
        self.known, self.asked = False, ""  # whether a key was shown, or none is needed; what was asked, for the log
        self._receive, self._send, self._options = receive, send, options
        self._whole = False
        sheet = self.path.startswith("/extract_sheet")
        self._most = int((options.max_sheet_mb if sheet else options.max_body_mb) * 2 ** 20)

    async def receive(self) -> Message:
        """Pass the body on, counted and timed; raises Refusal where it is too large or too slow."""
        if self._whole:
            return await self._receive()
        announced = self.headers.get(b"content-length", b"")
        if announced.isdigit() and int(announced) > self._most:
            raise self._too_large()
        left = self._options.body_seconds + self.received / _LEAST_PACE - (time.monotonic() - self.began)
        try:
            async with asyncio.timeout(max(0.0, left)):
                message = await self._receive()
        except TimeoutError:
            raise Refusal(408, "slow_body", f"the body came too slowly: {self.received} bytes in "
                                            f"{time.monotonic() - self.began:.0f} s") from None
        if message["type"] == "http.request":
            self.received += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self.received > self._most:
                raise self._too_large()
        return message

    def _too_large(self) -> Refusal:
        return Refusal(413, "body_too_large", f"the request is larger than {self._most / 2 ** 20:g} MiB")

    async def send(self, message: Message) -> None:
        """Pass the answer on, with the headers that every answer has."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
        await self._send(message)

    async def refuse(self, refusal: Refusal) -> None:
        """Answer no; what comes of the body is read first, or the client might see a broken connection instead."""
        if self.status:  # an answer has begun: nothing can be added
            return
        if refusal.code != "slow_body":
            await self._read_away()
        body = json.dumps(refusal.body).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), "cache-control": "no-store",
                   **refusal.headers, **({} if self._whole else {"connection": "close"})}
        await self.send({"type": "http.response.start", "status": refusal.status,
                         "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()]})
        await self.send({"type": "http.response.body", "body": body})

    async def _read_away(self) -> None:
        try:
            async with asyncio.timeout(_SECONDS_AWAY):
                while not self._whole and self.received <= 2 * self._most:
                    message = await self._receive()
                    self.received += len(message.get("body", b""))
                    self._whole = not message.get("more_body", False)
        except TimeoutError:
            pass
