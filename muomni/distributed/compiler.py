"""Checks the toolchain for DeepSpeed's shared-memory op, which speeds up CPU ranks on one machine.

DeepSpeed compiles the op at the first start and raises a compiler error if something is missing, although
gloo alone would work.
"""

import os
import shutil
import sys
import sysconfig
from collections.abc import MutableMapping
from pathlib import Path


def add_interpreter_folder(environ: MutableMapping[str, str]) -> None:
    """Prepend the folder of the Python interpreter to PATH, where a venv has ninja.

    It is missing from PATH if the venv is not activated (`.venv/bin/deepspeed ...`).
    """
    folder = str(Path(sys.executable).parent)
    folders = environ.get("PATH", os.defpath).split(os.pathsep)
    if folder not in folders:
        environ["PATH"] = os.pathsep.join([folder, *folders])


def missing_for_compiling(environ: MutableMapping[str, str]) -> str | None:
    """Name a missing requirement for compiling Python extensions, or return None."""
    path = environ.get("PATH", os.defpath)
    compiler = environ.get("CXX", "c++")
    if shutil.which(compiler, path=path) is None:
        return f"a C++ compiler ({compiler}; apt-get install g++)"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python.h (apt-get install python3-dev)"
    if shutil.which("ninja", path=path) is None:
        return "ninja (pip install ninja)"
    return None
