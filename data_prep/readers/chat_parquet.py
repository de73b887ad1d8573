"""Conversations in Parquet files, as in Hugging Face datasets: one file, or all *.parquet below a folder.

Columns are the fields of a record: `messages` or `conversations`, `images` and `texts` (The Cauldron),
`image` (LLaVA- OneVision), and others of `conversations.py`. Media are paths, bytes, or {"bytes", "path"},
also inside of messages. Bytes beside a path are read when a sample is written, others also when rows are
listed, to see which rows have them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.corpus import Cell, Item, Problem
from data_prep.options import ReaderOptions
from data_prep.readers.chat_media import RecordMedia
from data_prep.readers.conversations import Position, conversation_items
from data_prep.readers.parquet import open_parquet, parquet_files
from data_prep.readers.rows import path_split
from data_prep.readers.text_files import Record

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ParquetFile

_ROWS_AT_A_TIME = 1024
# Rows with media are read whole if no path is stored beside the bytes.
_FEW_ROWS_AT_A_TIME = 16
# Names of fields from the column to a leaf, without the levels of lists.
_Names = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Leaves:
    """Leaf columns of a file: binary ones by their names, and those that are read to list the rows."""

    binary: dict[_Names, str]
    lazy: frozenset[_Names]
    listed: list[str]

    @classmethod
    def of(cls, file: "ParquetFile") -> "_Leaves":
        named = [leaf for field in file.schema_arrow for leaf in _leaves(field.type, (field.name,))]
        paths = [file.schema.column(index).path for index in range(len(file.schema))]
        binary = {
            names: path for (names, is_binary), path in zip(named, paths, strict=True) if is_binary
        }
        beside = {names[:-1] for names, is_binary in named if not is_binary and len(names) > 1}
        lazy = frozenset(names for names in binary if names[-1] == "bytes" and names[:-1] in beside)
        skipped = {binary[names] for names in lazy}
        return cls(binary, lazy, [path for path in paths if path not in skipped])


def read_chat_parquet(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """List the conversations of all files; raises `DataError` if there are none, or a file is broken."""
    root = src if src.is_dir() else src.parent
    for path in parquet_files(src, options):
        media = RecordMedia(path, options.media_root or root, has_positions=False)
        with open_parquet(path) as file:
            records = _records(file, path, path.relative_to(root))
            yield from conversation_items(records, media, options)


def _records(
    file: "ParquetFile", path: Path, relative: Path
) -> Iterator[tuple[Position, Record | Problem]]:
    split = path_split(relative)
    leaves = _Leaves.of(file)
    has_media = {names[0] for names in leaves.binary}
    num_rows = _ROWS_AT_A_TIME if leaves.lazy == leaves.binary.keys() else _FEW_ROWS_AT_A_TIME
    number = 0
    for group in range(file.num_row_groups):
        sizes = _mean_bytes(file, group)
        in_group = 0
        for batch in file.iter_batches(num_rows, [group], leaves.listed):
            for row in batch.to_pylist():
                row_cells = _Cells(path, group, in_group, leaves, sizes)
                for name in has_media & row.keys():
                    row[name] = row_cells.attached(row[name], (name,), ())
                number += 1
                in_group += 1
                position = Position(
                    source=f"{relative} row {number}",
                    name=f"{relative.with_suffix('')}-{number:08d}",
                    block=f"{relative}:{group}" if has_media else "",
                    split=split,
                )
                yield position, row


@dataclass(frozen=True, slots=True)
class _Cells:
    """Puts a `Cell` in place of all bytes of a row."""

    path: Path
    group: int
    row: int
    leaves: _Leaves
    sizes: dict[str, int]

    def attached(self, value: object, names: _Names, index: tuple[int, ...]) -> object:
        """The value with cells; `names` and `index` are its position in the row."""
        if isinstance(value, list):
            return [self.attached(entry, names, (*index, n)) for n, entry in enumerate(value)]
        if isinstance(value, dict):
            fields = {key: self.attached(each, (*names, key), index) for key, each in value.items()}
            if (*names, "bytes") in self.leaves.lazy:
                fields["bytes"] = self._cell((*names, "bytes"), index)
            return fields
        return self._cell(names, index) if isinstance(value, bytes) else value

    def _cell(self, names: _Names, index: tuple[int, ...]) -> Cell:
        column = self.leaves.binary[names]
        size = self.sizes.get(column, 0)
        return Cell(str(self.path), self.group, self.row, column, "", size, index)


def _leaves(kind: "pyarrow.DataType", names: _Names) -> Iterator[tuple[_Names, bool]]:
    """Names of each leaf of a type, and whether it is binary, in the order of the file."""
    import pyarrow.types as types

    if types.is_struct(kind):
        for field in kind.fields:
            yield from _leaves(field.type, (*names, field.name))
    elif types.is_map(kind):
        yield from _leaves(kind.key_type, (*names, "key"))
        yield from _leaves(kind.item_type, (*names, "value"))
    elif types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        yield from _leaves(kind.value_type, names)
    else:
        yield names, types.is_binary(kind) or types.is_large_binary(kind)


def _mean_bytes(file: "ParquetFile", group: int) -> dict[str, int]:
    """Mean uncompressed size of the values of each leaf column in a row group."""
    row_group = file.metadata.row_group(group)
    chunks = (row_group.column(index) for index in range(row_group.num_columns))
    return {c.path_in_schema: c.total_uncompressed_size // max(1, c.num_values) for c in chunks}
