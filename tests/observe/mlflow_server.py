"""A real MLflow server in this process that fails as told."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import pytest


class _Server(ThreadingMixIn, WSGIServer):
    """Closing it waits for its requests: MLflow's handlers change the environment of this process."""

    daemon_threads = False


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""


@dataclass(slots=True)
class Faults:
    """What happens to requests whose path contains `only`."""

    status: int | None = None  # of the answer; None: the right answer
    delay_s: float = 0.0
    only: str = ""
    num_failed: int = 0


@contextmanager
def mlflow_server(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[tuple[str, Faults]]:
    """Serve the SQLite store `folder/mlflow.db`; yields the URL and the faults to set."""
    mlflow: Any = import_module("mlflow.server")
    patch.setenv(mlflow.BACKEND_STORE_URI_ENV_VAR, f"sqlite:///{folder / 'mlflow.db'}")
    patch.setenv(mlflow.ARTIFACT_ROOT_ENV_VAR, "mlflow-artifacts:/")
    patch.setenv(mlflow.ARTIFACTS_DESTINATION_ENV_VAR, str(folder / "mlartifacts"))
    patch.setenv(mlflow.SERVE_ARTIFACTS_ENV_VAR, "true")
    for name in ("_tracking_store", "_model_registry_store", "_artifact_repo"):
        patch.setattr(mlflow.handlers, name, None)
    faults, closing = Faults(), threading.Event()

    def serve(environ: dict[str, Any], start_response: Any) -> Any:
        if faults.only in environ["PATH_INFO"]:
            is_closing = closing.wait(faults.delay_s)
            status = 503 if is_closing else faults.status
            if status is not None:
                faults.num_failed += 1
                start_response(f"{status} fault", [("Content-Type", "text/plain")])
                return [b"fault"]
        return mlflow.app(environ, start_response)

    server = make_server("127.0.0.1", 0, serve, _Server, _Quiet)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", faults
    finally:
        closing.set()
        server.shutdown()
        server.server_close()
