"""Parquet files, as in Hugging Face datasets: one file, or all *.parquet below a folder.

`rows.py` defines the columns. `image` and `audio` are a path, bytes, or {"bytes", "path"}. Bytes are read
by row group when a sample is written; rows of a row group stay together in the shards, so each group is
read about once per split. The split is the column `split`, else declared by the name of the file or its
folder (`train-00000-of-00012.parquet`, `validation/0000.parquet`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.corpus import Cell, Item, declared_split
from data_prep.options import ReaderOptions
from data_prep.readers.rows import (
    IMAGE_COLUMNS,
    MORE_COLUMNS,
    SPEECH_COLUMNS,
    TEXT_COLUMNS,
    Row,
    image_item,
    speech_item,
    text_item,
)
from data_prep.readers.text_files import require_columns
from muomni.errors import DataError

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ParquetFile

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
    if not src.exists():
        raise DataError(f"Parquet source {src} does not exist; check --src")
    paths = [src] if src.is_file() else sorted(src.rglob("*.parquet"))
    if not paths:
        raise DataError(f"{src} contains no *.parquet file; check --src")
    import pyarrow.parquet

    root = src if src.is_dir() else src.parent
    media_root = options.media_root or root
    for path in paths:
        with _broken_files(path), pyarrow.parquet.ParquetFile(path) as file:
            standard = {options.columns.get(name, name): name for name in (*needed, *MORE_COLUMNS)}
            present = [str(name) for name in file.schema_arrow.names]
            require_columns(path, tuple(standard.get(name, name) for name in present), needed)
            names = {name: standard[name] for name in present if name in standard}
            yield from _file_rows(file, path, path.relative_to(root), names, media_root)


@contextmanager
def _broken_files(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"cannot read {path}: {error}; download it again") from error


def _file_rows(
    file: "ParquetFile", path: Path, relative: Path, names: dict[str, str], root: Path
) -> Iterator[Row]:
    """The rows of one file; `names` maps the columns to read to standard names."""
    split = declared_split(relative.name) or declared_split(relative.parent.name)
    stem = str(relative.with_suffix(""))
    media = next((column for column, name in names.items() if name in ("image", "audio")), "")
    lazy, beside = _leaves(file.schema_arrow.field(media), path) if media else ("", "")
    text = next((column for column, name in names.items() if name == "text" and not media), "")
    eager = [column for column in names if column != media] + ([beside] if beside else [])
    number = 0
    for group in range(file.num_row_groups):
        num_bytes = _mean_bytes(file, group, lazy or text)
        in_group = 0
        for batch in file.iter_batches(_ROWS_AT_A_TIME, [group], eager):
            for row in batch.to_pylist():
                values = {names[column]: value for column, value in row.items()}
                values["split"] = values.get("split") or split
                cell = Cell(str(path), group, in_group, lazy or text, "", num_bytes)
                if lazy:
                    values[names[media]] = _media_cell(cell, row.get(media), root)
                number += 1
                in_group += 1
                yield Row(
                    name=f"{stem}-{number:08d}",
                    source=f"{relative} row {number}",
                    values=values,
                    span=cell if text else None,
                    block=f"{relative}:{group}" if lazy or text else "",
                )


def _leaves(field: "pyarrow.Field", path: Path) -> tuple[str, str]:
    """Leaf columns of a media column: the one with bytes, read later, and the one with paths, read now.

    Raises `DataError` unless the column is a path, bytes, or {"bytes", "path"}.
    """
    import pyarrow.types as types

    kind, name = field.type, field.name
    if types.is_string(kind) or types.is_large_string(kind):
        return "", name
    if types.is_binary(kind) or types.is_large_binary(kind):
        return name, ""
    inner = [kind.field(i).name for i in range(kind.num_fields)] if types.is_struct(kind) else []
    if "bytes" in inner:
        return f"{name}.bytes", f"{name}.path" if "path" in inner else ""
    raise DataError(
        f"column {name!r} of {path} is {kind}, not a path, bytes, or a struct of bytes and path; "
        "select another one with --columns"
    )


def _media_cell(cell: Cell, value: object, root: Path) -> Cell:
    """The cell, with the path stored beside its bytes."""
    beside = value.get("path") if isinstance(value, dict) else None
    name = str(root / str(beside)) if beside else ""
    return Cell(cell.path, cell.row_group, cell.row, cell.column, name, cell.num_bytes)


def _mean_bytes(file: "ParquetFile", group: int, leaf: str) -> int:
    """Mean uncompressed size of the values of a leaf column in a row group."""
    row_group = file.metadata.row_group(group)
    chunks = (row_group.column(index) for index in range(row_group.num_columns))
    size = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema == leaf)
    return size // max(1, row_group.num_rows)
