"""TensorBoard gets all metrics, each step once over resumes; without the extra, one sentence says so."""

from pathlib import Path

import pytest

from muomni.errors import ConfigError
from muomni.observe import tensorboard_log
from muomni.observe.recorder import check_recorders
from muomni.observe.tensorboard_log import TensorBoardLog
from tests.observe.run_info import run_info


def test_metrics_become_scalars_and_a_resume_replaces_later_steps(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, values in ((0, {10: 2.0, 20: 1.5, 30: 9.0}), (20, {30: 1.0})):
        log = TensorBoardLog()
        log.open(run_info(tmp_path, step=start))
        for step, loss in values.items():
            log.log(step, "train", {"loss": loss, "moe/entropy": 0.5})
        log.log(30, "val", {"val/loss": 1.25})
        log.close("FINISHED")
    note = tmp_path / "note.txt"
    note.write_text("two\nlines")
    log.open(run_info(tmp_path, step=30))
    log.artifact(note, "samples/text")
    log.artifact(tmp_path / "missing.wav", "samples/audio")  # not read: it is no text
    log.close("FINISHED")
    events = accumulators.EventAccumulator(str(tmp_path / "codec" / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/train")] == [
        (10, 2.0), (20, 1.5), (30, 1.0),
    ]  # fmt: skip
    assert events.Scalars("loss/val")[-1].value == 1.25
    assert "moe/entropy" in events.Tags()["scalars"]
    assert any("samples/text/note.txt" in tag for tag in events.Tags()["tensors"])


def test_a_missing_package_is_one_sentence_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard_log, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install muomni\[tensorboard\]$"):
        check_recorders(["mlflow", "tensorboard"])
    check_recorders(["mlflow"])
