"""ShareGPT conversations with media, as LLaMA-Factory and others write them: JSON list or JSON lines.

{"conversations": [{"from", "value"}], "images": [path, ...], "audios": [path, ...], "system": text}; also
{"messages": [{"role", "content"}]} with the same placeholders. Each `<image>` and `<audio>` stands for the
next file of its list, so a turn may hold several of both.
"""

from collections.abc import Iterator
from pathlib import Path

from data_prep.corpus import BAD_RECORD, Item, Problem, ReaderOptions
from data_prep.readers.json_records import Record, read_json_records
from data_prep.readers.llava import placed_conversations


def read_sharegpt(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """List the conversations of a file; media paths are relative to it or to `media_root`.

    Raises `DataError` when the file is missing or neither a list nor lines of JSON.
    """
    records = read_json_records(src, "ShareGPT file")
    as_llava = ((number, _as_llava(record)) for number, record in records)
    return placed_conversations(as_llava, src, options)


def _as_llava(record: Record | Problem) -> Record | Problem:
    """The record in LLaVA's form."""
    if isinstance(record, Problem):
        return record
    if record.get("videos"):
        return Problem(BAD_RECORD, "the record has videos, which no stage can read")
    turns = record.get("conversations") or record.get("messages")
    if isinstance(turns, list):
        turns = [_turn(turn) for turn in turns]
        if record.get("system"):
            turns = [{"from": "system", "value": record["system"]}, *turns]
    return {
        **{name: record.get(name) for name in ("id", "group")},
        "image": record.get("images") or record.get("image"),
        "audio": record.get("audios") or record.get("audio"),
        "conversations": turns,
    }


def _turn(turn: object) -> object:
    if not isinstance(turn, dict) or "role" not in turn:
        return turn
    return {**turn, "from": turn["role"], "value": turn.get("content")}
