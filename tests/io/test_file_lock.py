"""Exclusive locks: exclusion between processes and threads, removal of the file, death of the owner."""

import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
from filelock import Timeout

from muomni.io import file_lock
from muomni.io.file_lock import exclusive_lock, exclusive_lock_if_supported, try_exclusive_lock

_SPAWN = multiprocessing.get_context("spawn")


def _hold(path: Path, is_held: Event) -> None:
    with exclusive_lock(path):
        is_held.set()
        time.sleep(60)


def _count_up(lock: Path, counter: Path, num_times: int) -> None:
    for _ in range(num_times):
        with exclusive_lock(lock):
            number = int(counter.read_text())
            time.sleep(0.001)
            counter.write_text(str(number + 1))


def test_one_holder_at_a_time_although_the_file_is_removed(tmp_path: Path) -> None:
    lock, counter = tmp_path / "lock", tmp_path / "counter"
    counter.write_text("0")
    processes = [_SPAWN.Process(target=_count_up, args=(lock, counter, 40)) for _ in range(2)]
    threads = [threading.Thread(target=_count_up, args=(lock, counter, 40)) for _ in range(2)]
    for each in (*processes, *threads):
        each.start()
    for each in (*processes, *threads):
        each.join()
    assert counter.read_text() == "160"
    assert not lock.exists()


def test_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    lock, is_held = tmp_path / "lock", _SPAWN.Event()
    process = _SPAWN.Process(target=_hold, args=(lock, is_held))
    process.start()
    assert is_held.wait(60) and process.pid is not None
    with try_exclusive_lock(lock) as is_free:
        assert not is_free
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert lock.exists()
    with try_exclusive_lock(lock) as is_free:
        assert is_free
    assert not lock.exists()


def test_lock_is_released_on_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), exclusive_lock(tmp_path / "lock"):
        raise KeyError
    with try_exclusive_lock(tmp_path / "lock") as is_free:
        assert is_free


def test_file_systems_without_locks_run_unlocked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(file_lock, "FileLock", refuse)
    with exclusive_lock_if_supported(tmp_path / "lock"):
        assert not (tmp_path / "lock").exists()
    with pytest.raises(OSError, match="no locks"), exclusive_lock(tmp_path / "lock"):
        pass


def test_a_held_lock_is_not_taken_for_a_missing_one(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with (
        exclusive_lock(lock),
        pytest.raises(Timeout),
        exclusive_lock_if_supported(lock, blocking=False),
    ):
        pass
