"""Checks for a C++ compiler, which DeepSpeed's shared-memory op and torch.compile need.

DeepSpeed builds the op at the first start and fails with a compiler traceback when something is missing,
although gloo alone would work. These checks run first.
"""

import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping, MutableMapping
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from muomni.errors import ConfigError


def add_interpreter_folder(environ: MutableMapping[str, str]) -> None:
    """Put the folder of the running Python first on PATH: a venv keeps ninja there.

    Without activation (`.venv/bin/deepspeed ...`) PATH lacks it.
    """
    folder = str(Path(sys.executable).parent)
    folders = environ.get("PATH", os.defpath).split(os.pathsep)
    if folder not in folders:
        environ["PATH"] = os.pathsep.join([folder, *folders])


def missing_for_compiling(environ: Mapping[str, str]) -> str | None:
    """Name what this machine lacks to compile a Python extension, or return None."""
    path = environ.get("PATH", os.defpath)
    compiler = environ.get("CXX", "c++")
    if shutil.which(compiler, path=path) is None:
        return f"a C++ compiler ({compiler}; apt-get install g++)"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python.h (apt-get install python3-dev)"
    if shutil.which("ninja", path=path) is None:
        return "ninja (pip install ninja)"
    return None


def should_compile(
    wanted: bool | Literal["auto"], environ: Mapping[str, str], device: str, zero_stage: int
) -> bool:
    """Resolve `training.compile`.

    `auto` compiles on GPUs if this machine can. Under ZeRO 3 it does not: the hooks that gather weights
    break the graph at every layer.
    """
    if wanted == "auto":
        return device == "cuda" and zero_stage < 3 and _missing_on(environ, device) is None
    return wanted


def extensions_folder(environ: Mapping[str, str]) -> Path:
    """Where torch keeps compiled extensions."""
    cache = environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME", "/"), ".cache")
    return Path(environ.get("TORCH_EXTENSIONS_DIR") or Path(cache, "torch_extensions"))


def missing_for_extensions(environ: Mapping[str, str]) -> str | None:
    """Name what this machine lacks to compile and keep a Python extension, or return None."""
    folder = extensions_folder(environ)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"a writable folder for extensions ({error}; set HOME or TORCH_EXTENSIONS_DIR)"
    return missing_for_compiling(environ)


def check_support(environ: Mapping[str, str], device: str) -> None:
    """Raise ConfigError if `training.compile` cannot work on this machine."""
    missing = _missing_on(environ, device)
    if missing is not None:
        raise ConfigError(
            f"training.compile needs {missing}; install it, or remove training.compile"
        )


def _missing_on(environ: Mapping[str, str], device: str) -> str | None:
    """Name what this machine lacks to compile models for `device`, or return None."""
    extended = {"PATH": environ.get("PATH", os.defpath), **environ}
    add_interpreter_folder(extended)
    missing = missing_for_compiling(extended)
    if missing is None and device == "cuda" and find_spec("triton") is None:
        return "triton (pip install triton)"
    return missing
