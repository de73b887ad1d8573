"""Conversations as JSONL: {"id", "messages": [{"role", "content"}]} a line.

`content` is a text or a list of parts {"type": "text", "text"}, {"type": "image", "image": path},
{"type": "audio", "audio": path}. Group: "group" when given, else the first image or audio clip.
"""

from collections.abc import Iterator
from pathlib import Path

from data_prep.corpus import (
    BAD_RECORD,
    ROLES,
    BadSampleError,
    Item,
    Part,
    Problem,
    ReaderOptions,
    Turn,
    clean_key,
    image_group,
    text_problem,
)
from data_prep.readers.json_records import Record, read_json_lines


def read_messages(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """List the conversations of a JSONL file; raises `DataError` when it is missing."""
    return message_conversations(read_json_lines(src, "conversation file"), src, options)


def message_conversations(
    records: Iterator[tuple[int, Record | Problem]], src: Path, options: ReaderOptions
) -> Iterator[Item]:
    """The conversations of numbered records in this form; media paths relative to `src` or `--media`."""
    root = options.media_root or src.parent
    for number, record in records:
        source, name = f"{src.name} line {number}", f"{src.stem}-{number:08d}"
        try:
            yield _item(record, root, source, name)
        except BadSampleError as error:
            yield Item(key=clean_key(name), group=source, source=source, problem=error.problem)


def _item(record: Record | Problem, root: Path, source: str, default_id: str) -> Item:
    if isinstance(record, Problem):
        raise BadSampleError(record.reason, record.message)
    messages = record.get("messages")
    if not isinstance(messages, list):
        raise BadSampleError(BAD_RECORD, "the line has no list 'messages'")
    turns = tuple(_turn(message, root) for message in messages)
    media = [part for turn in turns for part in turn.parts if part.kind != "text"]
    media.sort(key=lambda part: part.kind != "image")
    name = str(record.get("id") or default_id)
    group = image_group(media[0].value) if media else f"id:{name}"
    return Item(
        key=clean_key(name),
        group=str(record.get("group") or "") or group,
        source=source,
        turns=turns,
    )


def _turn(message: object, root: Path) -> Turn:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise BadSampleError(BAD_RECORD, f"a message has no role of {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise BadSampleError(BAD_RECORD, "a message has no 'content'")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "image", "audio") or not isinstance(part.get(kind), str):
            raise BadSampleError(BAD_RECORD, f"a part is no text, image or audio: {part!r}"[:120])
        if kind == "text":
            problem = text_problem(part["text"], "a text part")
            if problem:
                raise BadSampleError(problem.reason, problem.message)
        parts.append(Part(kind, part["text"].strip() if kind == "text" else str(root / part[kind])))
    return Turn(message["role"], tuple(parts))
