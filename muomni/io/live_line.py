"""One line at the bottom of a terminal that is drawn again and again while other output scrolls above it."""

import os
import sys
import threading
from collections.abc import Callable, Mapping
from typing import TextIO

_ERASE = "\r\x1b[K"
_DEFAULT_WIDTH = 80
_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


class LiveLine:
    """The live line of this process, on standard output.

    `SteadyStream` hides it before anything else is written, so that no output is drawn over. With `is_shared`,
    the terminal shows the live line of another process, which is erased before this one writes.
    """

    is_shared = False

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._is_drawn = False
        self._is_at_line_start = True

    def draw(self, text: str) -> None:
        """Replace the line, unless other output is in the middle of a line."""
        with self._lock:
            if not self._is_at_line_start:
                return
            self._is_drawn = False  # this write must not hide it
            sys.stdout.write(_ERASE + text)
            sys.stdout.flush()
            self._is_drawn, self._is_at_line_start = True, True

    def hide(self) -> None:
        """Erase the line, if it is drawn."""
        with self._lock:
            if self._is_drawn:
                self._is_drawn = False
                sys.stdout.write(_ERASE)
                sys.stdout.flush()
                self._is_at_line_start = True

    def before_output(self, text: str) -> str:
        """Prepare for other output to the terminal; returns what to write."""
        with self._lock:
            if not text:
                return text
            self.hide()
            erases = self.is_shared and self._is_at_line_start
            self._is_at_line_start = text.endswith("\n")
            return _ERASE + text if erases else text


LIVE_LINE = LiveLine()


class Ticker:
    """Calls a function every `every_s` seconds, in a thread, from `start` to `stop`."""

    def __init__(self, call: Callable[[], None], every_s: float) -> None:
        self._call, self._every_s = call, every_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the calls; the last one has returned afterward."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._every_s):
            self._call()


def is_terminal(stream: TextIO | None, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a stream is a terminal that understands cursor movements."""
    try:
        return stream is not None and stream.isatty() and environ.get("TERM") != "dumb"
    except ValueError:  # closed
        return False


def width(stream: TextIO) -> int:
    """Columns of the terminal, 80 if unknown."""
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return _DEFAULT_WIDTH
    return columns or _DEFAULT_WIDTH


def styled(text: str, style: str, stream: TextIO | None = None) -> str:
    """Text in a color or weight, on a terminal unless NO_COLOR is set (no-color.org)."""
    if not text or os.environ.get("NO_COLOR") or not is_terminal(stream or sys.stdout):
        return text
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m"
