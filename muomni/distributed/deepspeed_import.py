"""Imports DeepSpeed without MLflow, which only its autotuner uses.

That would be most of the import: 2 s of a core and 115 MB in each rank. Rank 0 imports MLflow when it logs.
"""

import sys
from importlib import import_module


def import_deepspeed() -> None:
    """Import DeepSpeed; to be called before anything else does."""
    hides = not {"mlflow", "deepspeed"} & sys.modules.keys()
    if hides:
        sys.modules["mlflow"] = None  # pyright: ignore[reportArgumentType]
    try:
        import_module("deepspeed")
    finally:
        if hides:
            del sys.modules["mlflow"]
