"""Recorder of `metrics.jsonl`: one JSON object per logged step, the complete record of a run."""

import json
import logging
import math
import time
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from muomni.io.atomic_write import write_atomic
from muomni.observe.recorder import Kind, RunInfo, Status

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
# When a line was logged, in seconds since 1970.
TIME = "unix_time_s"
_FACTS = ("step", "kind", TIME)
_CHUNK_BYTES = 1 << 20


class MetricsLog:
    """Appends to the metrics file; a resume drops lines of steps that will run again."""

    _file: TextIOWrapper

    def open(self, info: RunInfo) -> None:
        path = info.folder / METRICS_FILE
        if path.exists():
            kept = [line for line in read_lines(path) if line["step"] <= info.step]
            write_atomic(path, "".join(_dump(line) for line in kept).encode())
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, kind: Kind, metrics: dict[str, float]) -> None:
        try:
            facts = {"step": step, "kind": kind, TIME: round(time.time(), 3)}
            self._file.write(_dump({**facts, **metrics}))
            self._file.flush()
        except OSError as error:
            error.filename = self._file.name
            raise

    def artifact(self, path: Path, folder: str) -> None:
        """Ignored: the file is in the run folder."""

    def close(self, status: Status) -> None:
        with suppress(OSError):  # of a full disk, which `log` has raised already
            self._file.close()


class MetricsTail:
    """Reads the complete lines of a metrics file in chunks, also while it is written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = self._next_offset = 0

    def read(self) -> list[dict[str, Any]]:
        """Lines after the last `accept`, of about a megabyte at most; empty at the end of the file."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:  # of a stage that has logged nothing
            return []
        with file:
            file.seek(self._offset)
            content = file.read(_CHUNK_BYTES)
            if b"\n" not in content:  # a very long line, or one that is being written
                content += file.readline()
        content = content[: content.rfind(b"\n") + 1]
        self._next_offset = self._offset + len(content)
        return _parsed(content.decode(errors="replace"), self._path)

    def accept(self) -> None:
        """Do not read the lines of the last `read` again."""
        self._offset = self._next_offset


def metrics_of(line: dict[str, Any]) -> dict[str, float]:
    """The metrics of a line without its facts; those without a value are NaN."""
    return {
        name: math.nan if value is None else value
        for name, value in line.items()
        if name not in _FACTS
    }


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a metrics file (a kill may have truncated the last one).

    A damaged line, such as one that a full disk has cut, is dropped with a warning.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    return _parsed(text[: text.rfind("\n") + 1], path)


def _parsed(text: str, path: Path) -> list[dict[str, Any]]:
    lines = []
    for line in filter(None, text.split("\n")):
        try:
            content = json.loads(line)
        except ValueError:
            content = None
        if isinstance(content, dict) and isinstance(content.get("step"), int):
            lines.append(content)
        else:
            logger.warning("%s has a damaged line, which is dropped: %.80s", path, line)
    return lines


def _dump(line: dict[str, Any]) -> str:
    # NaN is not JSON: a metric without a value is null.
    clean = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in line.items()
    }
    return json.dumps(clean) + "\n"
