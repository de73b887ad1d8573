"""Compare runs: metrics of each stage, held-out results, and differences of the configs.

Reads the files of run folders only, and does not import torch.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muomni.config.loading import read_yaml
from muomni.config.registry import STAGES
from muomni.errors import ConfigError
from muomni.evaluation.report import REPORT_NAME
from muomni.io.table import format_table
from muomni.observe.metrics_log import METRICS_FILE, read_lines
from muomni.observe.tracking.facts import parameters

Curve = list[tuple[int, float]]  # (step, value)
Row = tuple[str, list[str]]  # name, and a value per run

# Facts that follow from others, or say nothing about the result.
_IGNORED = ("resolved.deepspeed", "resolved.machine", "resolved.upstream")
_MISSING = "-"


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a run folder records of a stage."""

    run: str
    lines: list[dict[str, Any]]
    config: dict[str, str]
    evaluation: dict[str, float | None]

    def curve(self, kind: str, name: str) -> Curve:
        """The values of a metric, by step."""
        return [
            (line["step"], line[name])
            for line in self.lines
            if line["kind"] == kind and line.get(name) is not None
        ]


@dataclass(frozen=True, slots=True)
class StageComparison:
    """A stage of several runs: rows of metrics and of differing settings, and curves by run."""

    stage: str
    runs: list[str]
    metrics: list[Row]
    settings: list[Row]
    train: list[Curve]
    val: list[Curve]

    def table(self) -> str:
        """The metrics and settings as a text table."""
        rows = [[name, *values] for name, values in self.metrics]
        text = format_table([self.stage, *self.runs], rows)
        if not self.settings:
            return f"{text}\n(no difference in the configs)"
        rows = [[name, *values] for name, values in self.settings]
        return f"{text}\n\n{format_table([f'config of {self.stage}', *self.runs], rows)}"


def compare(runs: Sequence[Path], stage: str | None = None) -> list[StageComparison]:
    """Compare the stages that at least two of the runs have; raises ConfigError."""
    for run in runs:
        if not run.is_dir():
            raise ConfigError(f"run folder {run} does not exist; pass folders of --run")
    compared = []
    for name in STAGES if stage is None else [stage]:
        having = [run for run in runs if (run / name / METRICS_FILE).is_file()]
        if len(having) > 1:
            compared.append(_compare_stage(name, [_read(run, name) for run in having]))
    if not compared:
        what = "any stage" if stage is None else f"stage {stage}"
        raise ConfigError(
            f"no two of these runs have metrics of {what}; pass run folders that were trained in"
        )
    return compared


def _read(run: Path, stage: str) -> Recorded:
    folder = run / stage
    path, evaluation = folder / METRICS_FILE, folder / REPORT_NAME
    try:
        lines = read_lines(path)
        if not lines:
            raise ValueError(f"{path.name} has no complete line")
        report = json.loads(evaluation.read_text(encoding="utf-8")) if evaluation.is_file() else {}
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"metrics or evaluation in {folder} cannot be read ({error}); restore the files"
        ) from None
    config = folder / "config.yaml"
    content = read_yaml(config) if config.is_file() else {}
    return Recorded(str(run), lines, parameters(content), report.get("metrics", {}))


def _compare_stage(stage: str, runs: list[Recorded]) -> StageComparison:
    train = [run.curve("train", "loss") for run in runs]
    val = [run.curve("val", "val/loss") for run in runs]
    rows: list[Row] = [
        ("steps", [f"{max((line['step'] for line in run.lines), default=0):,}" for run in runs]),
        ("loss, last", [_number(curve[-1][1] if curve else None) for curve in train]),
        ("val/loss, best", [_number(min((v for _, v in curve), default=None)) for curve in val]),
    ]
    last = [_last(run.lines, "val") for run in runs]
    names = dict.fromkeys(name for each in last for name in each)  # a set, in order
    rows += [(f"{name}, last", [_number(each.get(name)) for each in last]) for name in names]
    tested = dict.fromkeys(name for run in runs for name in run.evaluation)
    rows += [
        (f"test/{name}", [_number(run.evaluation.get(name)) for run in runs]) for name in tested
    ]
    for name in ("step_time_s", "mfu"):
        values = [_last(run.lines, "train").get(name) for run in runs]
        if any(value is not None for value in values):
            rows.append((f"{name}, last", [_number(value) for value in values]))
    return StageComparison(stage, [run.run for run in runs], rows, _differences(runs), train, val)


def _last(lines: list[dict[str, Any]], kind: str) -> dict[str, float]:
    """The metrics of the last line of a kind; of validation those named `val/`."""
    for line in reversed(lines):
        if line["kind"] == kind:
            return {k: v for k, v in line.items() if kind == "train" or k.startswith("val/")}
    return {}


def _differences(runs: list[Recorded]) -> list[Row]:
    keys = sorted({key for run in runs for key in run.config if not key.startswith(_IGNORED)})
    rows = [(key, [run.config.get(key, _MISSING) for run in runs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _number(value: float | None) -> str:
    return _MISSING if value is None or not math.isfinite(value) else f"{value:.4g}"
