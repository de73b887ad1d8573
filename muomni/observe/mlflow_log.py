"""Recorder that sends metrics and files to MLflow, in a thread; its failure never harms training.

The run id is saved in checkpoints, so a resumed run continues the same MLflow run on the same step axis. If
MLflow cannot be reached, one warning is logged, and `metrics.jsonl` still has everything.
"""

import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from muomni.io.file_lock import exclusive_lock_if_supported
from muomni.observe.recorder import Kind, Recorder, RunInfo, Status

logger = logging.getLogger(__name__)

_MAX_PARAM_LENGTH = 500
# MLflow's limits per request; large mixtures of experts have more metrics.
_MAX_PARAMS, _MAX_METRICS = 100, 1000
T = TypeVar("T")


def default_tracking_uri(run: Path) -> str:
    """MLFLOW_TRACKING_URI, else an SQLite file beside the run folder."""
    return (
        os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.resolve().parent / 'mlflow.db'}"
    )


def mlflow_run_id(recorders: Sequence[Recorder]) -> str | None:
    """The id of the MLflow run that `recorders` write to, for checkpoints; waits until it is known."""
    logs = (recorder for recorder in recorders if isinstance(recorder, MlflowLog))
    return next((log.wait_for_run_id() for log in logs), None)


class MlflowLog:
    """A queue of calls to MLflow, processed by one thread."""

    _info: RunInfo
    _client: Any

    def __init__(self) -> None:
        self.run_id: str | None = None
        self._started = threading.Event()
        self._started.set()  # nothing to wait for before `open`

    def open(self, info: RunInfo) -> None:
        self._info = info
        self.run_id = info.mlflow_run_id
        self._is_broken = False
        self._started = threading.Event()
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._queue.put(self._start)
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def log(self, step: int, kind: Kind, metrics: dict[str, float]) -> None:
        self._queue.put(lambda: self._log_metrics(step, metrics))

    def artifact(self, path: Path, folder: str) -> None:
        self._queue.put(lambda: self._client.log_artifact(self.run_id, str(path), folder))

    def close(self, status: Status, timeout_s: float = 60.0) -> None:
        """Send what is queued and end the MLflow run with `status`."""
        self._queue.put(lambda: self._client.set_terminated(self.run_id, status))
        self._queue.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning(
                "MLflow did not accept all metrics in %.0f s; metrics.jsonl has them", timeout_s
            )

    def wait_for_run_id(self, timeout_s: float = 60.0) -> str | None:
        """The id of the MLflow run; None if MLflow could not be reached in time."""
        self._started.wait(timeout_s)
        return self.run_id

    def _work(self) -> None:
        while (call := self._queue.get()) is not None:
            if self._is_broken:
                continue
            try:
                call()
            except Exception as error:  # MLflow and its stores raise anything; training continues
                self._is_broken = True
                logger.warning(
                    "MLflow logging stopped (%s: %s); metrics.jsonl continues",
                    type(error).__name__,
                    error,
                )
            finally:
                self._started.set()

    def _start(self) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        run, stage = self._info.run, self._info.stage
        uri = default_tracking_uri(run)
        with _store_lock(uri):
            self._client = MlflowClient(tracking_uri=uri)
            experiment_id = self._experiment(run, stage)
        if self.run_id is None:
            created = self._client.create_run(experiment_id, run_name=f"{run.name}/{stage}")
            self.run_id = created.info.run_id
            params = flatten(self._info.config)
            entities = [Param(key, str(value)[:_MAX_PARAM_LENGTH]) for key, value in params.items()]
            for some in _batches(entities, _MAX_PARAMS):
                self._client.log_batch(self.run_id, params=some)
        else:
            self._client.update_run(self.run_id, status="RUNNING")

    def _experiment(self, run: Path, stage: str) -> str:
        """The id of the stage's experiment, which is created if there is none."""
        name = f"muomni/{stage}"
        experiment = self._client.get_experiment_by_name(name)
        if experiment is not None:
            return experiment.experiment_id
        location = None
        if default_tracking_uri(run).startswith("sqlite:"):
            location = (run.resolve().parent / "mlartifacts").as_uri()
        return self._client.create_experiment(name, artifact_location=location)

    def _log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        entities = [Metric(key, value, now, step) for key, value in metrics.items()]
        for some in _batches(entities, _MAX_METRICS):
            self._client.log_batch(self.run_id, metrics=some)


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _store_lock(uri: str) -> AbstractContextManager[None]:
    """Lock against stages that start at the same time and create the tables of one SQLite file.

    Without it, MLflow fails in the second process at a column that the first has just added.
    """
    from sqlalchemy.engine import make_url

    file = make_url(uri).database if uri.startswith("sqlite:") else None
    return exclusive_lock_if_supported(Path(f"{file}.lock")) if file else nullcontext()


def flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten `{"a": {"b": 1}}` to `{"a.b": 1}`, the form in which MLflow compares parameters.

    A table with keys that are not identifiers (patterns, datasets) stays a value: MLflow rejects some of
    them.
    """
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict) and all(name.isidentifier() for name in value):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
