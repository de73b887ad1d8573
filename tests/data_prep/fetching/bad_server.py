"""A local HTTP server that fails in the usual ways, one path for each."""

import gzip
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

from tests.data_prep.raw_corpora import audio, image

HTML = b"<!DOCTYPE html><html><body>This image is gone.</body></html>"
BOMB = gzip.compress(image(5) + bytes(10**7))


class BadServer(ThreadingHTTPServer):
    """Answers by path; `hits` counts requests by path, and `agents` are the user agents seen."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hits: Counter[str] = Counter()
        self.times: dict[str, list[float]] = {}
        self.agents: set[str] = set()
        self.num_open = self.max_open = 0
        self.robots: tuple[int, str] = (404, "")
        self.num_robots_failures = 0
        self.delay_s = 0.0
        self.stopping = threading.Event()
        self.lock = threading.Lock()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{path}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are expected."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: BadServer

    def log_message(self, format: str, *arguments: object) -> None:
        """Keep the output of tests clean."""

    def do_GET(self) -> None:
        server, path = self.server, unquote(self.path)
        with server.lock:
            server.hits[path] += 1
            server.times.setdefault(path, []).append(time.monotonic())
            server.agents.add(self.headers["User-Agent"])
            server.num_open += 1
            server.max_open = max(server.max_open, server.num_open)
        try:
            if path != "/robots.txt":
                server.stopping.wait(server.delay_s)
            self._answer(path)
        finally:
            with server.lock:
                server.num_open -= 1

    def _answer(self, path: str) -> None:
        name, _, rest = path[1:].partition("/")
        number = self.server.hits[path]
        if path == "/robots.txt" and number <= self.server.num_robots_failures:
            self._send(b"", 503)
        elif path == "/robots.txt":
            self._send(self.server.robots[1].encode(), self.server.robots[0], "text/plain")
        elif name in ("ok", "größe 1"):
            self._send(image(int(rest.partition("?")[0])))
        elif name == "audio":
            self._send(audio(int(rest)), kind="audio/wav")
        elif name == "status":
            self._send(HTML, int(rest))
        elif name == "twice":  # fails once, then answers
            self._send(image(1)) if number > 1 else self._send(b"", int(rest))
        elif name == "later":
            headers = {"Retry-After": rest}
            self._send(image(2)) if number > 1 else self._send(b"", 429, headers=headers)
        elif name == "html":
            self._send(HTML, kind="image/png")
        elif name == "empty":
            self._send(b"")
        elif name == "type":  # an image with a wrong content type
            self._send(image(3), kind="text/plain")
        elif name == "tiff":
            self._send(b"II*\0" + bytes(600), kind="image/tiff")
        elif name == "tag":
            self._send(image(4), headers={"X-Robots-Tag": rest})
        elif name == "to":
            self._send(b"", 302, headers={"Location": f"/{rest}"})
        elif name == "away":
            self._send(b"", 301, headers={"Location": rest})
        elif name == "loop":
            self._send(b"", 302, headers={"Location": path})
        else:
            getattr(self, f"_{name}")()
            self.close_connection = True

    def _send(
        self, body: bytes, status: int = 200, kind: str = "image/png", headers: dict | None = None
    ) -> None:
        self._start(
            {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}, status
        )
        self.wfile.write(body)

    def _start(self, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _hang(self) -> None:
        self.server.stopping.wait(20)

    def _stall(self) -> None:
        """Half of the body, and then nothing."""
        self._start({"Content-Length": str(len(image(5)))})
        self.wfile.write(image(5)[:50])
        self.server.stopping.wait(20)

    def _drip(self) -> None:
        """A byte at a time, so that no read times out."""
        self._start({"Content-Length": "100000"})
        for byte in image(5).ljust(100000):
            self.wfile.write(bytes([byte]))
            if self.server.stopping.wait(0.05):
                return

    def _truncated(self) -> None:
        self._start({"Content-Length": str(len(image(5)) + 1000)})
        self.wfile.write(image(5))

    def _cut_chunks(self) -> None:
        """Chunked without the last chunk."""
        self._start({"Transfer-Encoding": "chunked"})
        self.wfile.write(b"%x\r\n%b\r\n" % (len(image(5)), image(5)))

    def _endless(self) -> None:
        """Chunks that never end."""
        self._start({"Transfer-Encoding": "chunked"})
        block = image(5) + bytes(1 << 16)
        while not self.server.stopping.is_set():
            self.wfile.write(b"%x\r\n%b\r\n" % (len(block), block))

    def _claims(self) -> None:
        """A size above the limit, without a body."""
        self._start({"Content-Length": str(10**9)})

    def _bomb(self) -> None:
        """Ten megabytes in ten kilobytes."""
        self._start({"Content-Length": str(len(BOMB)), "Content-Encoding": "gzip"})
        self.wfile.write(BOMB)

    def _closed(self) -> None:
        """No answer at all."""

    def _garbage(self) -> None:
        self.wfile.write(b"\x00\x01\x02 not HTTP\r\n\r\n")


@contextmanager
def bad_server() -> Iterator[BadServer]:
    """A running server."""
    server = BadServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopping.set()
        server.shutdown()
        server.server_close()
        thread.join()
