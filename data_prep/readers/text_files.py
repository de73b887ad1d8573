"""Text files of corpora: UTF-8, with or without a byte order mark, of either line ending.

Bytes that are no UTF-8 become lone surrogates, so that one bad line costs one sample; a file in UTF-16 or
UTF-32 would make all lines bad, so it is refused with what to do.
"""

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from muomni.errors import DataError

BOM = b"\xef\xbb\xbf"
_OTHER_BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x00\x00\xfe\xff": "UTF-32"}
# A line of a packed file may unpack to more than memory holds.
_MAX_LINE_CHARS = 1 << 27


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """Open a text file, also .gz, for reading; raises `DataError` for another encoding or no file."""
    if not path.is_file():
        raise DataError(f"{path} is no file; check --src")
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", errors="surrogateescape")
    refuse_other_encodings(path)
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def read_text(path: Path) -> str:
    """All of a text file; raises as `open_text`."""
    with open_text(path) as file:
        return file.read()


def bounded_lines(file: TextIO, path: Path) -> Iterator[str]:
    """The lines of an open file; raises `DataError` for one that is absurdly long."""
    number = 0
    while line := file.readline(_MAX_LINE_CHARS):
        number += 1
        if len(line) == _MAX_LINE_CHARS:
            raise DataError(
                f"{path} line {number} is longer than {_MAX_LINE_CHARS} characters; is it one list? "
                "Write an object a line"
            )
        yield line


def refuse_other_encodings(path: Path) -> None:
    """Raise `DataError` for a file that begins with the mark of UTF-16 or UTF-32."""
    with path.open("rb") as file:
        start = file.read(4)
    for mark, name in _OTHER_BOMS.items():
        if start.startswith(mark):
            raise DataError(f"{path} is {name}; convert it, as by: iconv -f {name} -t UTF-8")
