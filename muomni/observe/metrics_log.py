"""Recorder of `metrics.jsonl`: one JSON object per logged step, the complete record of a run."""

import json
import math
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from muomni.io.atomic_write import write_atomic
from muomni.observe.recorder import Kind, RunInfo, Status

METRICS_FILE = "metrics.jsonl"


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
            self._file.write(_dump({"step": step, "kind": kind, **metrics}))
            self._file.flush()
        except OSError as error:
            error.filename = self._file.name
            raise

    def artifact(self, path: Path, folder: str) -> None:
        """Ignored: the file is in the run folder."""

    def close(self, status: Status) -> None:
        with suppress(OSError):  # of a full disk, which `log` has raised already
            self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a metrics file (a kill may have truncated the last one)."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _dump(line: dict[str, Any]) -> str:
    # NaN is not JSON: a metric without a value is null.
    clean = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in line.items()
    }
    return json.dumps(clean) + "\n"
