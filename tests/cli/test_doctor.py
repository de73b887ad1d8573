"""launch/doctor.py: each problem is one line with its remedy and sets the exit code."""

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


def results(checks: Iterator[doctor.Check]) -> dict[str, str]:
    """The message of each check, keyed by name."""
    messages = {}
    for check in checks:
        try:
            messages[check.name] = check.look()
        except MuomniError as error:
            messages[check.name] = f"failed: {error}"
    return messages


def test_this_machine_passes(text_data: Path) -> None:
    command = [sys.executable, str(ROOT / "launch" / "doctor.py"), "--data", str(text_data)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert all(line.startswith("ok      ") for line in lines)
    assert f"ok      data {text_data / 'text'}: text, train 400, val 40" in lines
    assert "ok      tokenizer: 330 pieces" in lines


def test_truncated_shard_is_detected(text_data: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(text_data, tmp_path / "copy")
    tar = next((copy / "text" / "train").glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-512])
    messages = results(doctor.data_checks(copy))
    assert messages[f"data {copy / 'text'}"].startswith("failed: 1 problems, the first: ")
    assert tar.name in messages[f"data {copy / 'text'}"]


def test_missing_dataset_and_tokenizer_name_the_remedy(text_data: Path, tmp_path: Path) -> None:
    assert "contains no dataset; create one with python -m data_prep" in results(
        doctor.data_checks(tmp_path / "nowhere")
    ).get("data", "")
    shutil.copytree(text_data / "text", tmp_path / "text")
    assert "tokenizer.model" in results(doctor.data_checks(tmp_path))["tokenizer"]


def test_export_of_another_tokenizer_is_detected(
    text_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "codec" / "export").mkdir(parents=True)
    messages = results(doctor.run_checks(tmp_path, text_data))
    assert "no export of stage codec" in messages.pop("export codec") and not messages
    export = SimpleNamespace(
        tokenizer_digest="other", tokenizer_file="T", content={"step": 3, "preset": "nano"}
    )
    monkeypatch.setattr("muomni.checkpoint.export.read_export", lambda path, stage: export)
    messages = results(doctor.run_checks(tmp_path, text_data))
    assert "its tokenizer differs from" in messages["export codec"]
    assert results(doctor.run_checks(tmp_path, None))["export codec"] == "step 3, preset nano"


def test_full_disk_and_small_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(total=64 * 2**20, free=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(MachineError, match=r"1.0 GB free, but checkpoints need 5 GB; free some"):
        doctor.check_disk(tmp_path / "runs" / "new")
    with pytest.raises(MachineError, match=r"/dev/shm has 67 MB.*--shm-size=8g"):
        doctor.check_shared_memory()


def test_unresolvable_host_name_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "nobody.invalid")
    with pytest.raises(MachineError, match=r"'nobody.invalid' has no address.*/etc/hosts"):
        doctor.check_host_name()


def test_gpus_that_torch_cannot_use_are_reported_even_after_deepspeed_was_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    doctor.check_deepspeed()
    with pytest.raises(MachineError, match="there are GPUs"):
        doctor.check_devices()


def test_missing_packages_and_compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("json", "no_such_package"))
    with pytest.raises(MachineError, match=r"no_such_package cannot be imported .*make install"):
        doctor.check_packages()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MachineError, match="cannot be compiled here; install a C"):
        doctor.check_compiler()


def test_exit_code_is_from_the_first_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(error: Exception) -> str:
        raise error

    checks = [
        doctor.Check("one", lambda: "fine"),
        doctor.Check("two", lambda: fail(DataError("broken; fix it"))),
        doctor.Check("three", lambda: fail(MachineError("small; enlarge it"))),
    ]
    monkeypatch.setattr(doctor, "checks", lambda arguments: iter(checks))
    with pytest.raises(SystemExit) as exit_info:
        doctor.run(argparse.Namespace())
    assert exit_info.value.code == DataError.exit_code
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "ok      one: fine",
        "failed  two: broken; fix it",
        "failed  three: small; enlarge it",
    ]
