"""Whether blocks can be compiled here (`training.compile`): asked before a run starts."""

import os
from collections.abc import Mapping
from importlib.util import find_spec

from muomni.distributed.compiler import add_interpreter_folder, missing_for_compiling
from muomni.errors import ConfigError


def check_support(environ: Mapping[str, str], device: str) -> None:
    """Raises ConfigError for a machine that has no compiler."""
    there = {"PATH": environ.get("PATH", os.defpath), **environ}
    add_interpreter_folder(there)
    missing = missing_for_compiling(there)
    if missing is None and device == "cuda" and find_spec("triton") is None:
        missing = "triton (pip install triton)"
    if missing is not None:
        raise ConfigError(
            f"training.compile needs {missing}; install it, or take out training.compile"
        )
