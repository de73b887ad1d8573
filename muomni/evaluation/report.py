"""Reports of an evaluation: metrics with trivial baselines, as text, JSON, and a markdown summary.

A metric without a baseline is for reference, such as the WER on the original audio. Does not import
torch.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muomni.config.registry import STAGES
from muomni.errors import ConfigError, DataError
from muomni.io.atomic_write import write_atomic
from muomni.io.table import format_table

REPORT_NAME = "evaluation.json"
ANSWERS_SUFFIX = ".answers.jsonl"
_SIGNIFICANT_DIGITS = 4


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric of one stage; `baseline` is the value of `baseline_name` on the same samples."""

    name: str
    value: float
    baseline: float | None = None
    baseline_name: str = ""
    is_lower_better: bool = True

    @property
    def is_better(self) -> bool | None:
        """Whether the value is strictly better than the baseline; None without a baseline."""
        if self.baseline is None:
            return None
        lower, higher = self.value, self.baseline
        if not self.is_lower_better:
            lower, higher = higher, lower
        return lower < higher  # NaN beats nothing


@dataclass(frozen=True, slots=True)
class Report:
    """All metrics of one stage on one split of its datasets, and the generated answers (stage sft)."""

    stage: str
    split: str
    datasets: tuple[str, ...]
    num_samples: int
    num_dropped: int
    export: str
    metrics: tuple[Metric, ...]
    answers: tuple[dict[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object; non-finite metrics become null."""
        return {
            "stage": self.stage,
            "split": self.split,
            "datasets": list(self.datasets),
            "num_samples": self.num_samples,
            "num_dropped": self.num_dropped,
            "export": self.export,
            "metrics": {metric.name: _finite(metric.value) for metric in self.metrics},
            "baselines": {
                metric.name: {
                    "name": metric.baseline_name,
                    "value": _finite(metric.baseline),
                    "is_beaten": metric.is_better,
                }
                for metric in self.metrics
                if metric.baseline is not None
            },
        }

    def table(self) -> str:
        """Format the metrics as a text table, one per line."""
        rows = [
            (
                metric.name,
                _number(metric.value),
                "-"
                if metric.baseline is None
                else f"{_number(metric.baseline)} ({metric.baseline_name})",
                {True: "yes", False: "NO", None: "-"}[metric.is_better],
            )
            for metric in self.metrics
        ]
        header = ("metric", "value", "trivial baseline", "better?")
        title = f"{self.stage} on split '{self.split}' of {', '.join(self.datasets)}: "
        title += f"{self.num_samples:,} samples"
        if self.num_dropped:
            title += f" ({self.num_dropped} could not be decoded)"
        return f"{title}\n{format_table(header, rows, align='<<<<')}"


def write_report(path: Path, report: Report) -> None:
    """Write a report as JSON, atomically, and its answers (if any) next to it as JSON lines.

    Raises ConfigError if a file cannot be written.
    """
    try:
        if report.answers:
            lines = (json.dumps(answer, ensure_ascii=False) + "\n" for answer in report.answers)
            write_atomic(path.with_suffix(ANSWERS_SUFFIX), "".join(lines).encode())
        write_atomic(path, (json.dumps(report.to_json(), indent=2) + "\n").encode())
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"cannot write the report to {path} ({reason}); choose another --json"
        ) from None


def read_reports(run: Path) -> list[dict[str, Any]]:
    """Read `RUN/STAGE/evaluation.json` of all stages, in stage order.

    Raises DataError if there is no report or one is invalid.
    """
    reports = []
    for stage in STAGES:
        path = run / stage / REPORT_NAME
        if path.is_file():
            try:
                reports.append(json.loads(path.read_text(encoding="utf-8")))
            except ValueError:
                raise DataError(
                    f"{path} is not a valid report; rerun launch/evaluate.py --stage {stage} --run {run}"
                ) from None
    if not reports:
        raise DataError(
            f"{run} has no {REPORT_NAME} of any stage; run "
            f"deepspeed launch/evaluate.py --stage STAGE --run {run}"
        )
    return reports


def summary(reports: Sequence[dict[str, Any]], with_all: bool = False) -> str:
    """Format the metrics of all stages and their baselines as a markdown table.

    Metrics without a baseline are included only if `with_all`.
    """
    lines = [
        "| stage | metric | muomni | trivial baseline | beaten |",
        "|---|---|---:|---|---|",
    ]
    for report in reports:
        for name, value in report["metrics"].items():
            baseline = report["baselines"].get(name)
            if baseline is not None:
                reference = f"{_number(baseline['value'])} ({baseline['name']})"
                verdict = "yes" if baseline["is_beaten"] else "no"
            elif with_all:
                reference, verdict = "-", "-"
            else:
                continue
            cells = (report["stage"], name, _number(value), reference, verdict)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    num_integer_digits = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:.{max(0, _SIGNIFICANT_DIGITS - num_integer_digits)}f}"
