"""What an evaluation found: metrics beside trivial baselines, as a table, as JSON, as a summary.

A metric without a baseline is for information (the WER of the original audio clips beside that of
decoded ones, say). Nothing here imports torch.
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

REPORT_NAME = "evaluation.json"
ANSWERS_SUFFIX = ".answers.jsonl"
_NUM_DIGITS = 4


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric of one stage; `baseline` is what `baseline_name` reaches on the same samples."""

    name: str
    value: float
    baseline: float | None = None
    baseline_name: str = ""
    is_lower_better: bool = True

    @property
    def is_better(self) -> bool | None:
        """Whether the value beats the baseline strictly; None without a baseline."""
        if self.baseline is None:
            return None
        lower, higher = self.value, self.baseline
        if not self.is_lower_better:
            lower, higher = higher, lower
        return lower < higher  # NaN beats nothing


@dataclass(frozen=True, slots=True)
class Report:
    """All metrics of one stage over one split of its datasets, and what a model said that answers."""

    stage: str
    split: str
    datasets: tuple[str, ...]
    num_samples: int
    num_left_out: int
    export: str
    metrics: tuple[Metric, ...]
    answers: tuple[dict[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A JSON object; metrics that are not finite become null."""
        return {
            "stage": self.stage,
            "split": self.split,
            "datasets": list(self.datasets),
            "num_samples": self.num_samples,
            "num_left_out": self.num_left_out,
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
        """The metrics for a terminal, one a line."""
        header = ("metric", "value", "trivial baseline", "better?")
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
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (header, *rows)
        ]
        title = f"{self.stage} on split '{self.split}' of {', '.join(self.datasets)}: "
        title += f"{self.num_samples:,} samples"
        if self.num_left_out:
            title += f" ({self.num_left_out} could not be decoded)"
        return "\n".join([title, *lines])


def write_report(path: Path, report: Report) -> None:
    """Write a report's JSON and, beside it, its answers if it has any: a JSON object a line.

    Both whole or not at all; raises ConfigError when that fails.
    """
    try:
        if report.answers:
            lines = (json.dumps(answer, ensure_ascii=False) + "\n" for answer in report.answers)
            write_atomic(path.with_suffix(ANSWERS_SUFFIX), "".join(lines).encode())
        write_atomic(path, (json.dumps(report.to_json(), indent=2) + "\n").encode())
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"cannot write the report to {path} ({reason}); give another --json"
        ) from None


def read_reports(run: Path) -> list[dict[str, Any]]:
    """The reports `RUN/STAGE/evaluation.json`, in order of the stages; raises DataError without any."""
    reports = []
    for stage in STAGES:
        path = run / stage / REPORT_NAME
        if path.is_file():
            try:
                reports.append(json.loads(path.read_text(encoding="utf-8")))
            except ValueError:
                raise DataError(
                    f"{path} is no report; run launch/evaluate.py --stage {stage} --run {run} again"
                ) from None
    if not reports:
        raise DataError(
            f"{run} holds no {REPORT_NAME} of any stage; make one with "
            f"deepspeed launch/evaluate.py --stage STAGE --run {run}"
        )
    return reports


def summary(reports: Sequence[dict[str, Any]], with_all: bool = False) -> str:
    """A markdown table of all stages beside their baselines.

    Metrics without a baseline are left out unless `with_all`.
    """
    lines = [
        "| stage | metric | muomni | trivial baseline | beaten |",
        "|---|---|---:|---|---|",
    ]
    for report in reports:
        for name, value in report["metrics"].items():
            baseline = report["baselines"].get(name)
            if baseline is not None:
                other = f"{_number(baseline['value'])} ({baseline['name']})"
                verdict = "yes" if baseline["is_beaten"] else "no"
            elif with_all:
                other, verdict = "-", "-"
            else:
                continue
            lines.append(f"| {report['stage']} | {name} | {_number(value)} | {other} | {verdict} |")
    return "\n".join(lines)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    num_integer_digits = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:.{max(0, _NUM_DIGITS - num_integer_digits)}f}"
