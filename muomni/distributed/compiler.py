"""What DeepSpeed needs to compile its shared-memory op, which speeds up ranks on one CPU machine.

It compiles at the first start and dies with a compiler's traceback when something is missing, although
gloo alone would do. So it is asked here first.
"""

import os
import shutil
import sys
import sysconfig
from collections.abc import MutableMapping
from pathlib import Path


def add_interpreter_folder(environ: MutableMapping[str, str]) -> None:
    """Put the folder of the running Python first on PATH: a venv has its ninja there.

    Without activation (`.venv/bin/deepspeed ...`) PATH does not know it.
    """
    folder = str(Path(sys.executable).parent)
    folders = environ.get("PATH", os.defpath).split(os.pathsep)
    if folder not in folders:
        environ["PATH"] = os.pathsep.join([folder, *folders])


def missing_for_compiling(environ: MutableMapping[str, str]) -> str | None:
    """Name what this machine lacks to compile an extension of Python, or return None."""
    path = environ.get("PATH", os.defpath)
    compiler = environ.get("CXX", "c++")
    if shutil.which(compiler, path=path) is None:
        return f"a C++ compiler ({compiler}; apt-get install g++)"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python.h (apt-get install python3-dev)"
    if shutil.which("ninja", path=path) is None:
        return "ninja (pip install ninja)"
    return None
