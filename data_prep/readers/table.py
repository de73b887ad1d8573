"""Generic tables: CSV or TSV with a header, or JSONL with an object a line.

The columns are those of `rows.py`; `--columns image=path,caption=title` gives other names. Media paths
are relative to the table's folder, or to `--media`.
"""

import csv
from collections.abc import Iterator
from pathlib import Path

from data_prep.corpus import BAD_RECORD, Item, Problem, ReaderOptions, require_file
from data_prep.readers.json_records import read_json_lines
from data_prep.readers.rows import (
    IMAGE_COLUMNS,
    SPEECH_COLUMNS,
    TEXT_COLUMNS,
    Row,
    image_item,
    speech_item,
    text_item,
)
from data_prep.readers.text_files import open_text
from muomni.errors import DataError

_MAX_FIELD_CHARS = 1 << 30
_JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")


def read_image_table(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """Rows with an image and its caption; `caption` may be a list in JSONL."""
    root = options.media_root or src.parent
    return (image_item(row, root) for row in _rows(src, options, IMAGE_COLUMNS))


def read_speech_table(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """Rows with an audio clip and its text; group: column `group`, else the words of the text."""
    root = options.media_root or src.parent
    return (speech_item(row, root, options) for row in _rows(src, options, SPEECH_COLUMNS))


def read_text_table(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """Rows with a text each; group: column `group`, else the words of the text."""
    return (text_item(row) for row in _rows(src, options, TEXT_COLUMNS))


def _rows(src: Path, options: ReaderOptions, needed: tuple[str, ...]) -> Iterator[Row]:
    """The rows of a table; raises `DataError` when it is missing or lacks a needed column."""
    require_file(src, "table")
    is_json = src.suffix in _JSON_SUFFIXES
    if is_json:
        records = read_json_lines(src, "table")
    else:
        records = read_delimited(src, "\t" if src.suffix == ".tsv" else ",")
    for number, record in records:
        name, source = f"{src.stem}-{number:08d}", f"{src.name} row {number}"
        if isinstance(record, Problem):
            yield Row(name, source, {}, record)
            continue
        values = standard_names(record, options)
        if number == 1 or not is_json:
            require_columns(src, tuple(values), needed)
        yield Row(name, source, values)


def standard_names(record: dict[str, object], options: ReaderOptions) -> dict[str, object]:
    """A record under the standard column names."""
    renamed = {theirs: ours for ours, theirs in options.columns.items()}
    return {renamed.get(name, name): value for name, value in record.items()}


def require_columns(src: Path, names: tuple[str, ...], needed: tuple[str, ...]) -> None:
    """Raise `DataError` that names the first needed column that a table lacks."""
    missing = [name for name in needed if name not in names]
    if missing:
        raise DataError(
            f"{src} has no column {missing[0]!r} (it has {', '.join(names)}); "
            f"name it with --columns {missing[0]}=NAME"
        )


def read_delimited(
    path: Path, delimiter: str, header: list[str] | None = None, has_quotes: bool = True
) -> Iterator[tuple[int, dict[str, object] | Problem]]:
    """Number, from 1, and fields of each row; the first line names them unless `header` does.

    Corpora whose texts hold bare quotation marks are read with `has_quotes` false. Raises `DataError`
    for an empty file or one that is no table.
    """
    csv.field_size_limit(_MAX_FIELD_CHARS)
    quoting = csv.QUOTE_MINIMAL if has_quotes else csv.QUOTE_NONE
    with open_text(path, newline="") as file:
        rows = csv.reader(file, delimiter=delimiter, quoting=quoting)
        try:
            names = header or next(rows, None)
            if names is None:
                raise DataError(
                    f"table {path} is empty, without even a line of column names; check --src"
                )
            for number, fields in enumerate(rows, start=1):
                if len(fields) == len(names):
                    yield number, dict(zip(names, fields, strict=True))
                elif fields:
                    message = f"the row has {len(fields)} fields, the header {len(names)}"
                    yield number, Problem(BAD_RECORD, message)
        except csv.Error as error:
            raise DataError(f"cannot read {path}: {error}") from error
