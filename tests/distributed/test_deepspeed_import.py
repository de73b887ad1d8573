"""DeepSpeed is imported without MLflow, which can be imported later."""

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


def test_deepspeed_does_not_import_mlflow() -> None:
    outcome = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert outcome.stdout.splitlines()[-2:] == ["False", "True"], outcome.stderr
