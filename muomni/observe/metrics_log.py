"""`metrics.jsonl`: one JSON object a logged step, the truth that MLflow is fed from."""

import json
import math
from pathlib import Path
from typing import Any

from muomni.io.atomic_write import write_atomic


class MetricsLog:
    """Appends to the metrics file; a resume drops lines of steps that will be run again."""

    def __init__(self, path: Path, resume_step: int) -> None:
        self.path = path
        if path.exists():
            kept = [line for line in read_lines(path) if line["step"] <= resume_step]
            write_atomic(path, "".join(_dump(line) for line in kept).encode())
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, kind: str, metrics: dict[str, float]) -> None:
        """Add one line; `kind` is train or val."""
        self._file.write(_dump({"step": step, "kind": kind, **metrics}))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file (a kill may have cut the last one)."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _dump(line: dict[str, Any]) -> str:
    # NaN is not JSON: a metric that does not exist is null.
    clean = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in line.items()
    }
    return json.dumps(clean) + "\n"
