"""Tables, JSON files, and summaries of an evaluation."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from muomni.errors import ConfigError, DataError
from muomni.evaluation.report import Metric, Report, read_reports, summary, write_report

DIGEST = "0123456789abcdef"


def report(stage: str = "thinker", *metrics: Metric) -> Report:
    measured_on = {f"{stage}/export": DIGEST}
    return Report(
        stage, "test", ("data/text",), 10, 1, f"runs/x/{stage}/export", DIGEST, measured_on, metrics
    )


def write_manifest(run: Path, stage: str, digest: str) -> None:
    export = run / stage / "export"
    export.mkdir(parents=True, exist_ok=True)
    content = {"sha256": {"model.safetensors": digest}}
    (export / "export.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (Metric("wer", 0.4, 0.9, "empty transcript"), True),
        (Metric("wer", 0.9, 0.9, "empty transcript"), False),
        (Metric("recall_at_1", 0.4, 0.1, "chance", is_lower_better=False), True),
        (Metric("recall_at_1", 0.1, 0.4, "chance", is_lower_better=False), False),
        (Metric("wer", math.nan, 0.9, "empty transcript"), False),
        (Metric("wer_of_originals", 0.4), None),
    ],
)
def test_better_is_strict_and_directional(metric: Metric, expected: bool | None) -> None:
    assert metric.is_better is expected


def test_table_shows_value_baseline_and_verdict() -> None:
    table = report(
        "thinker",
        Metric("perplexity", 12.345, 500.0, "unigram model"),
        Metric("codes", 0.00421),
        Metric("recall", 0.1, 0.2, "chance", is_lower_better=False),
    ).table()
    title, header, first, second, third = table.splitlines()
    assert "thinker on split 'test' of data/text: 10 samples, export 0123456789ab (1 could" in title
    assert header.split() == ["metric", "value", "trivial", "baseline", "better?"]
    assert first.split() == ["perplexity", "12.35", "500.0", "(unigram", "model)", "yes"]
    assert second.split() == ["codes", "0.0042", "-", "-"]
    assert third.split()[-1] == "NO"


def test_samples_of_trained_groups_are_reported() -> None:
    seen = replace(report("thinker", Metric("perplexity", 1.0)), num_seen=3)
    assert "3 samples of the split are in groups that were trained on" in seen.table()
    assert seen.to_json()["num_seen"] == 3
    assert "num_seen" not in report().to_json()


def test_json_is_strict_and_written_atomically(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.json"
    write_report(path, report("thinker", Metric("wer", math.nan, 1.0, "empty")))
    content = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert content["metrics"] == {"wer": None}
    assert content["baselines"]["wer"] == {"name": "empty", "value": 1.0, "is_beaten": False}
    assert [file.name for file in path.parent.iterdir()] == ["report.json"]


def test_answers_are_json_lines_next_to_the_report(tmp_path: Path) -> None:
    answers = ({"key": "a", "answer": "Crème\nbrûlée"}, {"key": "b", "answer": ""})
    write_report(tmp_path / "report.json", replace(report("sft"), answers=answers))
    lines = (tmp_path / "report.answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert tuple(json.loads(line) for line in lines) == answers
    assert "Crème" in lines[0]


def test_unwritable_report_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot write the report to .*file/report\.json"):
        write_report(tmp_path / "file" / "report.json", report())


def test_summary_is_a_markdown_table_in_stage_order(tmp_path: Path) -> None:
    sft = report("sft", Metric("loss", 1.0, 2.0, "unigram model"))
    thinker = report("thinker", Metric("perplexity", 30.0, 20.0, "unigram model"), Metric("x", 1.0))
    for one in (sft, thinker):
        write_report(tmp_path / one.stage / "evaluation.json", one)
        write_manifest(tmp_path, one.stage, DIGEST)
    lines = summary(tmp_path, read_reports(tmp_path)).splitlines()
    assert lines == [
        "| stage | metric | muomni | trivial baseline | beaten | export |",
        "|---|---|---:|---|---|---|",
        "| thinker | perplexity | 30.00 | 20.00 (unigram model) | no | 0123456789ab |",
        "| sft | loss | 1.000 | 2.000 (unigram model) | yes | 0123456789ab |",
    ]
    complete = summary(tmp_path, read_reports(tmp_path), with_all=True)
    assert "| thinker | x | 1.000 | - | - | 0123456789ab |" in complete


def test_metrics_of_an_earlier_export_are_shown_as_outdated(tmp_path: Path) -> None:
    """Also if another export changed that they were measured with, such as the recognizer's."""
    thinker = report("thinker", Metric("perplexity", 30.0, 20.0, "unigram model"))
    codec = report("codec", Metric("wer", 0.5, 1.0, "empty transcript"))
    codec.measured_on["audio_encoder/export"] = DIGEST
    for one in (thinker, codec):
        write_report(tmp_path / one.stage / "evaluation.json", one)
        write_manifest(tmp_path, one.stage, DIGEST)
    write_manifest(tmp_path, "audio_encoder", "retrained")
    lines = summary(tmp_path, read_reports(tmp_path)).splitlines()
    assert "outdated" not in lines[2] and lines[3].endswith("| 0123456789ab (outdated) |")
    assert lines[5:] == [
        "The metrics of codec are outdated, because audio_encoder/export changed after the evaluation; "
        f"run: muomni evaluate --stage codec --run {tmp_path}"
    ]
    write_manifest(tmp_path, "thinker", "retrained")
    assert "thinker are outdated" in summary(tmp_path, read_reports(tmp_path))


def test_missing_and_invalid_reports_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no evaluation\.json.*launch/evaluate\.py"):
        read_reports(tmp_path)
    (tmp_path / "codec").mkdir()
    (tmp_path / "codec" / "evaluation.json").write_text("{")
    with pytest.raises(DataError, match=r"codec/evaluation\.json is not a valid report; rerun"):
        read_reports(tmp_path)
