"""Conversations in JSON lines or JSON lists: one file, or all below a folder, compressed or not.

Media paths are relative to the file or to `--media`. Files and folders may declare a split by their name.
"""

from collections.abc import Iterator
from pathlib import Path

from data_prep.corpus import Item, Problem, declared_split
from data_prep.options import ReaderOptions
from data_prep.readers.chat_media import RecordMedia
from data_prep.readers.conversations import Position, conversation_items
from data_prep.readers.text_files import Record, read_json_records
from data_prep.readers.walk import find_files
from muomni.errors import DataError

_SUFFIXES = tuple(
    suffix + packed
    for suffix in (".jsonl", ".ndjson", ".json")
    for packed in ("", ".gz", ".zst", ".bz2", ".xz")
)


def read_chat_files(src: Path, options: ReaderOptions, what: str, unit: str) -> Iterator[Item]:
    """List the conversations of a file or folder; `unit` names a position in a file.

    Raises `DataError` if there is none, or one is neither a JSON list nor JSON lines.
    """
    if not src.is_dir():
        yield from _items(src, options, what, f"{src.name} {unit}", src.stem, None)
        return
    paths = find_files(src, _SUFFIXES, options.skipped)
    if not paths:
        raise DataError(f"{src} contains no .jsonl or .json file; check --src")
    for path in paths:
        relative = path.relative_to(src)
        split = declared_split(relative.name) or declared_split(relative.parent.name)
        name = relative.as_posix().partition(".json")[0]
        yield from _items(path, options, what, f"{relative} {unit}", name, split)


def _items(
    path: Path, options: ReaderOptions, what: str, source: str, name: str, split: str | None
) -> Iterator[Item]:
    def records() -> Iterator[tuple[Position, Record | Problem]]:
        for number, record in read_json_records(path, what):
            yield Position(f"{source} {number}", f"{name}-{number:08d}", split=split), record

    media = RecordMedia(path, options.media_root or path.parent)
    return conversation_items(records(), media, options)
