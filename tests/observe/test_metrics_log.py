"""`metrics.jsonl` holds each step once, whatever was killed and resumed, and is strict JSON."""

import json
import math
from pathlib import Path

from muomni.observe.metrics_log import MetricsLog, read_lines


def _steps(path: Path) -> list[int]:
    return [line["step"] for line in read_lines(path)]


def test_a_resume_drops_the_steps_that_will_be_run_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, resume_step=0)
    for step in (10, 20, 30):
        log.write(step, "train", {"loss": 1.0 / step})
    log.close()
    resumed = MetricsLog(path, resume_step=20)
    assert _steps(path) == [10, 20]
    resumed.write(30, "train", {"loss": 0.5})
    resumed.close()
    assert _steps(path) == [10, 20, 30]
    MetricsLog(path, resume_step=0).close()
    assert _steps(path) == []


def test_a_line_that_a_kill_cut_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "kind": "train", "loss": 2.0}\n{"step": 20, "ki')
    MetricsLog(path, resume_step=20).close()
    assert _steps(path) == [10]


def test_a_metric_that_does_not_exist_is_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", resume_step=0)
    log.write(1, "val", {"loss": math.nan, "grad_norm": math.inf, "lr": 0.1})
    log.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    expected = {"step": 1, "kind": "val", "loss": None, "grad_norm": None, "lr": 0.1}
    assert json.loads(line, parse_constant=lambda name: name) == expected
