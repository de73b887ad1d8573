"""Ranks start without MLflow, and can import it afterward."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROBE = """
import sys
from muomni.distributed.deepspeed_import import import_deepspeed
import_deepspeed()
import muomni.training.engine.engine, muomni.training.session
print(any(name.partition(".")[0] == "mlflow" for name in sys.modules))
import mlflow
print(bool(mlflow.MlflowClient))
"""


def test_mlflow_is_imported_only_when_it_is_asked_for() -> None:
    outcome = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert outcome.stdout.splitlines()[-2:] == ["False", "True"], outcome.stderr
