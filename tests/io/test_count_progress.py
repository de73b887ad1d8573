"""Progress without a terminal: lines at intervals, none if the work is short or output is quiet."""

import time

import pytest

from muomni.io import count_progress
from muomni.io.count_progress import ProgressLines, counted, duration, open_progress, working


def test_lines_have_count_rate_and_remaining_time(capsys: pytest.CaptureFixture[str]) -> None:
    lines = ProgressLines(2000, "text", every_s=0.05)
    lines.update(10)
    assert capsys.readouterr().err == ""
    time.sleep(0.06)
    lines.update(990)
    lines.update(1)  # too soon
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("text: 1,000/2,000 (50%) samples, ") and line.endswith("/s, eta 0:00")


def test_an_unknown_total_has_no_remaining_time(capsys: pytest.CaptureFixture[str]) -> None:
    ProgressLines(None, "text", every_s=0.0).update(5)
    assert capsys.readouterr().err.startswith("text: 5 samples, ")


def test_short_work_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(counted(range(3), 3, "batches")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_lines_appear_while_nothing_is_counted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(count_progress, "EVERY_S", 0.05)
    with open_progress(8, "shards", "shards") as progress:
        progress.update(3)
        time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2 and lines[-1].startswith("shards: 3/8 (38%) shards, 0.0/s")


def test_work_without_a_count_says_how_long_it_lasts(capsys: pytest.CaptureFixture[str]) -> None:
    with working(lambda: "tokenizer: 7 texts read", every_s=0.05):
        time.sleep(0.12)
    assert capsys.readouterr().err.splitlines()[0] == "tokenizer: 7 texts read, 0:00 so far"
    assert duration(3661) == "1:01:01"
