"""Open the text files of corpora: decompressed by content, whatever their names; other content is named.

Text is UTF-8, with or without a byte order mark. Files in UTF-16 or UTF-32, archives, and binary formats are
refused, since all their lines would be bad.
"""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TextIO, cast

from muomni.errors import DataError

BOM = b"\xef\xbb\xbf"
# A line of a compressed file may expand beyond memory.
MAX_LINE_CHARS = 1 << 27
COMPRESSED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz", ".lz4")
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\0": "xz",
    b"BZh": "bz2",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
_UNICODE = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_NOT_TEXT = {
    b"PK\x03\x04": "a ZIP archive or Office document; unpack or export it",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it",
    b"Rar!\x1a\x07": "a RAR archive; unpack it",
    b"PAR1": "a Parquet file; use --format parquet",
    b"ARROW1": "an Arrow file; convert it to Parquet",
    b"%PDF-": "a PDF; convert it to text",
    b"\x89HDF\r\n": "an HDF5 file; convert it to Parquet",
    b"SQLite format 3\0": "an SQLite database; export its tables",
}
# After the mark of bzip2 and a digit: a block, or the end of an empty file.
_BZ2_BLOCKS = (b"1AY&SY", b"\x17rE8P\x90")
_TAR_MARK = slice(257, 262)
_BUFFER_BYTES = 1 << 18


class _Decompressed(io.RawIOBase):
    """The content of a compressed file; raises `DataError` where it is damaged."""

    def __init__(self, path: Path, file: io.BufferedReader, kind: str) -> None:
        self._path, self._file, self._stream = path, file, _decompressing(file, kind)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            data = self._stream.read(len(buffer))
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
            raise DataError(
                f"cannot decompress {self._path}: {error}; unpack or download it again"
            ) from error
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        self._file.close()
        super().close()


def open_bytes(path: Path) -> io.BufferedReader:
    """Open the content of a text file, decompressed.

    Raises `DataError` if the path is not a file, or its content is not UTF-8 text but of a known other kind.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder, not a file; check --src")
    if not path.is_file():
        raise DataError(f"{path} is not a file; check --src")
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    kind = _compression(file.peek())
    if kind:
        decompressed = io.BufferedReader(_Decompressed(path, file, kind), _BUFFER_BYTES)
        file = cast(io.BufferedReader, decompressed)
    try:
        _require_text(path, file.peek())
    except BaseException:
        file.close()
        raise
    return file


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """Open a text file, possibly compressed; invalid UTF-8 becomes lone surrogates. Raises as `open_bytes`."""
    return io.TextIOWrapper(
        open_bytes(path), encoding="utf-8-sig", errors="surrogateescape", newline=newline
    )


def is_compressed(path: Path) -> bool:
    """Whether the content of an existing file is compressed."""
    with path.open("rb") as file:
        return bool(_compression(file.peek()))


def plain_name(name: str) -> str:
    """A file name without the suffix of a compression, and without its last suffix before it."""
    while name.lower().endswith(COMPRESSED_SUFFIXES):
        name = name.rpartition(".")[0]
    return name.rpartition(".")[0] or name


def bounded_lines(file: TextIO, path: Path) -> Iterator[str]:
    """The lines of an open file; raises `DataError` for an excessively long line."""
    number = 0
    while line := file.readline(MAX_LINE_CHARS):
        number += 1
        if len(line) == MAX_LINE_CHARS:
            raise DataError(
                f"{path} line {number} has more than {MAX_LINE_CHARS} characters; write one JSON "
                "object per line instead of one list, or break lines"
            )
        yield line


def _compression(start: bytes) -> str:
    kind = next((kind for mark, kind in _COMPRESSED.items() if start.startswith(mark)), "")
    return "" if kind == "bz2" and start[4:10] not in _BZ2_BLOCKS else kind


def _decompressing(file: io.BufferedReader, kind: str) -> IO[bytes]:
    if kind == "gzip":
        return cast(IO[bytes], gzip.GzipFile(fileobj=file))
    if kind == "bz2":
        return bz2.BZ2File(file)
    if kind == "xz":
        return lzma.LZMAFile(file)
    import pyarrow

    return cast(IO[bytes], pyarrow.CompressedInputStream(file, kind))


def _require_text(path: Path, start: bytes) -> None:
    name = next((name for mark, name in _UNICODE.items() if start.startswith(mark)), "")
    name = name or _utf16_without_mark(start[:512])
    if name:
        raise DataError(f"{path} is {name}; convert it with: iconv -f {name} -t UTF-8")
    other = next((other for mark, other in _NOT_TEXT.items() if start.startswith(mark)), "")
    if start[_TAR_MARK] == b"ustar":
        other = "a tar archive; unpack it"
    if other:
        raise DataError(f"{path} is {other}")


def _utf16_without_mark(start: bytes) -> str:
    """The encoding of Latin text in UTF-16, of which every other byte is zero."""
    even, odd = start[::2], start[1::2]
    if len(start) < 4:
        return ""
    if all(even) and not any(odd):
        return "UTF-16LE"
    return "UTF-16BE" if all(odd) and not any(even) else ""
