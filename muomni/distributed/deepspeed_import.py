"""Import DeepSpeed without MLflow, which only its autotuner uses.

MLflow would dominate the import with 2 s of CPU time and 115 MB per rank. Rank 0 imports it when it logs.
"""

import sys
from importlib import import_module


def import_deepspeed() -> None:
    """Import DeepSpeed; must be called before any other import of it."""
    hides = not {"mlflow", "deepspeed"} & sys.modules.keys()
    if hides:
        sys.modules["mlflow"] = None  # pyright: ignore[reportArgumentType]
    try:
        import_module("deepspeed")
    finally:
        if hides:
            del sys.modules["mlflow"]
