"""Failures of MLflow cost training nothing, and what it missed is filled in, each step once."""

import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.utils.validation import MAX_METRICS_PER_BATCH

from muomni.io.file_lock import exclusive_lock
from muomni.observe.tracking.run import read_run_file
from tests.observe.mlflow_runs import (
    Start,
    client,
    empty_mlflow_store,
    losses,
    run_of,
    wait_until,
)
from tests.observe.mlflow_server import Faults, mlflow_server

Server = tuple[str, Faults]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder beside an SQLite store."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlflow.db").write_bytes(empty_mlflow_store())
    return tmp_path / "run"


@pytest.fixture
def server(run: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server of the store, which runs use, with a timeout of three seconds."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    with mlflow_server(run.parent, monkeypatch) as (url, faults):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        yield url, faults


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("muomni")]


def test_steps_that_run_again_after_a_kill_appear_once(run: Path) -> None:
    first = Start(run, config={"optim": {"lr": 0.1}})
    first.log(10, 20)
    first.die()
    assert run_of(run).info.status == "RUNNING"
    second = Start(run, step=15, config={"optim": {"lr": 0.1}})
    second.log(20, 30)
    second.close()
    found = run_of(run)
    assert losses(run) == [(10, 1 / 10), (20, 1 / 20), (30, 1 / 30)]
    assert found.info.status == "FINISHED" and found.data.tags["starts"] == "2"
    assert len(client(run).search_runs([found.info.experiment_id])) == 2  # this one and its parent


def test_other_stages_whose_process_was_killed_are_ended(run: Path) -> None:
    talker = Start(run, "talker")
    talker.die()
    other = Start(run, "thinker")
    other.die()
    assert run_of(run, "talker").info.status == "RUNNING"
    codec = Start(run, free_folders=lambda: [run / "talker", run / "codec"])
    wait_until(lambda: run_of(run, "talker").info.status == "KILLED")
    codec.close()
    # A process trains the thinker, as far as this start knows.
    assert run_of(run, "thinker").info.status == run_of(run, "").info.status == "RUNNING"
    Start(run, free_folders=lambda: [run / "talker", run / "thinker"]).close()
    assert run_of(run, "thinker").info.status == run_of(run, "").info.status == "KILLED"


def test_a_run_that_is_deleted_before_the_end_is_created_again(run: Path) -> None:
    start = Start(run, wait_s=30.0)  # so that only the end sends more
    start.log(10)
    wait_until(lambda: start.mlflow.run_id and len(losses(run)) == 1)
    client(run).delete_run(run_of(run).info.run_id)
    start.log(20)
    start.close()
    assert losses(run) == [(10, 1 / 10), (20, 1 / 20)]
    assert run_of(run).info.status == "FINISHED"


def test_a_repeated_step_with_another_loss_is_reported(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = Start(run)
    first.log(10, 20)
    first.die()
    second = Start(run, step=15)
    second.log(20, 30, scale=2.0)
    second.close()
    assert losses(run) == [(10, 1 / 10), (20, 1 / 20), (30, 2 / 30)]
    (warning,) = _warnings(caplog)
    assert "step 20" in warning and f"muomni sync-mlflow {run}" in warning


@pytest.mark.parametrize("fault", ["error", "slow"])
def test_a_server_that_fails_for_a_while_gets_all_lines(
    fault: str, run: Path, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    _, faults = server
    start = Start(run)
    start.log(1)
    wait_until(lambda: start.mlflow.run_id and losses(run))
    if fault == "error":
        faults.status = 500
    else:
        faults.delay_s = 3.3  # above the timeout
    begin = time.monotonic()
    start.log(*range(2, 50))
    assert time.monotonic() - begin < 0.5
    wait_until(lambda: _warnings(caplog))
    faults.status, faults.delay_s = None, 0.0
    wait_until(lambda: len(_warnings(caplog)) == 2)
    start.close()
    assert [step for step, _ in losses(run)] == list(range(1, 50))
    lost, back = _warnings(caplog)
    reason = "too many 500 error responses" if fault == "error" else "timed out"
    assert lost.startswith("MLflow failed (http://127.0.0.1:") and reason in lost
    assert back.startswith("MLflow is back")
    assert run_of(run).info.status == "FINISHED"


def test_a_dead_server_costs_no_time(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    start = Start(run)
    start.log(10)
    wait_until(lambda: _warnings(caplog))
    assert start.close() < 4.0
    failed, incomplete = _warnings(caplog)
    assert failed.startswith("MLflow failed (http://127.0.0.1:9: connection refused); training")
    assert incomplete.endswith(f"run: muomni sync-mlflow {run}")
    start.mlflow.open(start.info)  # for samples
    start.mlflow.close("FINISHED")
    assert len(_warnings(caplog)) == 2
    # The next start fills in what this one could not send.
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    again = Start(run, step=10)
    again.log(20)
    again.close()
    assert [step for step, _ in losses(run)] == [10, 20]


def test_a_server_that_never_answers_does_not_delay_a_stop(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        start = Start(run)
        start.log(10)
        assert start.close("KILLED") < 3.0


@pytest.mark.parametrize("lost", ["run", "experiment", "store"])
def test_a_lost_run_is_created_again_and_filled(
    lost: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Start(run)
    first.log(10)
    first.close("KILLED")
    before = run_of(run)
    if lost == "run":
        client(run).delete_run(before.info.run_id)
    elif lost == "experiment":
        client(run).delete_experiment(before.info.experiment_id)
    else:
        (run.parent / "other.db").write_bytes(empty_mlflow_store())
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{run.parent / 'other.db'}")
    second = Start(run, step=10)
    second.log(20)
    second.close()
    found = run_of(run)
    assert found.info.run_id != before.info.run_id and found.info.status == "FINISHED"
    assert [step for step, _ in losses(run)] == [10, 20]
    experiment = client(run).get_experiment(found.info.experiment_id)
    assert experiment.name == ("run-2" if lost == "experiment" else "run")


def test_a_run_that_is_deleted_during_training_is_created_again(run: Path) -> None:
    start = Start(run)
    start.log(1)
    wait_until(lambda: start.mlflow.run_id and losses(run))
    deleted = start.mlflow.run_id
    client(run).delete_run(deleted)
    start.log(2)
    wait_until(lambda: read_run_file(run / "codec" / "mlflow.json")["run_id"] != deleted)
    start.close()
    assert [step for step, _ in losses(run)] == [1, 2]


def test_an_artifact_store_that_fails_does_not_stop_metrics(
    run: Path, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    _, faults = server
    faults.status, faults.only = 500, "mlflow-artifacts"
    file = run.parent / "note.txt"
    file.write_text("note")
    start = Start(run)
    start.mlflow.artifact(file, "samples/text")
    start.log(1)
    wait_until(lambda: faults.num_failed and losses(run))
    start.log(2)
    wait_until(lambda: len(losses(run)) == 2)
    faults.status = None
    start.close()
    assert run_of(run).info.status == "FINISHED"
    (stored,) = (run.parent / "mlartifacts").rglob("samples/text/note.txt")
    assert stored.read_text() == "note"
    fails, works = _warnings(caplog)
    assert fails.startswith("MLflow stores no files") and works == "MLflow stores files again"


def test_stages_that_start_together_create_the_store_one_by_one(run: Path) -> None:
    with exclusive_lock(run.parent / "mlflow.db.lock"):  # held by the other stage
        start = Start(run)
        time.sleep(0.5)
        assert start.mlflow.run_id is None
    start.close()
    assert run_of(run).info.status == "FINISHED"
    assert not (run.parent / "mlflow.db.lock").exists()


def test_large_logs_are_split_and_the_loss_is_last(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server refuses larger requests; the loss marks a step as complete."""
    names = []
    log_batch = MlflowClient.log_batch

    def spy(self: MlflowClient, run_id: str, metrics=(), **others) -> None:
        names.append([metric.key for metric in metrics])
        log_batch(self, run_id, metrics=metrics, **others)

    monkeypatch.setattr(MlflowClient, "log_batch", spy)
    start = Start(run)
    loads = {f"moe/layer0/load/{expert}": float(expert) for expert in range(1001)}
    start.metrics.log(1, "train", {"loss": 2.0, **loads})
    start.close()
    sent = [each for each in names if each]
    assert [len(each) for each in sent] == [MAX_METRICS_PER_BATCH, 2]
    assert sent[1] == ["moe/layer0/load/1000", "loss/train"]


def test_a_failing_import_is_one_warning(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "no-such-store://here")
    start = Start(run)
    start.log(10)
    start.close()
    failed, _ = _warnings(caplog)
    assert failed.startswith("MLflow failed")
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"
    assert logging.getLogger("mlflow").level == logging.WARNING
