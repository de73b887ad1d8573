"""Conversations in JSON lines or a JSON list; media paths are relative to the file or to `--media`."""

from collections.abc import Iterator
from pathlib import Path

from data_prep.corpus import Item, Problem
from data_prep.options import ReaderOptions
from data_prep.readers.chat_media import RecordMedia
from data_prep.readers.conversations import Position, conversation_items
from data_prep.readers.text_files import Record, read_json_records


def read_chat_files(src: Path, options: ReaderOptions, what: str, unit: str) -> Iterator[Item]:
    """List the conversations of a file; `unit` names a position in it.

    Raises `DataError` if it is missing or neither a JSON list nor JSON lines.
    """
    media = RecordMedia(src, options.media_root or src.parent)
    return conversation_items(_records(src, what, unit), media, options)


def _records(src: Path, what: str, unit: str) -> Iterator[tuple[Position, Record | Problem]]:
    for number, record in read_json_records(src, what):
        yield Position(f"{src.name} {unit} {number}", f"{src.stem}-{number:08d}"), record
