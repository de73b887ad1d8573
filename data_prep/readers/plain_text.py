"""Plain text files: each line, paragraph (separated by blank lines), or file is a document.

Only byte ranges are kept, so a corpus may exceed memory. Of compressed files, the documents of a block are
read at once, and stay together in the shards. Group: the words of the document, so repeated lines stay
together.
"""

import io
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from data_prep.corpus import (
    BAD_UTF8,
    MISSING_MEDIA,
    BadSampleError,
    Item,
    PackedSpan,
    Problem,
    TextSpan,
    clean_key,
    text_group,
    text_problem,
)
from data_prep.options import ReaderOptions
from data_prep.readers.opening import (
    BOM,
    COMPRESSED_SUFFIXES,
    is_compressed,
    open_bytes,
    plain_name,
)
from data_prep.readers.walk import find_files
from muomni.errors import DataError

DOCUMENTS = ("line", "paragraph", "file")
_SUFFIXES = tuple(f".txt{packed}" for packed in ("", *COMPRESSED_SUFFIXES))
_READ_BYTES = 1 << 20
_MAX_DOCUMENT_BYTES = 1 << 27
# Decompressed bytes per block; two blocks per worker are in memory.
_BLOCK_BYTES = 1 << 26
_NUM_KEPT_BLOCKS = 2


def read_plain_text(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """List the documents of a text file, or of all *.txt files below a folder, compressed or not.

    Raises `DataError` if there is no file, or one is not text.
    """
    if not src.exists():
        raise DataError(f"text source {src} does not exist; check --src")
    files = find_files(src, _SUFFIXES, options.skipped) if src.is_dir() else [src]
    if not files:
        raise DataError(f"{src} contains no *.txt file; check --src")
    root = src if src.is_dir() else src.parent
    for path in files:
        relative = path.relative_to(root)
        name = relative.with_name(plain_name(path.name)).as_posix()
        block_bytes = _BLOCK_BYTES if is_compressed(path) else 0
        for number, (start, content) in enumerate(_documents(path, options.document), start=1):
            source = f"{path.name} {options.document} {number}"
            span = TextSpan(str(path), start, start + len(content))
            block = start // block_bytes * block_bytes if block_bytes else 0
            yield Item(
                key=clean_key(f"{name}-{number:08d}"),
                group=text_group(content.decode(errors="surrogateescape")),
                source=source,
                span=PackedSpan(span.path, span.start, span.end, block) if block_bytes else span,
                problem=_problem(content, start, path.name),
                block=f"{relative}:{block}" if block_bytes else "",
            )


def read_packed(span: PackedSpan) -> bytes:
    """A document of a compressed file; raises `BadSampleError` if the file cannot be read any more."""
    end = span.end - span.block
    num_bytes = -(-end // _BLOCK_BYTES) * _BLOCK_BYTES
    # A document goes beyond the end of its block by less than this, as a rule.
    if end <= _BLOCK_BYTES + _READ_BYTES:
        num_bytes = _BLOCK_BYTES + _READ_BYTES
    try:
        return _block(span.path, span.block, num_bytes)[span.start - span.block : end]
    except (DataError, OSError) as error:
        raise BadSampleError(MISSING_MEDIA, str(error)) from error


@lru_cache(maxsize=_NUM_KEPT_BLOCKS)
def _block(path: str, start: int, num_bytes: int) -> bytes:
    with open_bytes(Path(path)) as file:
        while start and (passed := file.read(min(start, _READ_BYTES))):
            start -= len(passed)
        return file.read(num_bytes)


def _documents(path: Path, document: str) -> Iterator[tuple[int, bytes]]:
    """Byte offset and content of each non-empty document."""
    with open_bytes(path) as file:
        # A byte order mark is not part of the first document.
        start = position = len(BOM) if file.peek(len(BOM)).startswith(BOM) else 0
        file.read(start)
        if document == "file":
            content = file.read(_MAX_DOCUMENT_BYTES + 1)
            _check_size(len(content), path)
            if content.strip():
                yield start, content
            return
        paragraph: list[bytes] = []
        for line in _lines(file, path):
            if document == "line":
                if line.strip():
                    yield position, line.rstrip(b"\r\n")
            elif line.strip():
                start = start if paragraph else position
                paragraph.append(line)
                _check_size(position + len(line) - start, path)
            elif paragraph:
                yield start, b"".join(paragraph).rstrip(b"\r\n")
                paragraph = []
            position += len(line)
        if paragraph:
            yield start, b"".join(paragraph).rstrip(b"\r\n")


def _lines(file: io.BufferedReader, path: Path) -> Iterator[bytes]:
    """The lines with their ends; in a file without line feeds, carriage returns end them."""
    end, rest = b"", b""
    while block := file.read(_READ_BYTES):
        end = end or (b"\r" if b"\r" in block and b"\n" not in block else b"\n")
        *lines, rest = (rest + block).split(end)
        for line in lines:
            yield line + end
        _check_size(len(rest), path)
    if rest:
        yield rest


def _check_size(num_bytes: int, path: Path) -> None:
    if num_bytes > _MAX_DOCUMENT_BYTES:
        raise DataError(
            f"{path} has a document of more than {_MAX_DOCUMENT_BYTES >> 20} MiB; split it, or choose another "
            "--document"
        )


def _problem(content: bytes, start: int, name: str) -> Problem | None:
    try:
        return text_problem(content.decode(), "the document")
    except UnicodeDecodeError as error:
        return Problem(BAD_UTF8, f"byte {start + error.start} of {name} is not valid UTF-8")
