"""Reports of an evaluation: metrics with trivial baselines, as text, JSON, and a markdown summary.

A metric without a baseline is for reference, such as the WER on the original audio. Does not import
torch.
"""

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muomni.config.registry import STAGES
from muomni.errors import ConfigError, DataError
from muomni.io.atomic_write import write_atomic
from muomni.io.table import format_table
from muomni.run_folder import export_digest

REPORT_NAME = "evaluation.json"
ANSWERS_SUFFIX = ".answers.jsonl"
_SIGNIFICANT_DIGITS = 4
_DIGEST_DIGITS = 12


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
    """All metrics of one stage on one split of its datasets, and the generated answers (stage sft).

    `digest` identifies the evaluated export, and `measured_on` all exports that determine the metrics, as
    folder -> digest. `num_seen` samples of the split are in groups that were trained on, which sharding
    accepted.
    """

    stage: str
    split: str
    datasets: tuple[str, ...]
    num_samples: int
    num_dropped: int
    export: str
    digest: str
    measured_on: dict[str, str]
    metrics: tuple[Metric, ...]
    answers: tuple[dict[str, Any], ...] = ()
    num_seen: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object; non-finite metrics become null."""
        return {
            "stage": self.stage,
            "split": self.split,
            "datasets": list(self.datasets),
            "num_samples": self.num_samples,
            "num_dropped": self.num_dropped,
            **({"num_seen": self.num_seen} if self.num_seen else {}),
            "export": self.export,
            "digest": self.digest,
            "measured_on": self.measured_on,
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
        title += f"{self.num_samples:,} samples, export {self.digest[:_DIGEST_DIGITS]}"
        if self.num_dropped:
            title += f" ({self.num_dropped} could not be decoded)"
        if self.num_seen:
            title += f"\n{self.num_seen:,} samples of the split are in groups that were trained on"
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


def changed_exports(run: Path, report: dict[str, Any]) -> list[str]:
    """Return the export folders that no longer hold what a report of `run` was measured on."""
    measured_on = report.get("measured_on", {report["export"]: None})
    return [folder for folder, used in measured_on.items() if export_digest(run / folder) != used]


def summary(run: Path, reports: Sequence[dict[str, Any]], with_all: bool = False) -> str:
    """Format the metrics of all stages of a run and their baselines as a markdown table.

    Each row has the digest of the evaluated export; metrics that were measured on exports that have changed
    since are marked as outdated. Metrics without a baseline are included only if `with_all`.
    """
    lines = [
        "| stage | metric | muomni | trivial baseline | beaten | export |",
        "|---|---|---:|---|---|---|",
    ]
    notes = []
    for report in reports:
        stage, digest = report["stage"], report.get("digest", "unknown")[:_DIGEST_DIGITS]
        if changed := changed_exports(run, report):
            digest += " (outdated)"
            notes.append(
                f"The metrics of {stage} are outdated, because {', '.join(changed)} changed after the "
                f"evaluation; run: muomni evaluate --stage {stage} --run {shlex.quote(str(run))}"
            )
        for name, value in report["metrics"].items():
            baseline = report["baselines"].get(name)
            if baseline is not None:
                reference = f"{_number(baseline['value'])} ({baseline['name']})"
                verdict = "yes" if baseline["is_beaten"] else "no"
            elif with_all:
                reference, verdict = "-", "-"
            else:
                continue
            cells = (stage, name, _number(value), reference, verdict, digest)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *("" for _ in notes[:1]), *notes])


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    num_integer_digits = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:.{max(0, _SIGNIFICANT_DIGITS - num_integer_digits)}f}"
