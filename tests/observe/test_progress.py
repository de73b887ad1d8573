"""The progress line shows what an operator needs, and the load of experts if there are any."""

from pathlib import Path

import pytest

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
