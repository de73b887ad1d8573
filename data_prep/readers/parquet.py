"""Parquet files, as in Hugging Face datasets: one file, or all *.parquet below a folder.

`rows.py` defines the columns. `image` and `audio` are a path, bytes, or {"bytes", "path"}. Bytes are read
by row group when a sample is written; rows of a row group stay together in the shards, so each group is
read about once per split. The split is the column `split`, else declared by the name of the file or its
folder (`train-00000-of-00012.parquet`, `validation/0000.parquet`).
"""

from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pyarrow
from pyarrow import types
from pyarrow.parquet import ParquetFile

from data_prep.corpus import Cell, Item
from data_prep.options import ReaderOptions
from data_prep.readers.columns import standard_columns
from data_prep.readers.media_paths import find_media
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
from data_prep.readers.text_files import Record, columns_shown
from data_prep.readers.walk import find_files
from data_prep.values import is_missing, shown
from muomni.errors import DataError

_ROWS_AT_A_TIME = 1024


def read_image_parquet(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """Rows with an image and one or several captions."""
    root = _media_root(src, options)
    return (image_item(row, root) for row in _rows(src, options, IMAGE_COLUMNS))


def read_speech_parquet(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """Rows with an audio clip and its text."""
    root = _media_root(src, options)
    return (speech_item(row, root, options) for row in _rows(src, options, SPEECH_COLUMNS))


def read_text_parquet(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """Rows with a text, which is read again when it is written."""
    return (text_item(row) for row in _rows(src, options, TEXT_COLUMNS))


def _media_root(src: Path, options: ReaderOptions) -> Path:
    return options.media_root or (src if src.is_dir() else src.parent)


def _rows(src: Path, options: ReaderOptions, needed: tuple[str, ...]) -> Iterator[Row]:
    """The rows of all files; raises `DataError` if there are none, or a file is broken or lacks a column."""
    columns = standard_columns(options.columns, needed)
    root = src if src.is_dir() else src.parent
    media_root = options.media_root or root
    for path in parquet_files(src, options):
        with open_parquet(path) as file:
            present = _present(file.schema_arrow, columns, path, (*needed, *options.columns))
            for column in ("text", "caption"):
                if column in present:
                    _require_text(present[column], column, path)
            yield from _file_rows(file, path, path.relative_to(root), present, media_root)


def parquet_files(src: Path, options: ReaderOptions) -> list[Path]:
    """A Parquet file, or all below a folder; raises `DataError` if there are none."""
    if not src.exists():
        raise DataError(f"Parquet source {src} does not exist; check --src")
    paths = find_files(src, (".parquet", ".pq"), options.skipped) if src.is_dir() else [src]
    if not paths:
        raise DataError(f"{src} contains no *.parquet file; check --src")
    return paths


@contextmanager
def open_parquet(path: Path) -> Iterator[ParquetFile]:
    """Open a Parquet file; raises `DataError` if it is broken, also while it is read."""
    try:
        with ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).partition(". ")[0]
        raise DataError(f"cannot read {path}: {shown(reason)}; download it again") from error


class _Column(NamedTuple):
    """A column, or a field of structs: its name with dots, and its type."""

    name: str
    type: pyarrow.DataType

    def value(self, row: Record) -> object:
        """The value in a row of the batches."""
        value: object = row
        for part in _parts(self.name, row):
            value = value.get(part) if isinstance(value, dict) else None
        return value.decode(errors="surrogateescape") if isinstance(value, bytes) else value


def _parts(name: str, names: Container[str]) -> list[str]:
    """A column whose name may contain dots, and the fields below it."""
    return [name] if name in names else name.split(".")


def _present(
    schema: pyarrow.Schema, columns: dict[str, str], path: Path, needed: tuple[str, ...]
) -> dict[str, _Column]:
    """The columns of a file by standard name; raises `DataError` if one is missing or occurs twice."""
    found: dict[str, _Column] = {}
    for ours, theirs in columns.items():
        first, *fields = _parts(theirs, schema.names)
        if schema.names.count(first) > 1:
            raise DataError(f"{path} has the column {first!r} twice; rename one of them")
        kind = schema.field(first).type if first in schema.names else None
        for field in fields:
            index = kind.get_field_index(field) if kind and types.is_struct(kind) else -1
            kind = kind.field(index).type if kind and index >= 0 else None
        if kind is not None:
            found[ours] = _Column(theirs, kind)
        elif ours in needed:
            names = columns_shown(tuple(schema.names))
            raise DataError(
                f"{path} has no column {theirs!r} ({names}); map one with --columns {ours}=NAME"
            )
    return found


def _require_text(column: _Column, ours: str, path: Path) -> None:
    """Raise `DataError` unless a column has texts, or for captions lists of texts."""
    kind = column.type
    if ours == "caption" and _is_list(kind):
        kind = kind.value_type
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_null(kind) or _is_text(kind) or _is_binary(kind):
        return
    inner = [kind.field(i).name for i in range(kind.num_fields)] if types.is_struct(kind) else []
    if inner and kind is column.type:
        remedy = f"select a field with --columns {ours}={column.name}.{inner[0]}"
        raise DataError(
            f"column {column.name!r} of {path} has the fields {', '.join(inner)}, not a text; {remedy}"
        )
    raise DataError(
        f"column {column.name!r} of {path} is {shown(str(column.type))[1:-1]}, not a text; select another "
        f"one with --columns {ours}=NAME"
    )


def _is_text(kind: pyarrow.DataType) -> bool:
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_binary(kind: pyarrow.DataType) -> bool:
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _is_list(kind: pyarrow.DataType) -> bool:
    return types.is_list(kind) or types.is_large_list(kind)


def _file_rows(
    file: ParquetFile, path: Path, relative: Path, columns: dict[str, _Column], root: Path
) -> Iterator[Row]:
    """The rows of one file; `columns` are those to read by standard name."""
    split = path_split(relative)
    stem = str(relative.with_suffix(""))
    media = next((name for name in ("image", "audio") if name in columns), "")
    lazy, beside = _leaves(columns[media], path) if media else ("", "")
    text = columns["text"].name if not media else ""
    read_now = {name: column for name, column in columns.items() if name != media}
    if beside:
        read_now[media] = _Column(beside, columns[media].type)
    number = 0
    for group in range(file.num_row_groups):
        num_bytes = _mean_bytes(file, group, lazy or text)
        in_group = 0
        names = list(dict.fromkeys(column.name for column in read_now.values()))
        for batch in file.iter_batches(_ROWS_AT_A_TIME, [group], names):
            for row in batch.to_pylist():
                values = {name: column.value(row) for name, column in read_now.items()}
                if is_missing(values.get("split")):
                    values["split"] = split
                cell = Cell(str(path), group, in_group, lazy or text, "", num_bytes)
                if lazy:
                    values[media] = _media_cell(cell, values.get(media), root)
                number += 1
                in_group += 1
                yield Row(
                    name=f"{stem}-{number:08d}",
                    source=f"{relative} row {number}",
                    values=values,
                    span=cell if text else None,
                    block=f"{relative}:{group}" if lazy or text else "",
                )


def _leaves(column: _Column, path: Path) -> tuple[str, str]:
    """Leaf columns of a media column: the one with bytes, read later, and the one with paths, read now.

    Raises `DataError` unless the column is a path, bytes, or {"bytes", "path"}.
    """
    kind, name = column.type, column.name
    if _is_text(kind) or (types.is_dictionary(kind) and _is_text(kind.value_type)):
        return "", name
    if _is_binary(kind):
        return name, ""
    inner = [kind.field(i).name for i in range(kind.num_fields)] if types.is_struct(kind) else []
    if "bytes" in inner:
        return f"{name}.bytes", f"{name}.path" if "path" in inner else ""
    if "path" in inner:
        return "", f"{name}.path"
    raise DataError(
        f"column {name!r} of {path} is {shown(str(kind))[1:-1]}, not a path, bytes, or a struct of bytes and "
        "path; select another one with --columns"
    )


def _media_cell(cell: Cell, beside: object, root: Path) -> Cell:
    """The cell, with the path stored beside its bytes."""
    name = find_media(root, beside) if isinstance(beside, str) and beside else ""
    return Cell(cell.path, cell.row_group, cell.row, cell.column, name, cell.num_bytes)


def _mean_bytes(file: ParquetFile, group: int, leaf: str) -> int:
    """Mean uncompressed size of the values of a leaf column in a row group."""
    row_group = file.metadata.row_group(group)
    chunks = (row_group.column(index) for index in range(row_group.num_columns))
    size = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema == leaf)
    return size // max(1, row_group.num_rows)
