"""Shards of remote datasets on a local disk, shared by all processes of a node.

A shard is named by the SHA-256 that its manifest gives, so shards of equal names never mix. It is
downloaded once for all processes (a lock each), beside its place, checked, and renamed. Whoever reads
it holds a shared `flock` on it, which the kernel frees at the latest when the process ends; a shard
that is locked so is never evicted.

    FOLDER/shards/SHA256.tar               complete and checked
    FOLDER/shards/SHA256.NUM_BYTES.part    unfinished; the next download goes on at its end
    FOLDER/shards/SHA256.lock              while somebody downloads or evicts it
    FOLDER/expected/*                      which shards a process will need next, in order
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
    """A tar below a remote folder as its manifest describes it."""

    path: str
    sha256: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _Entry:
    """A file of the cache: a complete shard, or a part with the bytes that it will have."""

    path: Path
    sha256: str
    num_bytes: int
    last_use: float


class ShardCache:
    """At most `max_bytes` of shards in `folder`, fetched from `remote` when they are opened.

    The bound is passed, with a warning, only when all shards are being read. What goes first is the
    shard whose next use lies farthest ahead by what all processes `expect`, else the one used longest
    ago. A download asks for `chunk_bytes` at a time and loses at most so much when it is cut off.
    Picklable; raises `DataError` when the folder cannot be used.
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
                f"cannot keep shards in {folder} ({error.strerror}); set data.cache_dir to a folder on a "
                "local disk of the node"
            ) from error

    def open(self, shard: RemoteShard) -> int:
        """A descriptor of the complete tar; nobody evicts it before the descriptor is closed.

        Raises `DataError` when it cannot be fetched, or is not what the manifest says.
        """
        self._check(shard)
        descriptor = self._open_complete(shard)
        while descriptor is None:
            with exclusive_lock(self._lock(shard.sha256)):
                # Another process may have fetched it while this one waited.
                descriptor = self._open_complete(shard)
                if descriptor is None:
                    self._reserve(shard, -1)
                    self._download(shard)
                    descriptor = self._open_complete(shard)
        return descriptor

    def prefetch(self, shard: RemoteShard, position: int) -> bool:
        """Fetch the shard that is needed as number `position`, if there is room; whether it is here.

        Nothing is evicted that is needed sooner, and nobody is waited for.
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
        """Tell all processes of the node which shards this one needs next, soonest first."""
        with exclusive_lock(self._eviction_lock):
            if self._expectation is None:
                self._expectation, _ = tempfile.mkstemp(dir=self._expected)
                fcntl.flock(self._expectation, fcntl.LOCK_EX)
            os.ftruncate(self._expectation, 0)
            os.pwrite(self._expectation, "\n".join(s.sha256 for s in shards).encode(), 0)

    def close(self) -> None:
        """Expect nothing more."""
        if self._expectation is not None:
            os.close(self._expectation)
            self._expectation = None

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_expectation": None}

    # -- places ------------------------------------------------------------------------------------
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

    # -- fetching ----------------------------------------------------------------------------------
    def _check(self, shard: RemoteShard) -> None:
        url = self.remote.url_of(shard.path)
        if not _SHA256.fullmatch(shard.sha256):  # it becomes a file name
            raise DataError(f"the manifest gives no SHA-256 of {url}; make the dataset again")
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
        os.utime(descriptor)  # the last use, by which shards are evicted
        return descriptor

    def _download(self, shard: RemoteShard) -> None:
        """Make the tar complete; its lock is held."""
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
            f"{self.remote.url_of(shard.path)} is not the shard that its manifest describes (SHA-256 "
            f"{digest}, expected {shard.sha256}); copy the dataset there again"
        )

    def _complete_part(self, shard: RemoteShard, part: Path) -> str:
        """Append what is missing from the part; the SHA-256 of the whole."""
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

    # -- room --------------------------------------------------------------------------------------
    def _reserve(self, shard: RemoteShard, position: int) -> bool:
        """Make room and create the part, which counts with its full size from now on.

        A shard that is needed now (position -1) gets its place in any case.
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
                    "the shard cache %s grows %.3g GB above data.cache_gb=%g, for all of its shards are in "
                    "use; raise data.cache_gb", self.folder, excess / 1e9, self.max_bytes / 1e9,
                )  # fmt: skip
            self._part(shard).touch()
        return True

    def _evict(self, entries: list[_Entry], num_bytes: int, position: int) -> int:
        """Remove at least `num_bytes` of what is not in use nor needed before `position`, if possible.

        Returns how many bytes were freed.
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
        """Unlink a shard or part that nobody reads or downloads; whether that was so."""
        with try_exclusive_lock(self._lock(entry.sha256)) as is_free:
            if not is_free:
                return False
            try:
                descriptor = os.open(entry.path, os.O_RDONLY)
            except FileNotFoundError:  # a part that became complete since it was listed
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
                except FileNotFoundError:  # a part that was just renamed or given up
                    continue
                num_bytes = status.st_size
                if path.suffix == ".part":
                    num_bytes = int(path.suffixes[0][1:])
                found.append(_Entry(path, path.name.split(".")[0], num_bytes, status.st_mtime))
        return found

    def _next_uses(self) -> dict[str, int]:
        """The soonest use of each shard that a living process expects, by position."""
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
        """Whether the process that holds this expectation has ended."""
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
