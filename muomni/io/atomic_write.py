"""Atomic file writes: write a temporary file, sync, and rename.

Readers never see a partial file under its final name, even after a kill or on a full disk.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` that is renamed to `path` if the block ends without error.

    The temporary name contains host and process id, so concurrent writers of one path use different
    files; the last rename wins. On an exception, the temporary file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{socket.gethostname()}-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Write the entries of a folder to the disk, so that its files keep their names after a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically."""
    with open_atomic(path) as file:
        file.write(content)
