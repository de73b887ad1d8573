"""Text, JSON, JSON-lines, and delimited files of corpora.

Invalid UTF-8 becomes lone surrogates and a broken line becomes a `Problem`, so that it costs one sample.
`opening.py` decompresses files and refuses those that are not text.
"""

import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from data_prep.corpus import BAD_RECORD, Problem, require_file
from data_prep.readers.csv_rows import split_rows
from data_prep.readers.json_list import list_entries, starts_with_list
from data_prep.readers.opening import bounded_lines, open_text
from data_prep.values import shown
from muomni.errors import DataError

Record = dict[str, object]

# Excel names the delimiter in a line before the header.
_NAMED_DELIMITER = re.compile(r"sep=(.)\s*")
_DELIMITERS = ";\t|,"


def read_text(path: Path) -> str:
    """The content of a text file; raises as `open_text`."""
    with open_text(path) as file:
        return file.read()


def read_json(path: Path, what: str) -> object:
    """The content of a JSON file; raises `DataError` if it is missing or not JSON."""
    with open_text(require_file(path, what)) as file:
        try:
            return json.load(file)
        except (ValueError, RecursionError) as error:
            raise DataError(f"cannot read the {what} {path}: {error}") from error


def read_json_list(path: Path, what: str) -> Iterator[tuple[int, Record | Problem]]:
    """Index and object of each entry of a JSON list, which may be larger than memory.

    Raises `DataError` if the file is missing, not a list, or, with the line, not JSON.
    """
    for number, record in enumerate(list_entries(require_file(path, what), what)):
        yield number, record if isinstance(record, dict) else _not_object("entry", record)


def read_json_lines(path: Path, what: str) -> Iterator[tuple[int, Record | Problem]]:
    """Line number (from 1) and object of each non-empty line.

    Raises `DataError` if the file is missing or its compressed data are damaged.
    """
    with open_text(require_file(path, what)) as file:
        for number, line in enumerate(bounded_lines(file, path), start=1):
            if line.strip():
                yield number, _record(line.strip())


def read_json_records(path: Path, what: str) -> Iterator[tuple[int, Record | Problem]]:
    """Records of a JSON list or of JSON lines; the file is a list if it starts with `[`."""
    is_list = starts_with_list(require_file(path, what))
    return read_json_list(path, what) if is_list else read_json_lines(path, what)


def read_delimited(
    path: Path, delimiter: str, header: list[str] | None = None, has_quotes: bool = True
) -> Iterator[tuple[int, Record | Problem]]:
    """Row number (from 1) and fields of each row; the first line is the header unless one is given.

    Use `has_quotes=False` for corpora whose texts contain unpaired quotation marks. Raises `DataError`
    for an empty file and for a header that names a column twice.
    """
    with open_text(path, newline="") as file:
        lines = bounded_lines(file, path)
        first = next(lines, "")
        named = None if header else _NAMED_DELIMITER.fullmatch(first)
        delimiter = named[1] if named else delimiter
        rows = split_rows(lines if named else chain([first], lines), delimiter, has_quotes)
        names = header or _header(next(rows, None), path)
        for number, fields in enumerate(rows, start=1):
            if isinstance(fields, Problem):
                yield number, fields
            elif len(fields) == len(names):
                yield number, dict(zip(names, fields, strict=True))
            elif fields:
                message = f"the row has {len(fields)} fields, the header {len(names)}"
                yield number, Problem(BAD_RECORD, f"{message}: {shown(delimiter.join(fields))}")


def _header(names: list[str] | Problem | None, path: Path) -> list[str]:
    if isinstance(names, Problem):
        raise DataError(f"table {path} has no header: {names.message}; check --src")
    if not names:
        raise DataError(f"table {path} is empty, without a header line; check --src")
    names = [name.strip() for name in names]
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice:
        raise DataError(
            f"the header of {path} names {shown(twice)} twice; rename one of the columns"
        )
    return names


def require_columns(src: Path, names: tuple[str, ...], needed: tuple[str, ...]) -> None:
    """Raise `DataError` for the first needed column that a table lacks."""
    missing = [name for name in needed if name not in names]
    if missing:
        raise DataError(
            f"{src} has no column {missing[0]!r} ({columns_shown(names)}); "
            f"map one with --columns {missing[0]}=NAME"
        )


def columns_shown(names: tuple[str, ...]) -> str:
    """The columns of a table, and the delimiter that its header may have instead of the expected one."""
    text = f"it has {shown(', '.join(names))[1:-1]}"
    if names and names[0].startswith('"'):
        return f"{text}, with quotation marks, for --quotes yes"
    other = next((mark for mark in _DELIMITERS if len(names) == 1 and mark in names[0]), None)
    return f"{text}, separated by {other!r}, for --delimiter" if other else text


def _record(line: str) -> Record | Problem:
    try:
        record: object = json.loads(line)
    except json.JSONDecodeError as error:
        return Problem(BAD_RECORD, _not_json(line, error))
    except (ValueError, RecursionError) as error:
        return Problem(BAD_RECORD, f"the line is not JSON: {error}")
    return record if isinstance(record, dict) else _not_object("line", record)


def _not_object(what: str, value: object) -> Problem:
    return Problem(BAD_RECORD, f"the {what} is not a JSON object: {shown(value)}")


def _not_json(line: str, error: json.JSONDecodeError) -> str:
    rest = line[error.pos :]
    if line in ("{", "["):
        return "the JSON value has several lines; write one object per line, for example with jq -c"
    if error.msg == "Extra data":
        return f"the line goes on after its JSON value: {shown(rest)}"
    return f"the line is not JSON: {error.msg.removesuffix(' at')} at {shown(rest) if rest else 'its end'}"
