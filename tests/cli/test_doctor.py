"""launch/doctor.py: each lack is one line that says what to do, and the exit code tells."""

import argparse
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from muomni.cli import doctor
from muomni.errors import DataError, MachineError, MuomniError

ROOT = Path(__file__).resolve().parents[2]


def looks(checks: Iterator[doctor.Check]) -> dict[str, str]:
    """What each check says."""
    said = {}
    for check in checks:
        try:
            said[check.name] = check.look()
        except MuomniError as error:
            said[check.name] = f"failed: {error}"
    return said


def test_this_machine_is_fit(data: Path) -> None:
    command = [sys.executable, str(ROOT / "launch" / "doctor.py"), "--data", str(data)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert all(line.startswith("ok      ") for line in lines)
    assert f"ok      data {data / 'text'}: text, train 400, val 40" in lines
    assert "ok      tokenizer: 330 pieces" in lines


def test_a_cut_shard_is_found(data: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(data, tmp_path / "copy")
    tar = next((copy / "text" / "train").glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-512])
    said = looks(doctor.data_checks(copy))
    assert said[f"data {copy / 'text'}"].startswith("failed: 1 problems, the first: ")
    assert tar.name in said[f"data {copy / 'text'}"]


def test_no_dataset_and_no_tokenizer_say_what_to_do(data: Path, tmp_path: Path) -> None:
    assert "holds no dataset; make one with python -m data_prep" in looks(
        doctor.data_checks(tmp_path / "nowhere")
    ).get("data", "")
    shutil.copytree(data / "text", tmp_path / "text")
    assert "tokenizer.model" in looks(doctor.data_checks(tmp_path))["tokenizer"]


def test_an_export_of_another_tokenizer_is_found(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "codec" / "export").mkdir(parents=True)
    said = looks(doctor.run_checks(tmp_path, data))
    assert "no export of stage codec" in said.pop("export codec") and not said
    export = SimpleNamespace(
        tokenizer_digest="other", tokenizer_file="T", content={"step": 3, "preset": "nano"}
    )
    monkeypatch.setattr("muomni.checkpoint.export.read_export", lambda path, stage: export)
    said = looks(doctor.run_checks(tmp_path, data))
    assert "with another tokenizer than" in said["export codec"]
    assert looks(doctor.run_checks(tmp_path, None))["export codec"] == "step 3, preset nano"


def test_full_disks_and_small_shared_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(total=64 * 2**20, free=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(MachineError, match=r"1.0 GB free, checkpoints want 5 GB; make room"):
        doctor.check_disk(tmp_path / "runs" / "new")
    with pytest.raises(MachineError, match=r"/dev/shm has 67 MB.*--shm-size=8g"):
        doctor.check_shared_memory()


def test_a_nameless_host_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "nobody.invalid")
    with pytest.raises(MachineError, match=r"'nobody.invalid' has no address.*/etc/hosts"):
        doctor.check_host_name()


def test_missing_packages_and_compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("json", "no_such_package"))
    with pytest.raises(MachineError, match=r"no_such_package cannot be imported .*make install"):
        doctor.check_packages()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MachineError, match="cannot be compiled here; install a C"):
        doctor.check_compiler()


def test_the_exit_code_is_that_of_the_first_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(error: Exception) -> str:
        raise error

    checks = [
        doctor.Check("one", lambda: "fine"),
        doctor.Check("two", lambda: fail(DataError("broken; mend it"))),
        doctor.Check("three", lambda: fail(MachineError("small; grow it"))),
    ]
    monkeypatch.setattr(doctor, "checks", lambda arguments: iter(checks))
    with pytest.raises(SystemExit) as exit_info:
        doctor.run(argparse.Namespace())
    assert exit_info.value.code == DataError.exit_code
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "ok      one: fine",
        "failed  two: broken; mend it",
        "failed  three: small; grow it",
    ]
