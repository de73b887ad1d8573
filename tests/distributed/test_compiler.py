"""Missing build requirements are named, and ninja in the venv is found."""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest

from muomni.distributed import compiler
from muomni.distributed.compiler import (
    add_interpreter_folder,
    missing_for_compiling,
    should_compile,
)


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


def test_auto_compiles_on_gpus_whose_machine_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "missing_for_compiling", lambda _: None)
    monkeypatch.setattr(compiler, "find_spec", lambda _: "triton")

    def auto(device: str, zero_stage: int = 1) -> bool:
        return should_compile("auto", {}, device, zero_stage)

    assert auto("cuda") and not auto("cpu") and not auto("cuda", zero_stage=3)
    assert should_compile(True, {}, "cpu", 3) and not should_compile(False, {}, "cuda", 1)
    monkeypatch.setattr(compiler, "find_spec", lambda _: None)
    assert not auto("cuda")
    monkeypatch.setattr(compiler, "find_spec", lambda _: "triton")
    monkeypatch.setattr(compiler, "missing_for_compiling", lambda _: "g++")
    assert not auto("cuda")
