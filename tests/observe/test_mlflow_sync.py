"""`muomni sync-mlflow` makes MLflow agree with the run folder; evaluations reach the run of their stage."""

import json
from pathlib import Path

import pytest
import yaml

from muomni.cli.main import main
from muomni.observe.tracking.sync import end_killed, record_evaluation, sync
from tests.observe.mlflow_runs import Start, client, empty_mlflow_store, losses, run_of

REPORT = {
    "split": "test",
    "metrics": {"wer": 0.25, "none": None},
    "baselines": {"wer": {"name": "random", "value": 1.0, "is_beaten": True}},
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run of stage codec that MLflow does not know."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    folder = tmp_path / "run" / "codec"
    start = Start(tmp_path / "run", config={"optim": {"lr": 0.1}})
    start.log(10, 20)
    start.close("KILLED")
    (folder / "config.yaml").write_text(yaml.safe_dump(start.info.config))
    (folder / "export").mkdir()
    (folder / "export" / "export.json").write_text(json.dumps({"step": 20}))
    (folder / "samples").mkdir()
    (folder / "samples" / "codec.txt").write_text("decoded")
    (folder / "samples" / "codec.json").write_text('{"columns": ["a"], "data": [["b"]]}')
    (folder / "evaluation.json").write_text(json.dumps(REPORT))
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    (tmp_path / "mlflow.db").write_bytes(empty_mlflow_store())
    return tmp_path / "run"


def test_everything_of_a_lost_run_is_sent(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["sync-mlflow", str(run)])
    assert capsys.readouterr().out.startswith(
        "codec: created, 2 lines sent, http://127.0.0.1:5000/#/"
    )
    found = run_of(run)
    assert losses(run) == [(10, 1 / 10), (20, 1 / 20)] and found.info.status == "FINISHED"
    assert found.data.params == {"optim.lr": "0.1"}
    assert (found.data.metrics["test/wer"], found.data.metrics["test/wer_baseline"]) == (0.25, 1.0)
    assert found.outputs.model_outputs[0].step == 20
    assert json.loads(found.data.tags["mlflow.loggedArtifacts"]) == [
        {"path": "samples/table/codec.json", "type": "table"}
    ]
    stored = {path.name for path in (run.parent / "mlartifacts").rglob("*.*")}
    assert {"config.yaml", "codec.txt", "export.json"} <= stored
    assert sync(run, "codec")[:2] == ("updated", 0)
    assert len(losses(run)) == 2 and run_of(run).info.run_id == found.info.run_id


def test_a_run_that_contradicts_the_file_is_replaced(run: Path) -> None:
    sync(run, "codec")
    before = run_of(run).info.run_id
    path = run / "codec" / "metrics.jsonl"
    path.write_text(path.read_text().replace("0.05", "0.07"))
    assert sync(run, "codec").action == "replaced"
    assert [value for _, value in losses(run)] == [1 / 10, 0.07]
    assert client(run).get_run(before).info.lifecycle_stage == "deleted"


def test_an_evaluation_is_added_once(run: Path) -> None:
    record_evaluation(run, "codec")  # without a run in MLflow
    sync(run, "codec")
    (run / "codec" / "evaluation.json").write_text(json.dumps({**REPORT, "metrics": {"wer": 0.2}}))
    for _ in range(2):
        record_evaluation(run, "codec")
    history = client(run).get_metric_history(run_of(run).info.run_id, "test/wer")
    assert [point.value for point in history] == [0.25, 0.2]


def test_a_killed_run_is_ended_once(run: Path) -> None:
    end_killed(run, "codec")  # without a run in MLflow
    sync(run, "codec")
    end_killed(run, "codec")
    assert run_of(run).info.status == "FINISHED"
    for stage in ("codec", ""):
        client(run).update_run(run_of(run, stage).info.run_id, status="RUNNING")
    end_killed(run, "codec")
    assert run_of(run).info.status == run_of(run, "").info.status == "KILLED"


def test_failures_are_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    sync(run, "codec")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    record_evaluation(run, "codec")
    end_killed(run, "codec")
    warnings = [r.getMessage() for r in caplog.records if r.name.startswith("muomni")]
    assert warnings[0].endswith(f"add them with: muomni sync-mlflow {run}")
    assert warnings[1].endswith(f"correct that with: muomni sync-mlflow {run}")
    for argument, code, text in (
        (run, 7, "MLflow failed (http://127.0.0.1:9: connection refused)"),
        (tmp_path, 2, "no stage with metrics.jsonl"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["sync-mlflow", str(argument)])
        assert stopped.value.code == code
        error = capsys.readouterr().err.strip()
        assert text in error and "\n" not in error
