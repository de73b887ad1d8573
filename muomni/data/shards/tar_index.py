"""Indexes WebDataset tars: header scan, index file, and the members of one sample.

Reads USTAR, GNU long names, and PAX paths, so tars from other tools can be indexed. The index file
(`SHARD.tar.idx`) contains little-endian uint64 offsets, one per sample and the end of the last sample, as
in Megatron-Energon. An index whose last value is the size of the tar (Lhotse) is accepted too.
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
# Name, size, checksum, type, magic, and name prefix.
_HEADER = Struct("100s24x12s12x8sB100x6s82x155s12x")
_REGULAR_TYPES = b"\x0007"
_GNU_LONG_NAME = ord("L")
_PAX_HEADER = ord("x")
# The payload of these types is the name of the next member.
_NAME_TYPES = (_GNU_LONG_NAME, _PAX_HEADER)
# Folders and global headers have no sample data.
_IGNORED_TYPES = b"5g"
# Names are short; a longer payload is damaged or malicious.
_MAX_NAME_PAYLOAD = 1 << 20
_MAX_LENGTH_DIGITS = 20
_SUM_MODULUS = 65521
# Files and folders that operating systems leave among data, in lower case.
_CLUTTER = frozenset(
    [
        *("__macosx", "icon\r", "@eadir", "lost+found"),
        *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
    ]
)


@dataclass(frozen=True, slots=True)
class TarMember:
    """A regular file of a tar; offsets of its first header block and of its data, in bytes."""

    name: str
    header_offset: int
    data_offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class SampleSpan:
    """The adjacent members of one key, at bytes [start, end) of the tar."""

    key: str
    start: int
    end: int
    members: tuple[TarMember, ...]


def padded(num_bytes: int) -> int:
    """Size of a payload in a tar: `num_bytes` rounded up to full blocks."""
    return -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES


def split_member_name(name: str) -> tuple[str, str]:
    """Split `folder/KEY.0.PNG` into the key `folder/KEY` and the extension `0.png`.

    As in WebDataset, the key ends at the first dot of the file name, and extensions are in lower case.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def clutter_kind(name: str) -> str:
    """The kind of a file or folder name that is not data; empty for data.

    Hidden names and those of operating systems are not data, such as `._a.jpg` and `Thumbs.db`.
    """
    if name[:1] != ".":
        return name if name.lower() in _CLUTTER else ""
    if name in (".", ".."):
        return ""
    return "._*" if name.startswith("._") else "hidden"


def member_clutter(name: str) -> str:
    """The kind of a member path if a part of it is clutter; empty for data."""
    if "/" not in name:
        return clutter_kind(name)
    return next(filter(None, map(clutter_kind, name.split("/"))), "")


def parse_members(buffer: bytes, origin: str) -> list[tuple[str, int, int]]:
    """List the regular files in tar bytes as (name, data offset in `buffer`, size), without clutter.

    Raises `DataError` that names `origin` if a header is damaged or a payload is truncated.
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
            raise DataError(f"{origin}: member {name!r} is truncated; rebuild the shard")
        if kind in _NAME_TYPES:
            payload = buffer[data : data + num_bytes]
            long_name = _long_name(payload, kind, origin) or long_name
        else:
            if kind in _REGULAR_TYPES and not member_clutter(long_name or name):
                found.append((long_name or name, data, num_bytes))
            long_name = None
        position = data + padded(num_bytes)
    return found


def scan_tar(path: Path) -> list[TarMember]:
    """List all regular files of a tar, clutter included; reads only the headers, one `pread` each.

    Raises `DataError` if the file is missing, truncated, or has a damaged header.
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
                "copy or rebuild the shard"
            )
        name, num_bytes, kind = _parse_header(header, str(path), position)
        data = position + BLOCK_BYTES
        position = data + padded(num_bytes)
        if position > tar_bytes:
            raise DataError(
                f"{path} is truncated inside member {name!r}; copy or rebuild the shard"
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
                f"{path}: member {(long_name or name)!r} is a link, device, or other special file "
                f"({chr(kind)!r}) without data; rebuild the shard with regular files"
            )
        long_name = None
        first_header = position


def group_samples(members: list[TarMember], path: Path) -> list[SampleSpan]:
    """Group adjacent members with the same key into samples; clutter is skipped.

    Raises `DataError` if the members of a key are not adjacent, since an index describes contiguous
    samples, or if a sample has a member twice.
    """
    samples: list[SampleSpan] = []
    seen: set[str] = set()
    group: list[TarMember] = []
    group_key: str | None = None

    end = 0

    def close() -> None:
        if group_key is not None:
            samples.append(SampleSpan(group_key, group[0].header_offset, end, tuple(group)))

    for member in members:
        if member_clutter(member.name):
            end = member.data_offset + padded(member.num_bytes)
            continue
        key, extension = split_member_name(member.name)
        if not extension:
            raise DataError(f"{path}: member {member.name!r} has no extension, so it has no key")
        if key != group_key:
            close()
            if key in seen:
                raise DataError(
                    f"{path}: members of key {key!r} are not adjacent or the key occurs twice; "
                    "write new shards with --format webdataset, which collects the members of a sample"
                )
            seen.add(key)
            group_key, group = key, []
        if any(extension == split_member_name(other.name)[1] for other in group):
            raise DataError(
                f"{path}: member {member.name!r} occurs twice; rebuild the shard with unique keys"
            )
        group.append(member)
        end = member.data_offset + padded(member.num_bytes)
    close()
    return samples


def index_offsets(samples: list[SampleSpan]) -> np.ndarray:
    """Offsets of the samples and the end of the last sample: uint64 [num_samples + 1]."""
    ends = [samples[-1].end] if samples else [0]
    return np.array([sample.start for sample in samples] + ends, dtype="<u8")


def index_path(tar_path: Path) -> Path:
    """The index file of a tar."""
    return tar_path.with_name(tar_path.name + INDEX_SUFFIX)


def write_index(path: Path, offsets: np.ndarray) -> None:
    """Write offsets (uint64 [num_samples + 1]) as an index file, atomically."""
    write_atomic(path, np.ascontiguousarray(offsets, dtype="<u8").tobytes())


def read_index(path: Path) -> np.ndarray:
    """Memory-map an index file: read-only uint64 [num_samples + 1].

    Raises `DataError` if the file is missing or its size is not a multiple of 8 bytes.
    """
    try:
        num_bytes = path.stat().st_size
    except OSError as error:
        raise DataError(
            f"index {path} is missing; create it with `python -m data_prep index`"
        ) from error
    if num_bytes == 0 or num_bytes % 8:
        raise DataError(
            f"index {path} has {num_bytes} bytes, not a multiple of 8; rebuild the index"
        )
    return np.memmap(path, dtype="<u8", mode="r")


def _parse_header(header: bytes, origin: str, position: int) -> tuple[str, int, int]:
    """Name, payload size, and type byte of a header block, after checking its checksum."""
    name_field, size_field, sum_field, kind, magic, prefix_field = _HEADER.unpack(header)
    try:
        stored = _octal(sum_field)
        if size_field[0] & 0x80:
            num_bytes = int.from_bytes(size_field, "big") & ((1 << 88) - 1)
        else:
            num_bytes = _octal(size_field)
        if num_bytes < 0:
            raise ValueError("negative size")
        name = _text(name_field)
        if prefix_field[0] and magic == b"ustar\0":
            name = f"{_text(prefix_field)}/{name}"
    except ValueError as error:
        raise DataError(f"{origin}: damaged tar header at byte {position}") from error
    # The checksum counts its own eight bytes as spaces.
    if (stored - 8 * 32 + _byte_sum(sum_field) - _byte_sum(header)) % _SUM_MODULUS:
        raise DataError(f"{origin}: damaged tar header at byte {position} (checksum)")
    return name, num_bytes, kind


def _octal(field: bytes) -> int:
    try:
        return int(field.rstrip(b"\0 ") or b"0", 8)
    except ValueError:  # there are bytes after the terminating zero byte
        return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode()


def _byte_sum(block: bytes) -> int:
    """The sum of the bytes of a block modulo `_SUM_MODULUS`, many times faster than `sum`.

    The lower half of Adler-32 is this sum plus one.
    """
    return (adler32(block) & 0xFFFF) - 1


def _long_name(payload: bytes, kind: int, origin: str) -> str | None:
    """The name from a GNU long-name payload or the `path` record of a PAX header."""
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
