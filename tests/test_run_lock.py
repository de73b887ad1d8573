"""A run folder in use is refused; that of a dead owner is taken over."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from muomni import run_lock
from muomni.errors import ConfigError
from muomni.run_lock import OWNER_FILE, free_folders, held_by_this_process

ROOT = Path(__file__).resolve().parents[1]
HOLDER = """
import sys, time
from pathlib import Path
from muomni.run_lock import held_by_this_process
with held_by_this_process(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds the folder until its input ends."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_folder_in_use_is_refused_with_its_owner(
    holder: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    today = time.strftime("%F")
    message = rf"run folder .* is in use by process {holder.pid} on \S+, started {today} \d\d:\d\d"
    with pytest.raises(ConfigError, match=message), held_by_this_process(tmp_path):
        pass
    holder.communicate("")
    with held_by_this_process(tmp_path):
        assert (tmp_path / OWNER_FILE).exists()
    assert not (tmp_path / OWNER_FILE).exists()


def test_the_folder_of_a_killed_process_is_taken_over(
    holder: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    holder.kill()
    holder.wait()
    assert (tmp_path / OWNER_FILE).exists()
    with held_by_this_process(tmp_path):
        assert json.loads((tmp_path / OWNER_FILE).read_text())["pid"] == os.getpid()


def test_folders_of_dead_processes_are_free(tmp_path: Path) -> None:
    own = run_lock._this_process()
    owners = {
        "alive": own,
        "dead": replace(own, start_s=own.start_s - 100),
        "elsewhere": replace(own, place="another machine"),
        "elsewhere_long_ago": replace(own, place="another machine"),
    }
    for name, owner in owners.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / OWNER_FILE).write_text(json.dumps(asdict(owner)))
    os.utime(tmp_path / "elsewhere_long_ago" / OWNER_FILE, (0, time.time() - 700))
    for name in ("ended", "damaged"):
        (tmp_path / name).mkdir()
    (tmp_path / "damaged" / OWNER_FILE).write_text("[]")
    (tmp_path / "mlflow.json").touch()
    assert [path.name for path in free_folders(tmp_path)] == ["dead", "elsewhere_long_ago", "ended"]


def test_a_reused_process_id_is_not_the_owner(tmp_path: Path) -> None:
    own = run_lock._this_process()
    other = replace(own, start_s=own.start_s - 100)
    (tmp_path / OWNER_FILE).write_text(json.dumps(asdict(other)))
    with held_by_this_process(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "[]", "{}", "null"])
def test_a_damaged_file_names_no_owner(content: str, tmp_path: Path) -> None:
    (tmp_path / OWNER_FILE).write_text(content)
    with held_by_this_process(tmp_path):
        pass


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The owner file of a process on another machine."""
    monkeypatch.setattr(run_lock, "_WATCH_S", 0.5)
    monkeypatch.setattr(run_lock, "_POLL_S", 0.05)
    owner = replace(run_lock._this_process(), host="node7", place="node7", pid=1)
    path = tmp_path / OWNER_FILE
    path.write_text(json.dumps(asdict(owner)))
    return path


def test_a_process_elsewhere_is_alive_while_it_renews_its_file(elsewhere: Path) -> None:
    renewals = threading.Timer(0.2, os.utime, (elsewhere,))
    renewals.start()
    with (
        pytest.raises(ConfigError, match="in use by process 1 on node7"),
        held_by_this_process(elsewhere.parent),
    ):
        pass
    renewals.join()


def test_a_process_elsewhere_is_dead_once_its_file_is_not_renewed(elsewhere: Path) -> None:
    start_s = time.monotonic()
    with held_by_this_process(elsewhere.parent):
        assert time.monotonic() - start_s >= 0.5  # it was given time to renew the file
    elsewhere.write_text(json.dumps(asdict(replace(run_lock._this_process(), place="node7"))))
    hours_ago = time.time() - 7200
    os.utime(elsewhere, (hours_ago, hours_ago))
    start_s = time.monotonic()
    with held_by_this_process(elsewhere.parent):
        assert time.monotonic() - start_s < 0.5


def test_the_owner_renews_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_RENEW_S", 0.02)
    with held_by_this_process(tmp_path):
        path = tmp_path / OWNER_FILE
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 5
        while path.stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_file_of_a_new_owner_stays(tmp_path: Path) -> None:
    with held_by_this_process(tmp_path):
        taken = replace(run_lock._this_process(), pid=1)
        (tmp_path / OWNER_FILE).write_text(json.dumps(asdict(taken)))
    assert (tmp_path / OWNER_FILE).exists()
