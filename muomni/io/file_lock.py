"""Exclusive locks between the processes of a node. The lock file exists only while the lock is in use.

The kernel releases the lock of a process that dies, and the next holder reuses the file it leaves.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

_POLL_S = 0.01


@contextmanager
def exclusive_lock(path: Path, blocking: bool = True) -> Iterator[None]:
    """Hold the lock `path`; raises `filelock.Timeout` if it is held and not `blocking`.

    Raises OSError if the file cannot be created or its file system has no locks.
    """
    # Without `fallback_to_soft=False`, a file system without flock gets locks that outlive their owner.
    with FileLock(path, blocking=blocking, poll_interval=_POLL_S, fallback_to_soft=False):
        try:
            yield
        finally:
            path.unlink()  # while held: filelock retries if the file it locked has no name


@contextmanager
def exclusive_lock_if_supported(path: Path) -> Iterator[None]:
    """`exclusive_lock`, or no lock if it raises OSError: some cluster file systems have no locks."""
    with ExitStack() as stack:
        with suppress(OSError):
            stack.enter_context(exclusive_lock(path))
        yield


@contextmanager
def try_exclusive_lock(path: Path) -> Iterator[bool]:
    """Hold the lock `path` if it is free; yields whether it is held."""
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive_lock(path, blocking=False))
        except Timeout:
            is_held = False
        else:
            is_held = True
        yield is_held
