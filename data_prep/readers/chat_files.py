"""Conversations in JSON lines or JSON lists: one file, or all below a folder, compressed or not.

Media paths are relative to the file or to `--media`. Files below a folder may declare a split by their name.
"""

from collections.abc import Iterator
from pathlib import Path

from data_prep.corpus import Item, Problem
from data_prep.options import ReaderOptions
from data_prep.readers.chat_media import RecordMedia
from data_prep.readers.conversations import Position, conversation_items
from data_prep.readers.opening import plain_name
from data_prep.readers.rows import path_split
from data_prep.readers.table import table_files
from data_prep.readers.text_files import Record, read_json_records


def read_chat_files(src: Path, options: ReaderOptions, what: str, unit: str) -> Iterator[Item]:
    """List the conversations of a file or folder; `unit` names a position in a file.

    Raises `DataError` if there is none, or one is neither a JSON list nor JSON lines.
    """
    for path in table_files(src, options, "jsonl"):
        relative = path.relative_to(src) if src.is_dir() else Path(path.name)
        media = RecordMedia(path, options.media_root or path.parent)
        split = path_split(relative) if src.is_dir() else None
        records = _records(path, relative, split, what, unit)
        yield from conversation_items(records, media, options)


def _records(
    path: Path, relative: Path, split: str | None, what: str, unit: str
) -> Iterator[tuple[Position, Record | Problem]]:
    name = relative.with_name(plain_name(path.name)).as_posix()
    for number, record in read_json_records(path, what):
        yield Position(f"{relative} {unit} {number}", f"{name}-{number:08d}", split=split), record
