"""Caches shards of remote datasets on a local disk, shared by all processes of a node.

A shard is named by the SHA-256 in its manifest, so different shards never collide. It is downloaded once
per node (under a lock) to a `.part` file, verified, and renamed. A reader holds a shared `flock` on the
tar itself, and a locked tar is never evicted. That lock is not from a library: it ends with the reader's
descriptor, so a shard is protected exactly as long as it is open, also if the process dies.

    FOLDER/shards/SHA256.tar               complete and verified
    FOLDER/shards/SHA256.NUM_BYTES.part    incomplete; the next download appends to it
    FOLDER/shards/SHA256.lock              exists during a download or eviction
    FOLDER/expected/*                      the shards that a process will need next, in order
"""

import errno
import fcntl
import hashlib
import logging
import math
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from muomni.errors import DataError
from muomni.io.file_lock import exclusive_lock, try_exclusive_lock
from muomni.io.remote_folder import RemoteFolder

logger = logging.getLogger(__name__)

_NUM_DOWNLOADS = 3
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class RemoteShard:
    """A tar in a remote folder, as declared in the manifest."""

    path: str
    sha256: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _Entry:
    """A file of the cache: a complete shard, or a part with its final size."""

    path: Path
    sha256: str
    num_bytes: int
    last_use: float


class ShardCache:
    """Caches at most `max_bytes` of shards in `folder`, downloaded from `remote` on first use.

    Only if all shards are open does the cache exceed `max_bytes`, with a warning. Eviction takes the shard
    with the farthest next use according to what all processes `expect`, then the least recently used.
    Downloads request `chunk_bytes` at a time and lose at most one chunk if interrupted. Picklable. Raises
    `DataError` if the folder cannot be used.
    """

    def __init__(
        self, folder: Path, max_bytes: int, remote: RemoteFolder, chunk_bytes: int = 8 << 20
    ) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.remote = remote
        self.chunk_bytes = chunk_bytes
        self._expectation: int | None = None
        try:
            for part in (self._shards, self._expected):
                part.mkdir(parents=True, exist_ok=True)
            with exclusive_lock(self._eviction_lock):
                pass
        except OSError as error:
            raise DataError(
                f"cannot cache shards in {folder} ({error.strerror}); set data.cache_dir to a folder on a "
                "local disk of the node"
            ) from error

    def open(self, shard: RemoteShard) -> int:
        """Open a complete tar, downloading it if needed; it is not evicted while the descriptor is open.

        Raises `DataError` if it cannot be downloaded or does not match the manifest.
        """
        self._check(shard)
        descriptor = self._open_complete(shard)
        while descriptor is None:
            with exclusive_lock(self._lock(shard.sha256)):
                # Another process may have downloaded it while this one waited.
                descriptor = self._open_complete(shard)
                if descriptor is None:
                    self._reserve(shard, -1)
                    self._download(shard)
                    descriptor = self._open_complete(shard)
        return descriptor

    def prefetch(self, shard: RemoteShard, position: int) -> bool:
        """Download a shard that is needed at `position` if there is space; returns whether it is cached.

        Does not evict shards that are needed sooner, and does not wait for locks.
        """
        self._check(shard)
        if self._tar(shard).exists():
            return True
        with try_exclusive_lock(self._lock(shard.sha256)) as is_free:
            if not is_free:
                return False
            if not self._tar(shard).exists():
                if not self._reserve(shard, position):
                    return False
                self._download(shard)
        return True

    def expect(self, shards: Sequence[RemoteShard]) -> None:
        """Announce the shards that this process needs next, soonest first, to all processes of the node."""
        with exclusive_lock(self._eviction_lock):
            if self._expectation is None:
                self._expectation, _ = tempfile.mkstemp(dir=self._expected)
                fcntl.flock(self._expectation, fcntl.LOCK_EX)
            os.ftruncate(self._expectation, 0)
            os.pwrite(self._expectation, "\n".join(s.sha256 for s in shards).encode(), 0)

    def close(self) -> None:
        """Withdraw the announcement of `expect`."""
        if self._expectation is not None:
            os.close(self._expectation)
            self._expectation = None

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_expectation": None}

    # -- paths -------------------------------------------------------------------------------------
    @property
    def _shards(self) -> Path:
        return self.folder / "shards"

    @property
    def _expected(self) -> Path:
        return self.folder / "expected"

    @property
    def _eviction_lock(self) -> Path:
        return self.folder / "eviction.lock"

    def _tar(self, shard: RemoteShard) -> Path:
        return self._shards / f"{shard.sha256}.tar"

    def _part(self, shard: RemoteShard) -> Path:
        return self._shards / f"{shard.sha256}.{shard.num_bytes}.part"

    def _lock(self, sha256: str) -> Path:
        return self._shards / f"{sha256}.lock"

    # -- download ----------------------------------------------------------------------------------
    def _check(self, shard: RemoteShard) -> None:
        url = self.remote.url_of(shard.path)
        if not _SHA256.fullmatch(shard.sha256):  # it becomes a file name
            raise DataError(f"the manifest has no SHA-256 of {url}; rebuild the dataset")
        if shard.num_bytes > self.max_bytes:
            raise DataError(
                f"{url} has {shard.num_bytes / 1e9:.3g} GB, more than data.cache_gb="
                f"{self.max_bytes / 1e9:g}; raise data.cache_gb"
            )

    def _open_complete(self, shard: RemoteShard) -> int | None:
        path = self._tar(shard)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if not _is_linked(descriptor, path):  # evicted between the two calls
            os.close(descriptor)
            return None
        os.utime(descriptor)  # the last use, for eviction
        return descriptor

    def _download(self, shard: RemoteShard) -> None:
        """Download and verify a tar; the caller holds its lock."""
        part = self._part(shard)
        for _ in range(_NUM_DOWNLOADS):
            try:
                digest = self._complete_part(shard, part)
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    part.unlink(missing_ok=True)
                raise DataError(
                    f"cannot write {part} ({error.strerror}); lower data.cache_gb or set data.cache_dir to "
                    "a larger disk"
                ) from error
            if digest == shard.sha256:
                os.replace(part, self._tar(shard))
                return
            part.unlink()
        raise DataError(
            f"{self.remote.url_of(shard.path)} does not match its manifest (SHA-256 {digest}, expected "
            f"{shard.sha256}); copy the dataset there again"
        )

    def _complete_part(self, shard: RemoteShard, part: Path) -> str:
        """Download the missing rest of a part; returns the SHA-256 of the complete file."""
        digest = hashlib.sha256()
        with part.open("a+b") as file:
            file.seek(0)
            while chunk := file.read(self.chunk_bytes):
                digest.update(chunk)
            while (start := file.tell()) < shard.num_bytes:
                end = min(start + self.chunk_bytes, shard.num_bytes)
                chunk = self.remote.read_range(shard.path, start, end)
                file.write(chunk)
                digest.update(chunk)
            file.flush()
            os.fsync(file.fileno())
        return digest.hexdigest()

    # -- eviction ----------------------------------------------------------------------------------
    def _reserve(self, shard: RemoteShard, position: int) -> bool:
        """Reserve space for a shard by evicting others and creating its part, which counts in full.

        Returns False if there is no space. A shard that is needed now (position -1) always gets space.
        """
        with exclusive_lock(self._eviction_lock):
            entries = [entry for entry in self._entries() if entry.sha256 != shard.sha256]
            excess = sum(entry.num_bytes for entry in entries) + shard.num_bytes - self.max_bytes
            if excess > 0:
                excess -= self._evict(entries, excess, position)
            if excess > 0:
                if position >= 0:
                    return False
                logger.warning(
                    "the shard cache %s exceeds data.cache_gb by %.3g GB (limit %g) because all of its shards "
                    "are open; raise data.cache_gb", self.folder, excess / 1e9, self.max_bytes / 1e9,
                )  # fmt: skip
            self._part(shard).touch()
        return True

    def _evict(self, entries: list[_Entry], num_bytes: int, position: int) -> int:
        """Remove `num_bytes` or more of shards that are not open and not needed before `position`, if possible.

        Returns the number of bytes freed.
        """
        next_use = self._next_uses()

        def order(entry: _Entry) -> tuple[float, float]:
            return (-next_use.get(entry.sha256, math.inf), entry.last_use)

        freed = 0
        for entry in sorted(entries, key=order):
            if freed >= num_bytes or next_use.get(entry.sha256, math.inf) <= position:
                break
            if self._remove(entry):
                freed += entry.num_bytes
        return freed

    def _remove(self, entry: _Entry) -> bool:
        """Unlink a shard or part unless it is open or being downloaded; returns whether it was removed."""
        with try_exclusive_lock(self._lock(entry.sha256)) as is_free:
            if not is_free:
                return False
            try:
                descriptor = os.open(entry.path, os.O_RDONLY)
            except FileNotFoundError:  # a part that was completed since it was listed
                return False
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                entry.path.unlink()
            except BlockingIOError:
                return False
            finally:
                os.close(descriptor)
        return True

    def _entries(self) -> list[_Entry]:
        found = []
        with os.scandir(self._shards) as files:
            for file in files:
                path = Path(file.path)
                if path.suffix not in (".tar", ".part"):
                    continue
                try:
                    status = file.stat()
                except FileNotFoundError:  # a part that was just renamed or removed
                    continue
                num_bytes = status.st_size
                if path.suffix == ".part":
                    num_bytes = int(path.suffixes[0][1:])
                found.append(_Entry(path, path.name.split(".")[0], num_bytes, status.st_mtime))
        return found

    def _next_uses(self) -> dict[str, int]:
        """Position of the next use of each shard that a running process expects."""
        soonest: dict[str, int] = {}
        for path in self._expected.iterdir():
            with path.open("rb") as file:
                if self._is_abandoned(file.fileno()):
                    path.unlink()
                    continue
                for position, sha256 in enumerate(file.read().decode().splitlines()):
                    soonest[sha256] = min(position, soonest.get(sha256, position))
        return soonest

    @staticmethod
    def _is_abandoned(descriptor: int) -> bool:
        """Whether the process that wrote this expectation has ended."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _is_linked(descriptor: int, path: Path) -> bool:
    """Whether `path` still names the open file."""
    try:
        named = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), named)
