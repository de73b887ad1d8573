"""Short runs that log to MLflow without training, and what MLflow has of them."""

import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from muomni.observe.metrics_log import MetricsLog, read_lines
from muomni.observe.mlflow_log import MlflowLog
from muomni.observe.recorder import Status
from muomni.observe.tracking.run import read_run_file
from muomni.observe.tracking.store import default_tracking_uri
from tests.observe.run_info import run_info


@cache
def empty_mlflow_store() -> bytes:
    """An MLflow database with empty tables, whose creation takes longer than a short run."""
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mlflow.db"
        MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments(max_results=1)
        return path.read_bytes()


class Start:
    """One start of a run that logs losses, with short waits between attempts."""

    def __init__(self, run: Path, stage: str = "codec", wait_s: float = 0.02, **info: Any) -> None:
        self.info = run_info(run, stage, **info)
        self.metrics, self.mlflow = MetricsLog(), MlflowLog(wait_s, wait_s)
        for recorder in (self.metrics, self.mlflow):
            recorder.open(self.info)

    def log(self, *steps: int, scale: float = 1.0) -> None:
        for step in steps:
            for recorder in (self.metrics, self.mlflow):
                recorder.log(step, "train", {"loss": scale / step, "lr": 0.1})

    def close(self, status: Status = "FINISHED") -> float:
        """End the start; returns the seconds that this took."""
        start = time.monotonic()
        for recorder in (self.metrics, self.mlflow):
            recorder.close(status)
        return time.monotonic() - start

    def die(self) -> None:
        """End like a killed process: MLflow has all lines, and does not hear of the end."""
        number = len(read_lines(self.info.folder / "metrics.jsonl"))
        wait_until(
            lambda: self.mlflow.run_id and len(losses(self.info.run, self.info.stage)) >= number
        )
        sender = self.mlflow._sender
        assert sender is not None
        sender.abandon()
        sender.join()


def wait_until(is_true: Callable[[], object], timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.02)


def client(run: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=default_tracking_uri(run))


def run_of(run: Path, stage: str = "codec") -> Any:
    """The MLflow run of a stage, or with an empty name that of the pipeline."""
    return client(run).get_run(read_run_file(run / stage / "mlflow.json")["run_id"])


def losses(run: Path, stage: str = "codec") -> list[tuple[int, float]]:
    """Steps and losses of the MLflow run of a stage, in the order in which they were recorded."""
    run_id = read_run_file(run / stage / "mlflow.json")["run_id"]
    history = client(run).get_metric_history(run_id, "loss/train")
    return [(point.step, point.value) for point in history]
