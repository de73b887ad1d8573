"""Where the samples of a WebDataset tar begin: header scan, index file, members of one sample.

Reads USTAR, GNU long names and PAX paths, so that tars made elsewhere can be indexed. The index
file (`SHARD.tar.idx`) is little-endian uint64 offsets, one for each sample and one for the end
of the last sample: the layout that Megatron-Energon writes. An index whose last value is the
size of the tar (Lhotse) is accepted as well.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from zlib import adler32

import numpy as np

from muomni.errors import DataError
from muomni.io.atomic_write import write_atomic

BLOCK_BYTES = 512
INDEX_SUFFIX = ".idx"
_EMPTY_BLOCK = bytes(BLOCK_BYTES)
# Name, size, checksum, type, magic, and the prefix of the name.
_HEADER = Struct("100s24x12s12x8sB100x6s82x155s12x")
_REGULAR_TYPES = b"\x0007"
_GNU_LONG_NAME = ord("L")
_PAX_HEADER = ord("x")
# Their payload is the name of the next member.
_NAME_TYPES = (_GNU_LONG_NAME, _PAX_HEADER)
# Folders and headers for a whole archive hold no data of a sample.
_IGNORED_TYPES = b"5g"
# Names are short; a longer payload is damage, or meant to fill the memory.
_MAX_NAME_PAYLOAD = 1 << 20
_MAX_LENGTH_DIGITS = 20
_SUM_MODULUS = 65521


@dataclass(frozen=True, slots=True)
class TarMember:
    """One regular file of a tar: its name, where its header block(s) and its data begin."""

    name: str
    header_offset: int
    data_offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class SampleSpan:
    """The adjacent members that share one key; `start` to `end` are bytes of the tar."""

    key: str
    start: int
    end: int
    members: tuple[TarMember, ...]


def padded(num_bytes: int) -> int:
    """Bytes that a payload occupies in a tar: rounded up to whole blocks."""
    return -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES


def split_member_name(name: str) -> tuple[str, str]:
    """Split `folder/KEY.0.png` into the key `folder/KEY` and the extension `0.png`.

    As in WebDataset, the key ends at the first dot of the file name.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension


def parse_members(buffer: bytes, origin: str) -> list[tuple[str, int, int]]:
    """List the regular files in tar bytes as (name, data offset in `buffer`, size).

    Raises `DataError`, naming `origin`, when a header is damaged or a payload is cut off.
    """
    found: list[tuple[str, int, int]] = []
    position = 0
    long_name: str | None = None
    while position + BLOCK_BYTES <= len(buffer):
        header = buffer[position : position + BLOCK_BYTES]
        if header == _EMPTY_BLOCK:
            break
        name, num_bytes, kind = _parse_header(header, origin, position)
        data = position + BLOCK_BYTES
        if data + num_bytes > len(buffer):
            raise DataError(f"{origin}: member {name!r} is cut off; make the shard again")
        if kind in _NAME_TYPES:
            payload = buffer[data : data + num_bytes]
            long_name = _long_name(payload, kind, origin) or long_name
        else:
            if kind in _REGULAR_TYPES:
                found.append((long_name or name, data, num_bytes))
            long_name = None
        position = data + padded(num_bytes)
    return found


def scan_tar(path: Path) -> list[TarMember]:
    """List all regular files of a tar by reading its headers only, each in one `pread`.

    Raises `DataError` when the file is missing, truncated or has a damaged header.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"cannot open shard {path}: {error.strerror}") from error
    try:
        return list(_scan(descriptor, path, os.fstat(descriptor).st_size))
    finally:
        os.close(descriptor)


def _scan(descriptor: int, path: Path, tar_bytes: int) -> Iterator[TarMember]:
    position = 0
    first_header = 0
    long_name: str | None = None
    while True:
        header = os.pread(descriptor, BLOCK_BYTES, position)
        if header == _EMPTY_BLOCK:
            return
        if len(header) < BLOCK_BYTES:
            raise DataError(
                f"{path} is truncated at byte {position} (no end-of-archive block); "
                "make or copy the shard again"
            )
        name, num_bytes, kind = _parse_header(header, str(path), position)
        data = position + BLOCK_BYTES
        position = data + padded(num_bytes)
        if position > tar_bytes:
            raise DataError(
                f"{path} is truncated inside member {name!r}; make or copy the shard again"
            )
        if kind in _NAME_TYPES:
            if num_bytes > _MAX_NAME_PAYLOAD:
                raise DataError(f"{path}: the member name at byte {data} has {num_bytes} bytes")
            payload = os.pread(descriptor, num_bytes, data)
            long_name = _long_name(payload, kind, str(path)) or long_name
            continue
        if kind in _REGULAR_TYPES:
            yield TarMember(long_name or name, first_header, data, num_bytes)
        elif kind not in _IGNORED_TYPES:
            raise DataError(
                f"{path}: member {(long_name or name)!r} is a link, a device or of another special kind "
                f"({chr(kind)!r}), which has no data of its own; write the shard again with plain files"
            )
        long_name = None
        first_header = position


def group_samples(members: list[TarMember], path: Path) -> list[SampleSpan]:
    """Join adjacent members of equal key into samples.

    Raises `DataError` when a key comes back later in the tar, for then an index of contiguous
    samples cannot describe it, and when a sample has a member twice.
    """
    samples: list[SampleSpan] = []
    seen: set[str] = set()
    group: list[TarMember] = []
    group_key: str | None = None

    def close() -> None:
        if group_key is None:
            return
        last = group[-1]
        end = last.data_offset + padded(last.num_bytes)
        samples.append(SampleSpan(group_key, group[0].header_offset, end, tuple(group)))

    for member in members:
        key, extension = split_member_name(member.name)
        if not extension:
            raise DataError(f"{path}: member {member.name!r} has no extension, so it has no key")
        if key != group_key:
            close()
            if key in seen:
                raise DataError(
                    f"{path}: members of key {key!r} are not adjacent or the key occurs twice; "
                    "write the shard again with one sample after the other"
                )
            seen.add(key)
            group_key, group = key, []
        if any(member.name == other.name for other in group):
            raise DataError(
                f"{path}: member {member.name!r} occurs twice; write the shard again with unique keys"
            )
        group.append(member)
    close()
    return samples


def index_offsets(samples: list[SampleSpan]) -> np.ndarray:
    """Offsets of the samples and the end of the last: uint64 [num_samples + 1]."""
    ends = [samples[-1].end] if samples else [0]
    return np.array([sample.start for sample in samples] + ends, dtype="<u8")


def index_path(tar_path: Path) -> Path:
    """The index that lies beside a tar."""
    return tar_path.with_name(tar_path.name + INDEX_SUFFIX)


def write_index(path: Path, offsets: np.ndarray) -> None:
    """Write offsets (uint64 [num_samples + 1]) as an index file, atomically."""
    write_atomic(path, np.ascontiguousarray(offsets, dtype="<u8").tobytes())


def read_index(path: Path) -> np.ndarray:
    """Map an index file: read-only uint64 [num_samples + 1].

    Raises `DataError` when the file is missing or is no multiple of 8 bytes.
    """
    try:
        num_bytes = path.stat().st_size
    except OSError as error:
        raise DataError(f"index {path} is missing; `python -m data_prep index` makes it") from error
    if num_bytes == 0 or num_bytes % 8:
        raise DataError(f"index {path} has {num_bytes} bytes, which is no whole number of offsets")
    return np.memmap(path, dtype="<u8", mode="r")


def _parse_header(header: bytes, origin: str, position: int) -> tuple[str, int, int]:
    """Name, payload size and type byte of a header block; checks its checksum."""
    name_field, size_field, sum_field, kind, magic, prefix_field = _HEADER.unpack(header)
    try:
        stored = _octal(sum_field)
        if size_field[0] & 0x80:
            num_bytes = int.from_bytes(size_field, "big") & ((1 << 88) - 1)
        else:
            num_bytes = _octal(size_field)
        if num_bytes < 0:
            raise ValueError("a size below zero")
        name = _text(name_field)
        if prefix_field[0] and magic == b"ustar\0":
            name = f"{_text(prefix_field)}/{name}"
    except ValueError as error:
        raise DataError(f"{origin}: damaged tar header at byte {position}") from error
    # In the checksum its own eight bytes count as spaces.
    if (stored - 8 * 32 + _byte_sum(sum_field) - _byte_sum(header)) % _SUM_MODULUS:
        raise DataError(f"{origin}: damaged tar header at byte {position} (checksum)")
    return name, num_bytes, kind


def _octal(field: bytes) -> int:
    try:
        return int(field.rstrip(b"\0 ") or b"0", 8)
    except ValueError:  # something stands behind the zero byte that ends the number
        return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode()


def _byte_sum(block: bytes) -> int:
    """The sum of the bytes of a block modulo `_SUM_MODULUS`, many times faster than `sum`.

    The lower half of Adler-32 is one more than that.
    """
    return (adler32(block) & 0xFFFF) - 1


def _long_name(payload: bytes, kind: int, origin: str) -> str | None:
    """The name in a GNU long-name payload or in the `path` record of a PAX header."""
    try:
        if kind == _GNU_LONG_NAME:
            return payload.split(b"\0")[0].decode()
        return _pax_path(payload)
    except UnicodeDecodeError as error:
        raise DataError(f"{origin}: a member name is not valid UTF-8") from error


def _pax_path(payload: bytes) -> str | None:
    position = 0
    while position < len(payload):
        length_text = payload[position : position + _MAX_LENGTH_DIGITS].split(b" ", 1)[0]
        if not length_text.isdigit() or int(length_text) == 0:
            return None
        record = payload[position : position + int(length_text)]
        keyword, _, value = record[len(length_text) + 1 :].partition(b"=")
        if keyword == b"path":
            return value.rstrip(b"\n").decode()
        position += int(length_text)
    return None
