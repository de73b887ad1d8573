"""Sends what a run logs to MLflow, in a thread of rank 0; its failure never harms training.

The run id is kept in the checkpoint, so a resumed run goes on in the same MLflow run on the same step
axis. Where MLflow cannot be reached, one warning says so and `metrics.jsonl` still has everything.
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

logger = logging.getLogger(__name__)

_MAX_PARAM_LENGTH = 500
# What MLflow takes at once; large mixtures of experts have more metrics.
_MAX_PARAMS, _MAX_METRICS = 100, 1000
T = TypeVar("T")


def default_tracking_uri(run: Path) -> str:
    """MLFLOW_TRACKING_URI, else an SQLite file beside the run folder."""
    return (
        os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.resolve().parent / 'mlflow.db'}"
    )


class MlflowLog:
    """A queue of calls to MLflow, worked off by one thread."""

    def __init__(self, run: Path, stage: str, run_id: str | None, params: dict[str, Any]) -> None:
        self.run_id = run_id
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._broken = False
        self._client: Any = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()
        self._queue.put(lambda: self._start(run, stage, params))

    def metrics(self, step: int, metrics: dict[str, float]) -> None:
        self._queue.put(lambda: self._log_metrics(step, metrics))

    def artifact(self, path: Path, folder: str) -> None:
        self._queue.put(lambda: self._client.log_artifact(self.run_id, str(path), folder))

    def wait_for_run_id(self, timeout_s: float = 60.0) -> str | None:
        """The id of the MLflow run, None when MLflow could not be reached in time."""
        self._started.wait(timeout_s)
        return self.run_id

    def close(self, status: str, timeout_s: float = 60.0) -> None:
        """Send what is queued and end the run with `status` (FINISHED, FAILED, KILLED)."""
        self._queue.put(lambda: self._client.set_terminated(self.run_id, status))
        self._queue.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning(
                "MLflow did not take all metrics in %.0f s; metrics.jsonl has them", timeout_s
            )

    def _work(self) -> None:
        while (call := self._queue.get()) is not None:
            if self._broken:
                continue
            try:
                call()
            except Exception as error:  # whatever MLflow or its store raises: training goes on
                self._broken = True
                logger.warning(
                    "MLflow logging stopped (%s: %s); metrics.jsonl goes on",
                    type(error).__name__,
                    error,
                )
            finally:
                self._started.set()

    def _start(self, run: Path, stage: str, params: dict[str, Any]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        uri = default_tracking_uri(run)
        with _store_lock(uri):
            self._client = MlflowClient(tracking_uri=uri)
            experiment_id = self._experiment(run, stage)
        if self.run_id is None:
            created = self._client.create_run(experiment_id, run_name=f"{run.name}/{stage}")
            self.run_id = created.info.run_id
            entities = [Param(key, str(value)[:_MAX_PARAM_LENGTH]) for key, value in params.items()]
            for some in _batches(entities, _MAX_PARAMS):
                self._client.log_batch(self.run_id, params=some)
        else:
            self._client.update_run(self.run_id, status="RUNNING")

    def _experiment(self, run: Path, stage: str) -> str:
        """The id of the stage's experiment, which is made when there is none."""
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
    """Keeps stages that start at the same time from making the tables of one SQLite file together.

    MLflow itself does not: the second process fails at a column that the first has just added.
    """
    from sqlalchemy.engine import make_url

    file = make_url(uri).database if uri.startswith("sqlite:") else None
    return exclusive_lock_if_supported(Path(f"{file}.lock")) if file else nullcontext()


def flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`, the form in which MLflow compares parameters.

    A table whose keys are no names of settings (patterns, datasets) stays a value: MLflow refuses some of them.
    """
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict) and all(name.isidentifier() for name in value):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
