"""The MLflow store of a run: a server (MLFLOW_TRACKING_URI), or an SQLite file beside the run folder.

Artifacts of an SQLite store are in the folder `mlartifacts` beside its file. Their URIs have no path, so
that both can be moved; `mlflow ui`, started beside the file, finds them.
"""

import json
import logging
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlparse

from muomni.io.file_lock import exclusive_lock_if_supported
from muomni.observe.metric_names import LOSS

ARTIFACTS = "mlartifacts"
_PROXY = "mlflow-artifacts:/"
# For the requests of this process. Retries are up to the recorder, which does not block its caller.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # sends at exit, and clusters have no route to the internet
}
_MAX_REASON = 120
_CREDENTIALS, _SERVER = re.compile(r"//[^/@\s]+@"), re.compile(r"https?://[^/\s]+")
# What the long messages of failed requests are about.
_CAUSE = re.compile(
    r"connection refused|timed out|too many \d+ error responses|name or service not known|"
    r"temporary failure in name resolution|no route to host|certificate verify failed",
    re.IGNORECASE,
)
_UI_URL = "http://127.0.0.1:5000"
# Makes MLflow's pages show training runs and not traces of language models.
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}


def default_tracking_uri(run: Path) -> str:
    """MLFLOW_TRACKING_URI, else an SQLite file beside the run folder."""
    return (
        os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.resolve().parent / 'mlflow.db'}"
    )


class Store:
    """A connection to the MLflow store of a run folder; raises MlflowException, among others."""

    def __init__(self, run: Path) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        for name in ("alembic", "mlflow"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self.uri = default_tracking_uri(run)
        with self.locked():
            self.client: Any = MlflowClient(tracking_uri=self.uri)

    @property
    def _file(self) -> Path | None:
        """The file of an SQLite store."""
        from sqlalchemy.engine import make_url

        name = make_url(self.uri).database if self.uri.startswith("sqlite:") else None
        return Path(name).absolute() if name else None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other stages of this machine out of an SQLite store.

        Two that create its tables at the same time fail at a column that the other has just added.
        """
        if self._file is None:
            yield
            return
        with exclusive_lock_if_supported(Path(f"{self._file}.lock")):
            yield

    def active_run(self, run_id: str | None) -> Any:
        """The MLflow run; None if it or its experiment is deleted or unknown to this store."""
        from mlflow.exceptions import MlflowException

        if run_id is None:
            return None
        try:
            run = self.client.get_run(run_id)
            experiment = self.client.get_experiment(run.info.experiment_id)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise
        is_active = run.info.lifecycle_stage == experiment.lifecycle_stage == "active"
        return run if is_active else None

    def experiment(self, name: str) -> str:
        """The id of the experiment, created if there is none; `NAME-2` if that one was deleted."""
        from mlflow.exceptions import MlflowException

        candidate, number = name, 1
        while True:
            found = self.client.get_experiment_by_name(candidate)
            if found is not None and found.lifecycle_stage == "active":
                return found.experiment_id
            if found is not None:
                number += 1
                candidate = f"{name}-{number}"
                continue
            folder = re.sub(r"[^\w.-]+", "_", candidate)
            location = None if self._file is None else f"{_PROXY}{folder}"
            try:
                return self.client.create_experiment(candidate, location, _EXPERIMENT_TAGS)
            except MlflowException as error:  # a stage on another machine was faster
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise

    def log_artifact(self, run: Any, path: Path, folder: str) -> None:
        """Store a file below `folder` of the artifacts of an MLflow run."""
        local = self._local(run.info.artifact_uri)
        if local is None:
            self.client.log_artifact(run.info.run_id, str(path), folder)
        else:
            _copy(path, local / folder)

    def log_model_file(self, model: Any, path: Path) -> None:
        """Store a file of a logged model."""
        local = self._local(model.artifact_location)
        if local is None:
            self.client.log_model_artifact(model.model_id, str(path))
        else:
            _copy(path, local)

    def link(self, run: Any) -> str:
        """The address of the metrics of an MLflow run, and for an SQLite file how to open it."""
        info = run.info
        page = f"#/experiments/{info.experiment_id}/runs/{info.run_id}/model-metrics"
        page += "?workflowType=machine_learning"
        if self.uri.startswith("http"):
            address = urlparse(self.uri)
            host = address.netloc.rpartition("@")[2]  # without credentials
            return f"{address.scheme}://{host}{address.path.rstrip('/')}/{page}"
        if self._file is None:
            return f"{_UI_URL}/{page}"
        return f"{_UI_URL}/{page} after: {self._ui_command(self._file)}"

    def loss_note(self, run: Any) -> str:
        """A description of an MLflow run: a link to its losses in one chart, which its own page cannot show."""
        query = urlencode(
            {
                "runs": json.dumps([run.info.run_id]),
                "experiments": json.dumps([run.info.experiment_id]),
                "metric": json.dumps(LOSS["train"]),
                "plot_metric_keys": json.dumps(list(LOSS.values())),
                "x_axis": "step",
                "workflowType": "machine_learning",
            }
        )
        return f"[Loss of training and validation in one chart](#/metric?{query})"

    def _ui_command(self, file: Path) -> str:
        folder = shlex.quote(str(file.parent))
        store = "" if file.name == "mlflow.db" else f" --backend-store-uri sqlite:///{file.name}"
        return f"cd {folder} && mlflow ui --workers 1{store}"

    def _local(self, uri: str) -> Path | None:
        if self._file is None or not uri.startswith(_PROXY):
            return None
        return self._file.parent / ARTIFACTS / urlparse(uri).path.lstrip("/")


def _copy(path: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, folder / path.name)


def reason_of(error: Exception) -> str:
    """The cause of an error on one short line, without credentials of a URL."""
    text = _CREDENTIALS.sub("//", str(error))
    cause, server = _CAUSE.search(text), _SERVER.search(text)
    if cause is not None and server is not None:
        return f"{server[0]}: {cause[0].lower()}"
    return f"{type(error).__name__}: {(text.strip().splitlines() or [''])[0]}"[:_MAX_REASON]
