"""Generic tables: CSV or TSV with a header, JSON lines, or a JSON list of objects; one, or all below a folder.

`rows.py` defines the columns; `--columns image=path,caption=title` maps others to them. Media paths are
relative to the folder of the table or to `--media`. TSV has no quotation marks, unless `--quotes yes` is given.
Tables below a folder may declare a split by their name or folder, such as `train.csv` or `test/metadata.csv`.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from data_prep.corpus import BAD_RECORD, Item, Problem
from data_prep.options import ReaderOptions
from data_prep.readers.columns import Columns
from data_prep.readers.json_list import starts_with_list
from data_prep.readers.opening import COMPRESSED_SUFFIXES, plain_name
from data_prep.readers.rows import (
    IMAGE_COLUMNS,
    SPEECH_COLUMNS,
    TEXT_COLUMNS,
    Row,
    image_item,
    path_split,
    speech_item,
    text_item,
)
from data_prep.readers.text_files import Record, read_delimited, read_json_lines, read_json_list
from data_prep.readers.walk import find_files
from data_prep.values import is_missing, shown
from muomni.data.shards.manifest import hash64
from muomni.errors import DataError

_SUFFIXES = {"csv": (".csv",), "tsv": (".tsv",), "jsonl": (".jsonl", ".ndjson", ".json")}
_DELIMITERS = {"csv": ",", "tsv": "\t"}


def read_image_table(
    src: Path, options: ReaderOptions, table_format: str = "csv"
) -> Iterator[Item]:
    """Rows with an image and its caption, which may be a list in JSON."""
    for row, root in _rows(src, options, table_format, IMAGE_COLUMNS):
        yield image_item(row, root)


def read_speech_table(
    src: Path, options: ReaderOptions, table_format: str = "csv"
) -> Iterator[Item]:
    """Rows with an audio clip and its text. Group: column `group`, else the words of the text."""
    for row, root in _rows(src, options, table_format, SPEECH_COLUMNS):
        yield speech_item(row, root, options)


def read_text_table(src: Path, options: ReaderOptions, table_format: str = "csv") -> Iterator[Item]:
    """Rows with a text. Group: column `group`, else the words of the text."""
    return (text_item(row) for row, _ in _rows(src, options, table_format, TEXT_COLUMNS))


def _rows(
    src: Path, options: ReaderOptions, table_format: str, needed: tuple[str, ...]
) -> Iterator[tuple[Row, Path]]:
    """The rows of all tables, with the base of their media paths.

    In hub folders, a table of the whole folder may repeat those of its subfolders; a row is read once. Raises
    `DataError` if there is no table, or one lacks a needed column.
    """
    tables = _Tables(table_files(src, options, table_format), needed)
    for path in tables:
        relative = path.relative_to(src) if src.is_dir() else Path(path.name)
        name = relative.with_name(plain_name(path.name)).as_posix()
        split = path_split(relative) if src.is_dir() else None
        root = options.media_root or path.parent
        columns = Columns(path, options.columns, needed)
        for number, record in _records(path, options, table_format):
            row = Row(f"{name}-{number:08d}", f"{relative} row {number}", {})
            if not isinstance(record, Problem):
                record = columns.select(record, is_fixed=table_format != "jsonl")
            if isinstance(record, Problem):
                row = Row(row.name, row.source, {}, record)
            else:
                row.values.update(record)
                if split and is_missing(record.get("split")):
                    row.values["split"] = split
                if tables.has_read(row, root):
                    continue
            yield row, root
        columns.require_found()


def table_files(src: Path, options: ReaderOptions, table_format: str) -> list[Path]:
    """The table, or all tables below a folder: of JSON, files named `.json` only if there are no others."""
    if not src.is_dir():
        return [src]
    tables = find_files(src, _endings(_SUFFIXES[table_format]), options.skipped)
    others = [path for path in tables if path.name.lower().endswith(_endings((".json",)))]
    if len(others) < len(tables):
        for path in others:
            tables.remove(path)
            options.skipped.add_other(path.name)
    if not tables:
        skipped = options.skipped.report()
        raise DataError(
            f"{src} contains no {' or '.join(_SUFFIXES[table_format])} file"
            f"{f' ({skipped})' if skipped else ''}; check --src and --format"
        )
    return tables


class _Tables:
    """Tables in the order to read, and the rows that one repeats from those of its name in subfolders."""

    def __init__(self, tables: list[Path], needed: tuple[str, ...]) -> None:
        names = {(path.parent, plain_name(path.name)) for path in tables}
        above = (
            (folder, plain_name(path.name)) for path in tables for folder in path.parent.parents
        )
        self._has_media = len(needed) > 1 and not names.isdisjoint(above)
        self._needed = needed
        self._in_other_tables: set[int] = set()
        self._in_this_table: set[int] = set()
        # Tables in subfolders come first, since the names of those may declare splits.
        self._tables = sorted(tables, key=lambda p: -len(p.parts)) if self._has_media else tables

    def __iter__(self) -> Iterator[Path]:
        for path in self._tables:
            yield path
            self._in_other_tables |= self._in_this_table
            self._in_this_table.clear()

    def has_read(self, row: Row, root: Path) -> bool:
        """Whether an earlier table has a row with the same file and text."""
        if not self._has_media:
            return False
        file, text = (row.values.get(name) for name in self._needed)
        code = hash64(repr((os.path.normpath(root / str(file)), text)))
        self._in_this_table.add(code)
        return code in self._in_other_tables


def _endings(suffixes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(suffix + packed for suffix in suffixes for packed in ("", *COMPRESSED_SUFFIXES))


def _records(
    path: Path, options: ReaderOptions, table_format: str
) -> Iterator[tuple[int, Record | Problem]]:
    """Numbered (from 1) records of a table."""
    if table_format == "jsonl":
        if not starts_with_list(path):
            yield from read_json_lines(path, "table")
            return
        for number, entry in read_json_list(path, "table"):
            yield number + 1, entry
        return
    has_quotes = options.quotes == "yes" or (not options.quotes and table_format == "csv")
    delimiter = options.delimiter or _DELIMITERS[table_format]
    for number, record in read_delimited(path, delimiter, has_quotes=has_quotes):
        if not has_quotes and not options.quotes and not isinstance(record, Problem):
            yield number, _unquoted(record)
        else:
            yield number, record


def _unquoted(record: Record) -> Record | Problem:
    """The record, or a problem if a field can only have been written with quotation marks around it."""
    for column, value in record.items():
        field = str(value)
        inner = field[1:-1]
        if field[:1] == '"' == field[-1:] and '""' in inner and '"' not in inner.replace('""', ""):
            return Problem(
                BAD_RECORD,
                f"{column!r} is quoted as in CSV: {shown(field)}; use --quotes yes, or --quotes no to keep the "
                "quotation marks",
            )
    return record
