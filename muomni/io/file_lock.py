"""Locks between the processes of a node: `flock` on a file that exists while somebody holds it.

The kernel frees the lock of a process that dies, so nothing has to be repaired after a kill; the empty
file that a killed holder leaves is taken over by the next one.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path


def is_linked(descriptor: int, path: Path) -> bool:
    """Whether `path` still names the open file."""
    try:
        named = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), named)


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Hold the lock called `path`, waiting for other holders."""
    while (descriptor := _acquire(path, fcntl.LOCK_EX)) is None:
        continue
    try:
        yield
    finally:
        _release(descriptor, path)


@contextmanager
def lock_if_possible(path: Path) -> Iterator[None]:
    """`exclusive_lock` where the file system has locks; some of clusters have none, and nobody waits there."""
    with ExitStack() as stack:
        with suppress(OSError):
            stack.enter_context(exclusive_lock(path))
        yield


@contextmanager
def try_exclusive_lock(path: Path) -> Iterator[bool]:
    """Hold the lock called `path` if it is free; yields whether it was."""
    descriptor = _acquire(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            _release(descriptor, path)


def _acquire(path: Path, operation: int) -> int | None:
    """A locked descriptor; None when the lock is held, or its file was removed meanwhile."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, operation)
        if is_linked(descriptor, path):
            return descriptor
    except BlockingIOError:
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _release(descriptor: int, path: Path) -> None:
    # Removed while still held: whoever waits notices that its file has no name and opens a new one.
    os.unlink(path)
    os.close(descriptor)
