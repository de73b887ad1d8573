"""Text, JSON, JSON-lines, and delimited files of corpora: UTF-8, with or without a byte order mark.

Invalid UTF-8 becomes lone surrogates and a broken line becomes a `Problem`, so that it costs one sample.
Files in UTF-16 or UTF-32 are rejected, since all their lines would be bad.
"""

import csv
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from data_prep.corpus import BAD_RECORD, Problem, require_file
from muomni.errors import DataError

Record = dict[str, object]

BOM = b"\xef\xbb\xbf"
_OTHER_BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x00\x00\xfe\xff": "UTF-32"}
# A line of a compressed file may expand beyond memory.
_MAX_LINE_CHARS = 1 << 27
_MAX_FIELD_CHARS = 1 << 30


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """Open a text file, possibly .gz; raises `DataError` if it is missing or not UTF-8."""
    if not path.is_file():
        raise DataError(f"{path} is not a file; check --src")
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", errors="surrogateescape")
    require_utf8(path)
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def read_text(path: Path) -> str:
    """The content of a text file; raises as `open_text`."""
    with open_text(path) as file:
        return file.read()


def require_utf8(path: Path) -> None:
    """Raise `DataError` if a file starts with the byte order mark of UTF-16 or UTF-32."""
    with path.open("rb") as file:
        start = file.read(4)
    for mark, name in _OTHER_BOMS.items():
        if start.startswith(mark):
            raise DataError(f"{path} is {name}; convert it with: iconv -f {name} -t UTF-8")


def read_json(path: Path, what: str) -> object:
    """The content of a JSON file; raises `DataError` if it is missing or not JSON."""
    with open_text(require_file(path, what)) as file:
        try:
            return json.load(file)
        except (ValueError, RecursionError) as error:
            raise DataError(f"cannot read the {what} {path}: {error}") from error


def read_json_list(path: Path, what: str) -> Iterator[tuple[int, Record | Problem]]:
    """Index and object of each entry of a JSON list.

    Raises `DataError` if the file is missing or not a list.
    """
    content = read_json(path, what)
    if not isinstance(content, list):
        raise DataError(f"{path} is not a valid {what}: the top level is not a list")
    for number, record in enumerate(content):
        is_object = isinstance(record, dict)
        yield number, record if is_object else Problem(BAD_RECORD, "the entry is not a JSON object")


def read_json_lines(path: Path, what: str) -> Iterator[tuple[int, Record | Problem]]:
    """Line number (from 1) and object of each non-empty line.

    Raises `DataError` if the file is missing or its gzip data are truncated.
    """
    with open_text(require_file(path, what)) as file:
        try:
            for number, line in enumerate(_bounded_lines(file, path), start=1):
                if line.strip():
                    yield number, _record(line)
        except (EOFError, gzip.BadGzipFile) as error:
            raise DataError(f"cannot read {path}: {error}; unpack or download it again") from error


def read_json_records(path: Path, what: str) -> Iterator[tuple[int, Record | Problem]]:
    """Records of a JSON list or of JSON lines; the file is a list if it starts with `[`."""
    with open_text(require_file(path, what)) as file:
        first = next((line for line in _bounded_lines(file, path) if line.strip()), "").lstrip()
    return read_json_list(path, what) if first.startswith("[") else read_json_lines(path, what)


def read_delimited(
    path: Path, delimiter: str, header: list[str] | None = None, has_quotes: bool = True
) -> Iterator[tuple[int, Record | Problem]]:
    """Row number (from 1) and fields of each row; the first line is the header unless one is given.

    Use `has_quotes=False` for corpora whose texts contain unpaired quotation marks. Raises `DataError`
    for an empty or malformed file.
    """
    csv.field_size_limit(_MAX_FIELD_CHARS)
    quoting = csv.QUOTE_MINIMAL if has_quotes else csv.QUOTE_NONE
    with open_text(path, newline="") as file:
        rows = csv.reader(file, delimiter=delimiter, quoting=quoting)
        try:
            names = header or next(rows, None)
            if names is None:
                raise DataError(f"table {path} is empty, without a header line; check --src")
            for number, fields in enumerate(rows, start=1):
                if len(fields) == len(names):
                    yield number, dict(zip(names, fields, strict=True))
                elif fields:
                    message = f"the row has {len(fields)} fields, the header {len(names)}"
                    yield number, Problem(BAD_RECORD, message)
        except csv.Error as error:
            raise DataError(f"cannot read {path}: {error}") from error


def require_columns(src: Path, names: tuple[str, ...], needed: tuple[str, ...]) -> None:
    """Raise `DataError` for the first needed column that a table lacks."""
    missing = [name for name in needed if name not in names]
    if missing:
        raise DataError(
            f"{src} has no column {missing[0]!r} (it has {', '.join(names)}); "
            f"map one with --columns {missing[0]}=NAME"
        )


def _bounded_lines(file: TextIO, path: Path) -> Iterator[str]:
    """The lines of an open file; raises `DataError` for an excessively long line."""
    number = 0
    while line := file.readline(_MAX_LINE_CHARS):
        number += 1
        if len(line) == _MAX_LINE_CHARS:
            raise DataError(
                f"{path} line {number} has more than {_MAX_LINE_CHARS} characters; write one JSON "
                "object per line instead of one list"
            )
        yield line


def _record(line: str) -> Record | Problem:
    try:
        record: object = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Problem(BAD_RECORD, f"the line is not JSON: {error}")
    return (
        record if isinstance(record, dict) else Problem(BAD_RECORD, "the line is not a JSON object")
    )
