"""Objects of a JSON list or of JSON lines (also .gz), for all readers of such files.

What is no object comes out as a `Problem`, so that one bad line costs one sample.
"""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

from data_prep.corpus import BAD_RECORD, Problem, require_file
from data_prep.readers.text_files import bounded_lines, open_text
from muomni.errors import DataError

Record = dict[str, object]


def read_json_lines(path: Path, what: str) -> Iterator[tuple[int, Record | Problem]]:
    """Number, from 1, and object of each line that is not empty.

    Raises `DataError` when the file is missing or is no whole gzip file.
    """
    with open_text(require_file(path, what)) as file:
        try:
            for number, line in enumerate(bounded_lines(file, path), start=1):
                if line.strip():
                    yield number, _record(line)
        except (EOFError, gzip.BadGzipFile) as error:
            raise DataError(f"cannot read {path}: {error}; unpack or fetch it again") from error


def read_json_list(path: Path, what: str) -> Iterator[tuple[int, Record | Problem]]:
    """Number, from 0, and object of each entry of a file that holds one list.

    Raises `DataError` when the file is missing or holds anything else.
    """
    content = read_json(path, what)
    if not isinstance(content, list):
        raise DataError(f"{path} is no {what}: the top level is not a list")
    for number, record in enumerate(content):
        is_object = isinstance(record, dict)
        yield number, record if is_object else Problem(BAD_RECORD, "the entry is no JSON object")


def read_json_records(path: Path, what: str) -> Iterator[tuple[int, Record | Problem]]:
    """The objects of either form: a list when the first sign of the file is `[`."""
    with open_text(require_file(path, what)) as file:
        first = next((line for line in bounded_lines(file, path) if line.strip()), "").lstrip()
    return read_json_list(path, what) if first.startswith("[") else read_json_lines(path, what)


def read_json(path: Path, what: str) -> object:
    """The content of a JSON file; raises `DataError` when it is missing or no JSON."""
    with open_text(require_file(path, what)) as file:
        try:
            return json.load(file)
        except (ValueError, RecursionError) as error:
            raise DataError(f"cannot read the {what} {path}: {error}") from error


def _record(line: str) -> Record | Problem:
    try:
        record: object = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Problem(BAD_RECORD, f"the line is no JSON: {error}")
    return record if isinstance(record, dict) else Problem(BAD_RECORD, "the line is no JSON object")
