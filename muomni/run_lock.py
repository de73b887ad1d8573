"""Keeps a second run out of a folder that a live process trains in.

`owner.json` names the process; it is renewed while the process lives. A dead process of this machine is found
by its process id. One of another machine or container is dead if its file is not renewed for a minute.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from muomni.errors import ConfigError
from muomni.io.atomic_write import write_atomic
from muomni.io.file_lock import exclusive_lock_if_supported

logger = logging.getLogger(__name__)

OWNER_FILE = "owner.json"
_RENEW_S, _WATCH_S = 15.0, 60.0
_POLL_S = 1.0
_STALE_S = 600.0  # older files are not watched; clocks of machines may differ by some minutes
_CLOCK_TOLERANCE_S = 5.0  # of the start time of a process, when the clock is adjusted


@dataclass(frozen=True, slots=True)
class Owner:
    """A process; `place` identifies machine, boot, and container, `start_s` is in seconds since 1970."""

    host: str
    pid: int
    start_s: float
    place: str

    def __str__(self) -> str:
        start = time.strftime("%F %T", time.localtime(self.start_s))
        return f"{self.pid} on {self.host}, started {start}"


@contextmanager
def held_by_this_process(folder: Path) -> Iterator[None]:
    """Hold `folder` within the block; raises ConfigError that names a live owner."""
    path, own = folder / OWNER_FILE, _this_process()
    with exclusive_lock_if_supported(folder / f".{OWNER_FILE}.lock"):
        owner = _read(path)
        if owner is not None and owner != own and _is_alive(owner, path):
            raise ConfigError(
                f"run folder {folder} is in use by process {owner}; wait for it, stop it, or choose "
                f"another --run"
            )
        write_atomic(path, json.dumps(asdict(own)).encode())
    is_over = threading.Event()
    threading.Thread(target=_renew, args=(path, is_over), daemon=True).start()
    try:
        yield
    finally:
        is_over.set()
        if _read(path) == own:
            with suppress(OSError):  # a file that is left behind names a dead process
                path.unlink()


def free_folders(run: Path) -> list[Path]:
    """Folders below `run` that no process holds, as far as that is known without waiting."""
    return [folder for folder in sorted(run.iterdir()) if folder.is_dir() and _is_free(folder)]


def _is_free(folder: Path) -> bool:
    path = folder / OWNER_FILE
    owner = _read(path)
    if owner is None:
        return not path.exists()
    if owner.place == _this_process().place:
        return not _is_alive(owner, path)
    renewed_s = _renewed_s(path)
    return renewed_s is None or time.time() - renewed_s > _STALE_S


def _this_process() -> Owner:
    process = psutil.Process()
    parts = [socket.gethostname()]
    with suppress(OSError):  # systems other than Linux
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return Owner(parts[0], process.pid, process.create_time(), " ".join(parts))


def _read(path: Path) -> Owner | None:
    try:
        return Owner(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # absent, or not written by this module
        return None


def _is_alive(owner: Owner, path: Path) -> bool:
    if owner.place == _this_process().place:
        try:
            process = psutil.Process(owner.pid)
            is_same = abs(process.create_time() - owner.start_s) < _CLOCK_TOLERANCE_S
            return is_same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False
    before = _renewed_s(path)
    if before is None or time.time() - before > _STALE_S:
        return False
    logger.warning("waiting %.0f s to see whether process %s is alive", _WATCH_S, owner)
    end = time.monotonic() + _WATCH_S
    while time.monotonic() < end:
        time.sleep(_POLL_S)
        now = _renewed_s(path)
        if now != before:
            return now is not None  # the file is gone once its owner has ended
    return False


def _renewed_s(path: Path) -> float | None:
    """When the file was renewed. Opening it makes network file systems ask their server."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return None


def _renew(path: Path, is_over: threading.Event) -> None:
    while not is_over.wait(_RENEW_S):
        with suppress(OSError):  # a short failure of a network file system
            os.utime(path)
