"""The progress line shows what an operator needs, and the load of experts if there are any."""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from muomni.observe import progress
from muomni.observe.progress import ProgressLine
from tests.observe.run_info import run_info

METRICS = {
    "loss": 2.5, "lr": 1e-3, "grad_norm": 0.75, "tokens_per_s": 1234.0, "data_wait_fraction": 0.02,
}  # fmt: skip


def _printed(
    kind: str, metrics: dict[str, float], run: Path, capsys: pytest.CaptureFixture[str]
) -> str:
    line = ProgressLine()
    line.open(run_info(run, "thinker"))
    line.log(10, "val" if kind == "val" else "train", metrics)
    line.close("FINISHED")
    return capsys.readouterr().out


def test_a_dense_model_has_no_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = _printed("train", METRICS, tmp_path, capsys)
    assert line.startswith("thinker 10/20  loss 2.5000  lr 1.00e-03  grad 0.75  1,234 tokens/s")
    assert "experts" not in line


def test_the_line_has_the_load_of_experts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load = {"moe/max_load": 1.84, "moe/entropy": 0.913, "moe/num_dead": 2.0}
    line = _printed("train", METRICS | load, tmp_path, capsys)
    assert "grad 0.75  experts max 1.8x entropy 0.91 dead 2  1,234 tokens/s" in line


def test_a_validation_is_one_line_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = _printed("val", {"val/loss": 2.0, "val/accuracy": 0.5}, tmp_path, capsys)
    assert line == "thinker 10/20  val/loss 2.0000  val/accuracy 0.5000\n"


def test_without_a_terminal_there_is_a_line_per_interval_with_progress(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EVERY_S", 0.05)
    step = 10

    class Linked:
        link: str | None = None

    recorder = Linked()
    line = ProgressLine([recorder])  # pyright: ignore[reportArgumentType]
    line.open(replace(run_info(tmp_path, "thinker"), position=lambda: (step, "forward")))
    line.log(10, "train", METRICS | {"step_time_s": 3.0})
    line.log(10, "train", METRICS)  # only the first log has a line of its own
    time.sleep(0.3)
    step, recorder.link = 12, "http://host/1"
    printed = ""
    while "12/20" not in printed:
        time.sleep(0.01)
        printed += capsys.readouterr().out
    line.close("FINISHED")
    first, *others = printed.splitlines()
    assert first.startswith("thinker 10/20  loss 2.5000") and first.endswith("eta 0:30")
    assert others[0] == "thinker is logged to http://host/1"
    assert [other.split("  ")[0] for other in others[1:]] == ["thinker 12/20"]


def test_bad_samples_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = _printed("train", METRICS | {"num_bad_samples": 3.0}, tmp_path, capsys)
    assert "bad samples 3" in line
