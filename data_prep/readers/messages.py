"""Conversations as JSONL: {"id", "messages": [{"role", "content"}]} a line.

`content` is a text or a list of parts {"type": "text", "text"}, {"type": "image", "image": path},
{"type": "audio", "audio": path}. Group: "group" when given, else the first picture or recording.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from data_prep.corpus import (
    BAD_RECORD,
    ROLES,
    BadSampleError,
    Item,
    Part,
    ReaderOptions,
    Turn,
    clean_key,
    picture_group,
    require_file,
    text_problem,
)


def read_messages(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """List the conversations of a JSONL file; raises `DataError` when it is missing."""
    path = require_file(src, "conversation file")
    root = options.media_root or path.parent
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            source = f"{path.name} line {number}"
            name = f"{path.stem}-{number:08d}"
            try:
                yield _item(line, root, source, name)
            except BadSampleError as error:
                yield Item(key=clean_key(name), group=source, source=source, problem=error.problem)


def _item(line: str, root: Path, source: str, default_id: str) -> Item:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise BadSampleError(BAD_RECORD, f"the line is no JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        raise BadSampleError(BAD_RECORD, "the line has no list 'messages'")
    turns = tuple(_turn(message, root) for message in record["messages"])
    media = [part for turn in turns for part in turn.parts if part.kind != "text"]
    media.sort(key=lambda part: part.kind != "image")
    name = str(record.get("id") or default_id)
    group = picture_group(media[0].value) if media else f"id:{name}"
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
