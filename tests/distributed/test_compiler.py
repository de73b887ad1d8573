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
    extensions_folder,
    missing_for_compiling,
    missing_for_extensions,
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


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"HOME": "/home/me"}, "/home/me/.cache/torch_extensions"),
        ({"HOME": "/home/me", "XDG_CACHE_HOME": "/cache"}, "/cache/torch_extensions"),
        ({"TORCH_EXTENSIONS_DIR": "/extensions"}, "/extensions"),
    ],
)
def test_folder_of_extensions(environ: dict[str, str], folder: str) -> None:
    assert extensions_folder(environ) == Path(folder)


def test_without_a_home_folder_no_extension_can_be_kept(tmp_path: Path) -> None:
    assert "set HOME or TORCH_EXTENSIONS_DIR" in (
        missing_for_extensions({"HOME": "/proc/nohome"}) or ""
    )
    (tmp_path / "file").touch()
    blocked = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path / "file" / "extensions")}
    assert "Not a directory" in (missing_for_extensions(blocked) or "")
    blocked["TORCH_EXTENSIONS_DIR"] = str(tmp_path / "new")
    assert missing_for_extensions(blocked) == missing_for_compiling(os.environ)
