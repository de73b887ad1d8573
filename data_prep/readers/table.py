"""Generic tables: CSV or TSV with a header, or JSON lines.

`rows.py` defines the columns; `--columns image=path,caption=title` maps others to them. Media paths are
relative to the folder of the table or to `--media`.
"""

from collections.abc import Iterator
from pathlib import Path

from data_prep.corpus import Item, Problem, require_file
from data_prep.options import ReaderOptions
from data_prep.readers.rows import (
    IMAGE_COLUMNS,
    SPEECH_COLUMNS,
    TEXT_COLUMNS,
    Row,
    image_item,
    speech_item,
    text_item,
)
from data_prep.readers.text_files import read_delimited, read_json_lines, require_columns

_JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")


def read_image_table(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """Rows with an image and its caption, which may be a list in JSON lines."""
    root = options.media_root or src.parent
    return (image_item(row, root) for row in _rows(src, options, IMAGE_COLUMNS))


def read_speech_table(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """Rows with an audio clip and its text. Group: column `group`, else the words of the text."""
    root = options.media_root or src.parent
    return (speech_item(row, root, options) for row in _rows(src, options, SPEECH_COLUMNS))


def read_text_table(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """Rows with a text. Group: column `group`, else the words of the text."""
    return (text_item(row) for row in _rows(src, options, TEXT_COLUMNS))


def _rows(src: Path, options: ReaderOptions, needed: tuple[str, ...]) -> Iterator[Row]:
    """The rows of a table; raises `DataError` if it is missing or lacks a needed column."""
    require_file(src, "table")
    is_json = src.suffix in _JSON_SUFFIXES
    if is_json:
        records = read_json_lines(src, "table")
    else:
        records = read_delimited(src, "\t" if src.suffix == ".tsv" else ",")
    standard = {theirs: ours for ours, theirs in options.columns.items()}
    for number, record in records:
        name, source = f"{src.stem}-{number:08d}", f"{src.name} row {number}"
        if isinstance(record, Problem):
            yield Row(name, source, {}, record)
            continue
        values = {standard.get(column, column): value for column, value in record.items()}
        if number == 1 or not is_json:
            require_columns(src, tuple(values), needed)
        yield Row(name, source, values)
