"""MLflow gets one run per stage, also over resumes; its errors never harm training."""

import logging
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.utils.validation import MAX_METRICS_PER_BATCH, MAX_PARAMS_TAGS_PER_BATCH

from muomni.io.file_lock import exclusive_lock
from muomni.observe.mlflow_log import MlflowLog, default_tracking_uri, flatten
from tests.observe.run_info import run_info


def _opened(run: Path, stage: str = "codec", **changes: Any) -> MlflowLog:
    log = MlflowLog()
    log.open(run_info(run, stage, **changes))
    return log


def test_resume_continues_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = tmp_path / "run"
    run.mkdir()
    first = _opened(run, config={"optim": {"lr": 0.1}})
    first.log(10, "train", {"loss": 2.0})
    run_id = first.wait_for_run_id()
    first.close("KILLED")
    resumed = _opened(run, config={"optim": {"lr": 0.1}}, mlflow_run_id=run_id)
    resumed.log(20, "train", {"loss": 1.0})
    resumed.close("FINISHED")
    assert run_id is not None and resumed.wait_for_run_id() == run_id
    client = MlflowClient(tracking_uri=default_tracking_uri(run))
    found = client.get_run(run_id)
    assert (found.info.status, found.data.params) == ("FINISHED", {"optim.lr": "0.1"})
    history = [(point.step, point.value) for point in client.get_metric_history(run_id, "loss")]
    assert history == [(10, 2.0), (20, 1.0)]


def test_large_logs_are_split_into_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = tmp_path / "run"
    run.mkdir()
    calls = []
    log_batch = MlflowClient.log_batch

    def spy(client: MlflowClient, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        calls.append((len(metrics), len(params)))
        log_batch(client, run_id, metrics=metrics, params=params)

    # A server refuses larger batches; the SQLite store of this test does not.
    monkeypatch.setattr(MlflowClient, "log_batch", spy)
    log = _opened(run, "thinker", config={f"option{i}": i for i in range(101)})
    log.log(1, "train", {f"moe/layer0/load/{expert}": float(expert) for expert in range(1001)})
    run_id = log.wait_for_run_id()
    log.close("FINISHED")
    assert run_id is not None
    found = MlflowClient(tracking_uri=default_tracking_uri(run)).get_run(run_id)
    assert found.data.metrics["moe/layer0/load/1000"] == 1000.0
    assert found.data.params == {f"option{i}": str(i) for i in range(101)}
    assert calls == [(0, 100), (0, 1), (MAX_METRICS_PER_BATCH, 0), (1, 0)]
    assert MAX_PARAMS_TAGS_PER_BATCH == 100


def test_stages_that_start_together_create_the_store_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with exclusive_lock(tmp_path / "mlflow.db.lock"):  # held by the other stage
        log = _opened(tmp_path / "run")
        assert log.wait_for_run_id(timeout_s=1.0) is None
        assert not (tmp_path / "mlflow.db").exists()
    assert log.wait_for_run_id() is not None
    log.close("FINISHED")
    assert not (tmp_path / "mlflow.db.lock").exists()


def test_an_unreachable_store_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "no-such-store://here")
    with caplog.at_level(logging.WARNING, "muomni"):
        log = _opened(tmp_path)
        log.log(10, "train", {"loss": 2.0})
        assert log.wait_for_run_id() is None
        log.close("FINISHED")
    warned = [record.getMessage() for record in caplog.records if record.name.startswith("muomni")]
    assert len(warned) == 1 and "MLflow logging stopped" in warned[0]


def test_parameters_are_flat() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": None}}, "e": [2]}) == {
        "a.b": 1,
        "a.c.d": None,
        "e": [2],
    }


def test_patterns_and_dataset_names_are_values_of_parameters(tmp_path: Path) -> None:
    """MLflow refuses a parameter named `lr_scales.talker.*`, and would log nothing after it."""
    content = {"optim": {"lr": 1.0, "lr_scales": {"talker.*": 0.05}}, "mix": {"my data!": 2.0}}
    log = _opened(tmp_path / "run", "sft", config=content)
    log.log(1, "train", {"loss": 2.0})
    log.close("FINISHED")
    client = MlflowClient(tracking_uri=default_tracking_uri(tmp_path / "run"))
    found = client.get_run(str(log.run_id))
    assert found.info.status == "FINISHED" and found.data.metrics["loss"] == 2.0
    assert found.data.params["optim.lr_scales"] == "{'talker.*': 0.05}"
