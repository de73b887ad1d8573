"""Missing build requirements are named, and ninja in the venv is found."""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest

from muomni.distributed.compiler import add_interpreter_folder, missing_for_compiling


def test_interpreter_folder_is_added_once() -> None:
    environ = {"PATH": "/usr/bin"}
    add_interpreter_folder(environ)
    add_interpreter_folder(environ)
    assert environ["PATH"].split(os.pathsep) == [str(Path(sys.executable).parent), "/usr/bin"]


def test_each_missing_requirement_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    environ = {"PATH": str(tmp_path), "CXX": "g++"}
    for requirement in ("g++", "Python.h", "ninja"):
        assert requirement in (missing_for_compiling(environ) or "")
        (tmp_path / requirement).symlink_to(shutil.which("true") or "")
    assert missing_for_compiling(environ) is None
