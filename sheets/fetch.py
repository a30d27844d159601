"""Addresses -> files in the photo cache: many at a time, each whole or not at all, every failure with its reason.

Only http and https, also after a redirect; no cookies, no credentials; hosts on private networks are refused unless
allowed. What arrives is looked at: only a whole photo enters the cache.
"""

import ipaddress
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from http.client import BadStatusLine
from http.cookiejar import DefaultCookiePolicy
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
from loguru import logger
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HeaderParsingError, HTTPError
from urllib3.util.retry import Retry

from config import FetchOptions, SheetOptions
from ground.files import PARTIAL, whole_file
from sheets.addresses import PICTURE
from sheets.columns import read_sheet
from sheets.photos import PhotoError, open_photo
from sheets.samples import cached_photo_path, find_cached_photo

_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_REDIRECTS = 5
_BUSY = (429, 500, 502, 503, 504)  # worth another try
_LONGEST_WAIT = 60  # seconds that a server may ask to wait
_CHUNK = 2 ** 16
_HEADERS = {"User-Agent": "Mozilla/5.0 (compatible; download_images.py)", "Accept": "image/*,*/*;q=0.5",
            "Accept-Encoding": "identity"}


class Refused(ValueError):
    """An address, a host or an answer that is not taken; the text says why."""


class Interrupted(OSError):
    """A body that ended too early or came too slowly; another try may get it whole."""


@dataclass(frozen=True)
class Fetched:
    """What became of one address: reason is "" when its photo is in the cache now."""

    address: str
    reason: str = ""

    @property
    def host(self) -> str:
        """The host it was asked of."""
        try:
            return urlsplit(self.address).hostname or "-"
        except ValueError:
            return "-"


def missing_addresses(data_path: str, cache_dir: str, reading: SheetOptions) -> list[str]:
    """List the photo addresses of a sheet that have no file in the cache and are none themselves, each once."""
    addresses = {address: None for row in read_sheet(data_path, reading, ()) for _, address in row.photos
                 if not address.startswith(PICTURE)}
    sheet_dir = os.path.dirname(data_path)
    return [address for address in addresses if not os.path.isfile(os.path.join(sheet_dir, address))
            and find_cached_photo(address, cache_dir) is None]


def download_missing(data_path: str, cache_dir: str, reading: SheetOptions) -> None:
    """Fetch the photos of a sheet that are not in the cache; what failed is logged."""
    addresses = missing_addresses(data_path, cache_dir, reading)
    failed = [result for result in fetch_all(addresses, cache_dir, FetchOptions()) if result.reason]
    logger.info(f"{data_path}: {len(addresses) - len(failed)} photos fetched, {len(failed)} failed")
    for result in failed[:20]:
        logger.warning(f"not fetched: {result.address}: {result.reason}")


def fetch_all(addresses: Iterable[str], cache_dir: str | Path, options: FetchOptions) -> Iterator[Fetched]:
    """Fetch addresses into the cache, options.workers at a time, and yield each as it ends."""
    Path(cache_dir).mkdir(parents=True, exist_ok=True)
    remove_left_overs(Path(cache_dir))
    session = make_session(options)
    executor = ThreadPoolExecutor(options.workers, thread_name_prefix="fetch")
    running = set()
    try:
        for address in addresses:
            running.add(executor.submit(fetch, session, address, Path(cache_dir), options))
            if len(running) >= 4 * options.workers:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        session.close()


def remove_left_overs(cache_dir: Path) -> None:
    """Remove the unfinished files of runs that were killed."""
    for path in cache_dir.glob(f"*{PARTIAL}"):
        process = path.name.removesuffix(PARTIAL).rpartition(".")[2]
        if not (process.isdigit() and _is_running(int(process))):
            path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return True


def make_session(options: FetchOptions) -> requests.Session:
    """Make a session that tries again with growing pauses, keeps no cookies and sends no credentials."""
    session = requests.Session()
    session.headers.clear()
    session.headers.update(_HEADERS)
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    session.auth = lambda request: request  # nor those of ~/.netrc
    retries = Retry(total=options.retries, backoff_factor=0.5, backoff_jitter=0.2, status_forcelist=_BUSY,
                    raise_on_status=False, redirect=0, retry_after_max=_LONGEST_WAIT)
    adapter = _GuardedAdapter(options.allow_private, max_retries=retries, pool_maxsize=options.workers,
                              pool_connections=options.workers)
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    return session


def fetch(session: requests.Session, address: str, cache_dir: Path, options: FetchOptions) -> Fetched:
    """Fetch one address into the cache, whole or not at all. Never raises for what a server may do."""
    for attempt in range(options.retries + 1):
        try:
            with whole_file(cached_photo_path(address, cache_dir)) as partial:
                _fetch_to(session, address, partial, options)
            return Fetched(address)
        except Interrupted as error:
            reason = str(error)
            if attempt < options.retries:
                time.sleep(min(0.5 * 2 ** attempt, 10))
        except (Refused, UnicodeError) as error:
            return Fetched(address, str(error))
        except (requests.RequestException, HTTPError) as error:  # urllib3 has tried again already
            return Fetched(address, _cause(error))
        except OSError as error:
            return Fetched(address, f"can't be written to {cache_dir}: {error.strerror or error}")
    return Fetched(address, reason)


def _cause(error: BaseException) -> str:
    """Name the innermost cause, without the connection that urllib3 prints before it."""
    inner: Any = error
    while isinstance(inner, BaseException):
        error = inner
        inner = getattr(error, "reason", None) or next(
            (part for part in error.args if isinstance(part, BaseException)), None)
    if isinstance(error, BadStatusLine | HeaderParsingError):
        return "it did not answer in HTTP"
    return re.sub(r"^\w+(?:Connection|Pool)\(.*?\): ", "", str(error))[:200] or type(error).__name__


def _fetch_to(session: requests.Session, address: str, partial: Path, options: FetchOptions) -> None:
    deadline = time.monotonic() + options.deadline
    with _final_response(session, address, options) as response, partial.open("wb") as file:
        size = 0
        for chunk in _body(response, options):
            size += len(chunk)
            if size > options.max_file_mb * 2 ** 20:
                raise Refused(f"larger than {options.max_file_mb} MiB (download_images.py --max_file_mb)")
            if time.monotonic() > deadline:
                raise Refused(f"not whole after {options.deadline:g} seconds (download_images.py --deadline)")
            file.write(chunk)
        announced = response.headers.get("Content-Length", "")
        if announced.isdigit() and not response.headers.get("Content-Encoding") and size < int(announced):
            raise Interrupted(f"cut short: {size} of {announced} bytes")
        file.flush()
        os.fsync(file.fileno())
    try:
        open_photo(partial)
    except PhotoError as problem:
        kind = response.headers.get("Content-Type", "")
        raise Refused(f"no usable photo: {problem}" + (f" (sent as {kind[:60]})" if kind else "")) from None


def _final_response(session: requests.Session, address: str, options: FetchOptions) -> requests.Response:
    """Follow redirects by hand, each looked at before it is asked; raises Refused, or returns a response of 200."""
    seen = []
    while True:
        check_address(address, options.allow_private)
        seen.append(address)
        response = session.get(address, stream=True, allow_redirects=False, timeout=options.timeout)
        target = session.get_redirect_target(response)
        if response.status_code in _REDIRECTS and target:
            response.close()
            address = urljoin(address, target)
            if address in seen or len(seen) > _MOST_REDIRECTS:
                raise Refused(f"redirected in a loop or more than {_MOST_REDIRECTS} times")
            continue
        announced = response.headers.get("Content-Length", "")
        if response.status_code == 200 and not (announced.isdigit()
                                                and int(announced) > options.max_file_mb * 2 ** 20):
            return response
        response.close()
        if response.status_code == 200:
            raise Refused(f"larger than {options.max_file_mb} MiB (download_images.py --max_file_mb): {announced} "
                          "bytes announced")
        again = f", {options.retries + 1} times" if response.status_code in _BUSY and options.retries else ""
        raise Refused(f"HTTP {response.status_code} {response.reason or ''}".strip() + again)


def _body(response: requests.Response, options: FetchOptions) -> Iterator[bytes]:
    """Read what is there: a server that sends a byte a second must not hold a worker until a chunk is full."""
    try:
        while chunk := response.raw.read1(_CHUNK, decode_content=True):
            yield chunk
    except HTTPError as error:
        raise Interrupted(f"cut short: {_cause(error)}") from error


def check_address(address: str, allow_private: bool) -> None:
    """Refuse an address that is no plain http(s) one, or whose host is on a private network; raises Refused."""
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise Refused(f"no address: {error}") from None
    if parts.scheme.lower() not in ("http", "https"):
        raise Refused(f"{parts.scheme or 'no scheme'}: only http and https are fetched")
    if not host:
        raise Refused("no host in the address")
    if parts.username or parts.password:
        raise Refused("credentials in the address are not sent")
    if not allow_private:
        try:
            found = {entry[4][0] for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
        except (OSError, UnicodeError):
            return  # connecting will say so
        for ip in found:
            _refuse_private(host, ip)


def _refuse_private(host: str, ip: str) -> None:
    address = ipaddress.ip_address(ip.partition("%")[0])
    inner = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None) or address
    if not inner.is_global or inner.is_multicast:
        raise Refused(f"{host} is {ip}, on a private network; download_images.py --allow_private true fetches from "
                      "there")


class _GuardedConnection(HTTPConnection):
    """Looks once more at the host that was really reached: a name may change its address between two questions."""

    def connect(self) -> None:
        super().connect()
        _refuse_private(self.host, self.sock.getpeername()[0])


class _GuardedTLSConnection(HTTPSConnection):
    def connect(self) -> None:
        super().connect()
        _refuse_private(self.host, self.sock.getpeername()[0])


class _GuardedPool(HTTPConnectionPool):
    ConnectionCls = _GuardedConnection


class _GuardedTLSPool(HTTPSConnectionPool):
    ConnectionCls = _GuardedTLSConnection


class _GuardedAdapter(HTTPAdapter):
    def __init__(self, allow_private: bool, **settings: object):
        self._allow_private = allow_private
        super().__init__(**settings)

    def init_poolmanager(self, *args: object, **kwargs: object) -> None:
        super().init_poolmanager(*args, **kwargs)
        if not self._allow_private:
            self.poolmanager.pool_classes_by_scheme = {"http": _GuardedPool, "https": _GuardedTLSPool}
