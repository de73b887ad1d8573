"""`metrics.jsonl` has each step once after any kill and resume, and is strict JSON."""

import json
import math
import time
from pathlib import Path

import pytest

from muomni.observe.metrics_log import METRICS_FILE, MetricsLog, MetricsTail, read_lines
from tests.observe.run_info import run_info


def _opened(run: Path, step: int = 0) -> MetricsLog:
    log = MetricsLog()
    log.open(run_info(run, step=step))
    return log


def _steps(run: Path) -> list[int]:
    return [line["step"] for line in read_lines(run / "codec" / "metrics.jsonl")]


def test_resume_drops_the_steps_that_run_again(tmp_path: Path) -> None:
    log = _opened(tmp_path)
    for step in (10, 20, 30):
        log.log(step, "train", {"loss": 1.0 / step})
    log.close("KILLED")
    resumed = _opened(tmp_path, step=20)
    assert _steps(tmp_path) == [10, 20]
    resumed.log(30, "train", {"loss": 0.5})
    resumed.close("FINISHED")
    assert _steps(tmp_path) == [10, 20, 30]
    _opened(tmp_path).close("FINISHED")
    assert _steps(tmp_path) == []


def test_a_truncated_last_line_is_dropped(tmp_path: Path) -> None:
    path = run_info(tmp_path).folder / "metrics.jsonl"
    path.write_text('{"step": 10, "kind": "train", "loss": 2.0}\n{"step": 20, "ki')
    _opened(tmp_path, step=20).close("FINISHED")
    assert _steps(tmp_path) == [10]


@pytest.mark.parametrize(
    "damaged", [b'{"step": 20, "ki{"step": 25}', b"\xff\x00", b"[]", b"{}", b"7"]
)
def test_a_damaged_line_is_dropped_with_a_warning(
    damaged: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = run_info(tmp_path).folder / METRICS_FILE
    path.write_bytes(
        b'{"step": 10, "kind": "train"}\n' + damaged + b'\n{"step": 30, "kind": "train"}\n'
    )
    assert _steps(tmp_path) == [10, 30]
    assert "metrics.jsonl has a damaged line" in caplog.text
    assert [line["step"] for line in MetricsTail(path).read()] == [10, 30]
    _opened(tmp_path, step=30).close("FINISHED")
    assert path.read_text().count("\n") == 2


def test_a_metric_without_a_value_is_null(tmp_path: Path) -> None:
    log = _opened(tmp_path)
    log.log(1, "val", {"loss": math.nan, "grad_norm": math.inf, "lr": 0.1})
    log.close("FINISHED")
    (line,) = (tmp_path / "codec" / "metrics.jsonl").read_text().splitlines()
    found = json.loads(line, parse_constant=lambda name: name)
    assert abs(found.pop("unix_time_s") - time.time()) < 60
    assert found == {"step": 1, "kind": "val", "loss": None, "grad_norm": None, "lr": 0.1}


def test_a_tail_reads_complete_lines_once(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    tail = MetricsTail(path)
    assert tail.read() == []  # no file yet
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    for _ in range(2):  # until they are accepted
        assert [line["step"] for line in tail.read()] == [1, 2]
    tail.accept()
    assert tail.read() == []
    with path.open("a") as file:
        file.write('ep": 3, "long": "%s"}\n' % ("x" * (1 << 21)))
    assert [line["step"] for line in tail.read()] == [3]
    tail.accept()
    assert tail.read() == []


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    log = _opened(tmp_path)
    path = tmp_path / "codec" / METRICS_FILE
    log._file.close()
    path.unlink()
    path.symlink_to("/dev/full")
    log._file = path.open("a", encoding="utf-8")
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        log.log(1, "train", {"loss": 1.0})
    log.close("FAILED")
