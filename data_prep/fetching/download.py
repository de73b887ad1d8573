"""One HTTP request: checked address, checked content, bounded size and time.

Sockets are opened only for public addresses. The check sees the address that is connected to, so neither a
redirect nor a DNS answer that changes between check and use gets around it.
"""

import asyncio
import email.utils
import errno
import hashlib
import ipaddress
import mimetypes
import socket
import time
from collections import OrderedDict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from yarl import URL

from data_prep.fetching.robots import (
    MAX_ROBOTS_BYTES,
    TOKEN,
    RobotsRules,
    parse_robots,
    refusing_tag,
)
from data_prep.fetching.url_table import BAD_URL, parse_url
from data_prep.options import FetchOptions
from data_prep.values import shown
from muomni import __version__
from muomni.data.media.formats import detect_format
from muomni.errors import MachineError
from muomni.io.atomic_write import open_atomic

_REDIRECTS = (301, 302, 303, 307, 308)
_TEMPORARY = (408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529)
# Bytes from which the format is detected.
_START_BYTES = 512
_BLOCK_BYTES = 1 << 16
_MAX_KEPT_ROBOTS = 10_000
# Unused connections are closed after this time, since there may be thousands of hosts.
_KEEP_ALIVE_S = 2.0
_NOT_PUBLIC = "is not a public address; use --allow-private to connect to it"
# Networks that stand for an IPv4 address in their last 32 bits (NAT64).
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


@dataclass(frozen=True, slots=True)
class Download:
    """A file that was stored, with the response that it came from."""

    path: Path
    num_bytes: int
    sha256: str
    http_status: int
    content_type: str


class FetchError(Exception):
    """A failed request; `wait_s` is the time that the server asks to wait."""

    # Reasons that say that no answer came from the host.
    UNREACHABLE = ("connection", "dns", "private-address", "timeout", "tls")

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        is_temporary: bool = False,
        http_status: int | None = None,
        wait_s: float = 0.0,
    ) -> None:
        super().__init__(message)
        self.reason, self.is_temporary = reason, is_temporary
        self.http_status, self.wait_s = http_status, wait_s


class Client:
    """Requests within the limits of the options; use it as an asynchronous context manager."""

    def __init__(self, options: FetchOptions) -> None:
        self._options = options
        self._robots: OrderedDict[URL, asyncio.Task[RobotsRules]] = OrderedDict()

    async def __aenter__(self) -> "Client":
        options = self._options
        connector = aiohttp.TCPConnector(
            limit=0,
            resolver=aiohttp.ThreadedResolver(),
            socket_factory=None if options.allow_private else _open_socket,
            keepalive_timeout=_KEEP_ALIVE_S,
        )
        contact = f"; +{options.contact}" if options.contact else ""
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={
                "User-Agent": f"{TOKEN}/{__version__} (downloads {options.kind} data sets{contact})",
                "Accept": f"{options.kind}/*, */*;q=0.5",
                "Accept-Encoding": "identity",
            },
            timeout=aiohttp.ClientTimeout(
                total=options.total_timeout_s,
                sock_connect=options.connect_timeout_s,
                sock_read=options.read_timeout_s,
            ),
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._session.close()

    async def request(self, url: URL, stem: Path) -> Download | URL:
        """Store the image or audio clip at a URL as `stem` with its extension, or return a redirect's target.

        Raises `FetchError`.
        """
        try:
            if self._options.robots == "all" and not (await self._rules(url)).allows(
                url.raw_path_qs
            ):
                raise FetchError("robots", "robots.txt of the host disallows this path")
            async with self._session.get(url, allow_redirects=False) as response:
                if response.status in _REDIRECTS:
                    return _target(response)
                self._check(response)
                return await self._store(response, stem)
        except (aiohttp.ClientError, asyncio.TimeoutError, UnicodeError) as error:
            raise _translated(error) from error

    def crawl_delay_s(self, url: URL) -> float:
        """Seconds between requests that robots.txt of a requested host asks for; 0 if unknown."""
        task = self._robots.get(url.origin())
        return task.result().crawl_delay_s if task and task.done() and not task.exception() else 0.0

    def _check(self, response: aiohttp.ClientResponse) -> None:
        """Raise `FetchError` unless the response has a body to keep."""
        status = response.status
        if status not in (200, 203):
            raise FetchError(
                f"http-{status}",
                f"the server answered {status} {response.reason or ''}".rstrip(),
                is_temporary=status in _TEMPORARY,
                http_status=status,
                wait_s=_retry_after_s(response.headers.get("Retry-After", "")),
            )
        tag = refusing_tag(response.headers.getall("X-Robots-Tag", ()))
        if tag and self._options.robots != "none":
            raise FetchError("robots-tag", f"the header X-Robots-Tag has {tag}", http_status=status)
        if (response.content_length or 0) > self._options.size_limit:
            raise self._too_large(status)

    async def _store(self, response: aiohttp.ClientResponse, stem: Path) -> Download:
        status, content_type = response.status, response.headers.get("Content-Type", "")
        start = await _read(response, _START_BYTES)
        found = detect_format(start)
        if not start:
            raise FetchError("empty", "the body is empty", http_status=status)
        if found is None or found.kind != self._options.kind or found.handling == "refused":
            raise FetchError(
                f"not-{self._options.kind}",
                f"the content is {found.name if found else 'unknown'}, not {self._options.kind} that "
                f"sharding takes: type {shown(content_type)}, first bytes {shown(start[:16])}",
                http_status=status,
            )
        suffix = f".{found.suffix}" if found.suffix else _suffix_of(content_type)
        path = stem.with_name(f"{stem.name}{suffix}")
        digest, num_bytes, block = hashlib.sha256(), 0, start
        with ExitStack() as stack:
            file = stack.enter_context(open_atomic(path))
            while block:
                num_bytes += len(block)
                if num_bytes > self._options.size_limit:
                    raise self._too_large(status)
                digest.update(block)
                file.write(block)
                block = await response.content.read(_BLOCK_BYTES)
            # Syncing takes milliseconds, in which other downloads go on.
            await asyncio.to_thread(stack.pop_all().close)
        return Download(path, num_bytes, digest.hexdigest(), status, content_type)

    def _too_large(self, status: int) -> FetchError:
        limit = f"{self._options.size_limit:,} bytes"
        return FetchError(
            "too-large", f"the file has more than {limit} (--max-mb)", http_status=status
        )

    async def _rules(self, url: URL) -> RobotsRules:
        """The rules of an origin, requested once; raises `FetchError` and as aiohttp does."""
        origin = url.origin()
        if origin not in self._robots:
            while len(self._robots) >= _MAX_KEPT_ROBOTS:
                self._robots.popitem(last=False)
            self._robots[origin] = asyncio.ensure_future(self._load_rules(origin))
        self._robots.move_to_end(origin)
        try:
            return await self._robots[origin]
        except (FetchError, aiohttp.ClientError, asyncio.TimeoutError):
            self._robots.pop(origin, None)
            raise

    async def _load_rules(self, origin: URL) -> RobotsRules:
        """RFC 9309: no rules if the file is unavailable (4xx), no access if the server fails."""
        url = origin.with_path("/robots.txt")
        try:
            async with self._session.get(url, max_redirects=5) as response:
                status = response.status
                if status in _TEMPORARY or status >= 500:
                    raise FetchError(
                        "robots",
                        f"robots.txt of the host cannot be read: {status} {response.reason or ''}",
                        is_temporary=True,
                        http_status=status,
                        wait_s=_retry_after_s(response.headers.get("Retry-After", "")),
                    )
                content = await _read(response, MAX_ROBOTS_BYTES) if status == 200 else b""
        except (aiohttp.TooManyRedirects, aiohttp.InvalidURL):
            content = b""
        return parse_robots(content.decode("utf-8", "replace"))


async def _read(response: aiohttp.ClientResponse, num_bytes: int) -> bytes:
    """The first bytes of a body: at least `num_bytes`, or all."""
    content = bytearray()
    while len(content) < num_bytes and (block := await response.content.read(_BLOCK_BYTES)):
        content += block
    return bytes(content)


def _target(response: aiohttp.ClientResponse) -> URL:
    location = response.headers.get("Location", "")
    try:
        if not location:
            raise ValueError("the header is missing")
        relative = URL(location, encoded=location.isascii() and " " not in location)
        return parse_url(str(response.url.join(relative)))
    except ValueError as error:
        message = f"the server redirects to {shown(location)}, which is not an HTTP URL"
        raise FetchError(BAD_URL, message, http_status=response.status) from error


def _open_socket(info: tuple[Any, Any, int, str, tuple]) -> socket.socket:
    """A socket for an address that is about to be connected; raises OSError if it is not public."""
    family, kind, protocol, _, address = info
    if not is_public(address[0]):
        raise PermissionError(f"{address[0]} {_NOT_PUBLIC}")
    return socket.socket(family, kind, protocol)


def is_public(address: str) -> bool:
    """Whether an IP address is on the public internet; an IPv4 address within IPv6 counts as itself."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is None and ip.teredo:
            inner = ip.teredo[1]
        ip = inner or ip
    return ip.is_global and not ip.is_multicast


def _retry_after_s(text: str) -> float:
    """Seconds of a Retry-After header, which is a number or a date; 0 if it is neither."""
    if text.strip().isdecimal():
        return float(text)
    try:
        date = email.utils.parsedate_to_datetime(text)
    except (ValueError, TypeError):
        return 0.0
    return max(0.0, date.timestamp() - time.time())


def _translated(error: Exception) -> FetchError:
    """The failure that an exception of aiohttp stands for."""
    text = shown(str(error) or type(error).__name__)[1:-1]
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        is_temporary = error.os_error.errno == socket.EAI_AGAIN
        return FetchError("dns", f"the host is unknown: {text}", is_temporary=is_temporary)
    if isinstance(error, aiohttp.ClientSSLError):
        return FetchError("tls", f"no secure connection: {text}")
    if isinstance(error, aiohttp.ClientOSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        raise MachineError(
            "too many open files; use fewer --connections, or raise the limit (ulimit -n)"
        )
    if isinstance(error, aiohttp.ClientConnectorError) and _NOT_PUBLIC in str(error.os_error):
        return FetchError("private-address", str(error.os_error))
    if isinstance(error, asyncio.TimeoutError):
        return FetchError(
            "timeout", f"the server did not answer in time: {text}", is_temporary=True
        )
    if isinstance(error, aiohttp.ClientPayloadError):
        return FetchError("truncated", f"the body ended early: {text}", is_temporary=True)
    if isinstance(error, aiohttp.InvalidURL | UnicodeError):
        return FetchError(BAD_URL, text)
    if isinstance(error, aiohttp.ClientResponseError):
        # Perhaps what an earlier answer left in a connection.
        return FetchError(
            "bad-response", f"the answer is not valid HTTP: {text}", is_temporary=True
        )
    return FetchError("connection", f"the connection failed: {text}", is_temporary=True)


def _suffix_of(content_type: str) -> str:
    """The usual suffix of files of a type; sharding goes by the content."""
    return mimetypes.guess_extension(content_type.partition(";")[0].strip()) or ".bin"
