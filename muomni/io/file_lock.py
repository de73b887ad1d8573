"""Exclusive locks between the processes of a node. The lock file exists only while the lock is in use.

The kernel releases the lock of a process that dies, and the next holder reuses the file it leaves.
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

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
def exclusive_lock_if_supported(path: Path, blocking: bool = True) -> Iterator[None]:
    """`exclusive_lock`, or no lock where it cannot be taken: some cluster file systems have no locks.

    Raises `filelock.Timeout` if it is held and not `blocking`.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive_lock(path, blocking))
        except Timeout:
            raise
        except OSError as error:
            logger.info("no lock on %s (%s)", path, error)
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
