"""A local HTTP server for a folder, with range requests and injected faults.

It counts requests and bytes by path. A fault is a function that is called with the path of each GET request
and returns how to corrupt the response, or None.
"""

import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

Spoil = Literal["refuse", "cut", "damage", "hang"]
Fault = Callable[[str], Spoil | None]


@dataclass
class HttpFolder:
    """State of the server: URL, counters, and configured behavior."""

    folder: Path
    url: str = ""
    has_ranges: bool = True
    bytes_per_second: float | None = None
    fault: Fault = lambda path: None
    requests: Counter[str] = field(default_factory=Counter)
    bytes_sent: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fail_first(self, count: int, spoil: Spoil, suffix: str = ".tar") -> None:
        """Corrupt the first `count` responses for files with this suffix."""
        left = [count]

        def fault(path: str) -> Spoil | None:
            with self.lock:
                if not path.endswith(suffix) or left[0] == 0:
                    return None
                left[0] -= 1
                return spoil

        self.fault = fault


Answer = Callable[[BaseHTTPRequestHandler, HttpFolder], None]


def answer_with_file(request: BaseHTTPRequestHandler, state: HttpFolder) -> None:
    """Respond with the file at the path of the request."""
    send_file(request, state, request.path.lstrip("/"))


@contextmanager
def serve(folder: Path, answer: Answer = answer_with_file) -> Iterator[HttpFolder]:
    """Serve `folder` on a free local port until the block ends."""
    state = HttpFolder(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            answer(self, state)

        def do_POST(self) -> None:
            answer(self, state)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


def send_file(request: BaseHTTPRequestHandler, state: HttpFolder, path: str) -> None:
    """Respond with a file of the folder, or with the requested range of it."""
    with state.lock:
        state.requests[path] += 1
    spoil = state.fault(path)
    file = state.folder / path
    if spoil == "refuse" or not file.is_file():
        request.send_error(503 if spoil else 404)
        return
    content = file.read_bytes()
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if wanted and state.has_ranges:
        start = int(wanted[1])
        end = min(int(wanted[2]) + 1 if wanted[2] else len(content), len(content))
        request.send_response(206)
        request.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        content = content[start:end]
    else:
        request.send_response(200)
    request.send_header("Content-Length", str(len(content)))
    request.end_headers()
    if spoil == "damage":
        content = bytes([content[0] ^ 1]) + content[1:]
    if spoil == "cut":
        content = content[: len(content) // 2]
        request.close_connection = True
    _send(request, state, path, content)


def _send(request: BaseHTTPRequestHandler, state: HttpFolder, path: str, content: bytes) -> None:
    piece = 16 << 10
    for start in range(0, len(content), piece):
        if state.bytes_per_second is not None:
            time.sleep(piece / state.bytes_per_second)
        try:
            request.wfile.write(content[start : start + piece])
        except OSError:  # the client closed the connection
            return
        with state.lock:
            state.bytes_sent[path] += len(content[start : start + piece])
