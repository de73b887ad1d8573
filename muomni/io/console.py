"""Text output that may fail without ending the program: a closed pipe or terminal, or a full disk.

A run must not end because `| head` has read enough, or because the disk of its log is full.
"""

import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from muomni.io.live_line import LIVE_LINE, is_terminal

# A full disk may have space again later; what failed otherwise stays that way.
_TRANSIENT = (errno.ENOSPC, errno.EDQUOT)


class SteadyStream:
    """A text stream whose failures do not reach the writer; `report` is called at the first one.

    After a lasting failure, everything that is written to its file descriptor is discarded.
    """

    def __init__(self, stream: TextIO, report: Callable[[OSError], None]) -> None:
        self._stream = stream
        self._is_terminal = is_terminal(stream)
        self.note = report
        self._report: Callable[[OSError], None] | None = report

    def write(self, text: str) -> int:
        with self._guarded():
            self._stream.write(LIVE_LINE.before_output(text) if self._is_terminal else text)
        return len(text)

    def flush(self) -> None:
        with self._guarded():
            self._stream.flush()

    def close(self) -> None:
        with self._guarded():
            self._stream.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _TRANSIENT:
                self._discard()
            if self._report is not None:
                report, self._report = self._report, None
                report(error)

    def _discard(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def protect_output(log: Path | None) -> None:
    """Let this process survive failures of standard output and error; `log` gets a line about the first.

    Only one of several ranks should have a log.
    """
    note = _Note(log)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, SteadyStream):
            setattr(sys, name, SteadyStream(stream, note))


def note_failures() -> None:
    """Write what `protect_output` could not note before the folder of its log existed."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, SteadyStream) and isinstance(stream.note, _Note):
            stream.note.retry()


class _Note:
    """Notes once in a log that output failed."""

    def __init__(self, log: Path | None) -> None:
        self._log = log
        self._waiting: tuple[Path, str] | None = None

    def __call__(self, error: OSError) -> None:
        log, self._log = self._log, None
        if log is None:
            return
        line = (
            f"# {time.strftime('%F %T')} cannot write to standard output or error ({error.strerror}); the run "
            f"continues without it\n"
        )
        if not log.parent.is_dir():  # before the run has created it
            self._waiting = (log, line)
            return
        # The log may be on the same full disk.
        with suppress(OSError), log.open("a", encoding="utf-8") as file:
            file.write(line)

    def retry(self) -> None:
        """Write the line that had no folder, if there is one."""
        if self._waiting is not None:
            (log, line), self._waiting = self._waiting, None
            with suppress(OSError), log.open("a", encoding="utf-8") as file:
                file.write(line)
