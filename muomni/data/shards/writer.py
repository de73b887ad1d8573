"""Writes one shard: tar, index, columns, and last the record, which marks it as complete.

Files are written atomically, so after a kill a shard is either complete or missing. The tar is plain
USTAR with time 0 and a fixed owner, so equal samples give equal bytes on every machine.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from pydantic import ValidationError

from muomni.data.shards.manifest import COLUMNS, ShardRecord, Totals, hash64
from muomni.data.shards.tar_index import BLOCK_BYTES, index_path, padded, write_index
from muomni.errors import DataError
from muomni.io.atomic_write import open_atomic, write_atomic
from muomni.io.hashing import sha256_bytes

COLUMNS_SUFFIX = ".cols.npy"
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,90}")
# The name field of USTAR: key, dot, and extension.
_MAX_NAME_BYTES = 100
_MAX_MEMBER_BYTES = 2**32 - 1
# Fields that are the same in all headers: mode and owner, time, type, magic, and device. The checksum
# counts its own eight bytes as spaces.
_MODE = b"0000644\0" + b"0000000\0" * 2
_TIME = b"00000000000\0"
_TAIL = b"0" + bytes(100) + b"ustar\x0000" + bytes(64) + b"0000000\0" * 2 + bytes(167)
_CONSTANT_SUM = sum(_MODE) + sum(_TAIL) + sum(_TIME) + 8 * 32


@dataclass(frozen=True, slots=True)
class SampleCost:
    """Sizes of a sample that planning needs without reading it."""

    duration_ms: int = 0
    num_chars: int = 0
    num_pixels: int = 0
    num_images: int = 0
    num_audios: int = 0


def columns_path(tar_path: Path) -> Path:
    """`X.cols.npy` beside `X.tar`."""
    return tar_path.with_suffix(COLUMNS_SUFFIX)


def load_columns(path: Path) -> np.ndarray:
    """Memory-map a column file: read-only structured array of `COLUMNS`.

    Raises `DataError` if it is missing, damaged, or has other columns.
    """
    try:
        columns = np.load(path, mmap_mode="r")
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; copy or rebuild the dataset") from error
    except Exception as error:
        # numpy parses the header as Python, so damage can raise almost anything, even MemoryError.
        raise DataError(f"{path} is damaged ({error}); copy or rebuild the dataset") from error
    if columns.dtype != COLUMNS or columns.ndim != 1:
        raise DataError(f"{path} has other columns than this version writes; rebuild the dataset")
    return columns


def record_path(tar_path: Path) -> Path:
    """`X.json` beside `X.tar`."""
    return tar_path.with_suffix(".json")


def content_hash(members: Iterable[tuple[str, bytes]]) -> int:
    """64-bit hash of the members of a sample as (extension, bytes), in order: the column `content_hash`."""
    digest = hashlib.blake2b(digest_size=8)
    for extension, data in members:
        digest.update(f"{extension}:{len(data)}:".encode())
        digest.update(data)
    return int.from_bytes(digest.digest(), "little")


def ustar_header(name: str, num_bytes: int) -> bytes:
    """The 512-byte header of a regular file with mode 644, owner 0, and time 0."""
    encoded = name.encode()
    if len(encoded) > _MAX_NAME_BYTES:
        raise DataError(f"member name {name!r} is longer than {_MAX_NAME_BYTES} bytes")
    size = b"%011o\0" % num_bytes
    checksum = _CONSTANT_SUM + sum(encoded) + sum(size)
    padding = bytes(_MAX_NAME_BYTES - len(encoded))
    return b"".join((encoded, padding, _MODE, size, _TIME, b"%06o\0 " % checksum, _TAIL))


class ShardWriter:
    """Context manager that writes the shard `root/path` of `split` and its sidecars.

    Add samples in order. Leaving the block without an error completes the shard and sets `record`.
    """

    def __init__(self, root: Path, path: str, split: str) -> None:
        self.tar_path = root / path
        self.record: ShardRecord | None = None
        self.dropped: dict[str, int] = {}
        self.num_planned = 0
        self.config_digest = ""
        self.sources_digest = ""
        self._relative = path
        self._split = split
        self._offsets: list[int] = []
        self._rows: list[tuple[int, ...]] = []
        self._members: set[str] = set()
        self._keys: set[str] = set()
        self._sha256 = hashlib.sha256()
        self._position = 0
        self._stack = ExitStack()
        self._file: BinaryIO | None = None

    def __enter__(self) -> "ShardWriter":
        # The record of an earlier attempt must not mark the new tar as complete.
        record_path(self.tar_path).unlink(missing_ok=True)
        self._file = self._stack.enter_context(open_atomic(self.tar_path))
        return self

    def add(
        self, key: str, members: Sequence[tuple[str, bytes]], group: str, cost: SampleCost
    ) -> None:
        """Append one sample with its members as (extension, bytes).

        Raises `DataError` for a key outside of [A-Za-z0-9_-]{1,90}, a repeated key, or no members.
        """
        if not KEY_PATTERN.fullmatch(key):
            raise DataError(f"key {key!r} does not match [A-Za-z0-9_-]{{1,90}}")
        if key in self._keys:
            raise DataError(f"key {key!r} occurs twice in {self.tar_path}")
        if not members:
            raise DataError(f"sample {key!r} has no members")
        self._keys.add(key)
        self._offsets.append(self._position)
        blocks = []
        for extension, data in members:
            if len(data) > _MAX_MEMBER_BYTES:
                raise DataError(f"{key}.{extension} is larger than 4 GiB")
            header = ustar_header(f"{key}.{extension}", len(data))
            blocks += (header, data, bytes(padded(len(data)) - len(data)))
            self._members.add(extension)
        # One write and hash per sample: for small files, calls cost more than bytes.
        self._write(b"".join(blocks))
        self._rows.append(
            (
                hash64(key),
                hash64(group),
                content_hash(members),
                sum(len(data) for _, data in members),
                cost.duration_ms,
                cost.num_chars,
                cost.num_pixels,
                cost.num_images,
                cost.num_audios,
            )
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._stack.__exit__(kind, error, trace)
            return
        self._offsets.append(self._position)
        self._write(bytes(2 * BLOCK_BYTES))
        self._stack.close()
        self.record = self._write_sidecars()

    def _write(self, data: bytes) -> None:
        assert self._file is not None, "use ShardWriter as a context manager"
        self._file.write(data)
        self._sha256.update(data)
        self._position += len(data)

    def _write_sidecars(self) -> ShardRecord:
        offsets = np.array(self._offsets, dtype="<u8")
        write_index(index_path(self.tar_path), offsets)
        columns = np.array(self._rows, dtype=COLUMNS)
        record = finish_record(
            self.tar_path,
            ShardRecord(
                path=self._relative,
                split=self._split,
                num_samples=len(columns),
                num_bytes=self._position,
                sha256=self._sha256.hexdigest(),
                index_sha256=sha256_bytes(offsets.tobytes()),
                columns_sha256="",
                members=tuple(sorted(self._members)),
                totals=Totals.of_columns(columns),
                num_planned=self.num_planned or len(columns),
                dropped=dict(sorted(self.dropped.items())),
                config_digest=self.config_digest,
                sources_digest=self.sources_digest,
            ),
            columns,
        )
        return record


def finish_record(tar_path: Path, record: ShardRecord, columns: np.ndarray) -> ShardRecord:
    """Write the column file, then the record with the digest of the columns; returns the record."""
    buffer = io.BytesIO()
    np.save(buffer, columns)
    write_atomic(columns_path(tar_path), buffer.getvalue())
    digest = sha256_bytes(buffer.getvalue())
    record = record.model_copy(update={"columns_sha256": digest})
    store_record(tar_path, record)
    return record


def store_record(tar_path: Path, record: ShardRecord) -> None:
    """Write the record of a shard atomically."""
    text = json.dumps(record.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"
    write_atomic(record_path(tar_path), text.encode())


def load_record(tar_path: Path) -> ShardRecord | None:
    """The record of a shard, or None if the shard is incomplete.

    Raises `DataError` if the record is damaged.
    """
    path = record_path(tar_path)
    try:
        return ShardRecord(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, ValidationError) as error:
        raise DataError(f"shard record {path} is damaged; delete it and rerun") from error
