"""Conversations as lists of messages: our JSON lines, and the chat API of OpenAI.

JSON lines: {"id", "messages": [{"role", "content"}]}, where `content` is a text or a list of
{"type": "text", "text"}, {"type": "image", "image": path}, and {"type": "audio", "audio": path}.
Group: the field "group", else the first image, else the first audio clip, else the id. "split" declares a
split; metrics are also reported by "type".

OpenAI: JSON lines or a JSON list with parts {"type": "image_url", "image_url": {"url": path}},
{"type": "audio_url", "audio_url": {"url": path}}, and {"type": "input_audio", "input_audio": {"data": path}}.
Media are local files, with or without `file://`.
"""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from data_prep.corpus import (
    BAD_RECORD,
    BadSampleError,
    Item,
    Problem,
    clean_key,
    image_group,
    recorded_split,
    text_problem,
    type_of,
)
from data_prep.options import ReaderOptions
from data_prep.readers.text_files import Record, read_json_lines, read_json_records
from muomni.data.text.turns import ROLES, Part, Turn

# OpenAI's type of a part: our kind, and the inner field with the path.
_OPENAI_MEDIA = {
    "image_url": ("image", "url"),
    "audio_url": ("audio", "url"),
    "input_audio": ("audio", "data"),
}
_MAX_PATH_CHARS = 4096


def read_messages(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """List the conversations of a JSON-lines file; raises `DataError` if it is missing."""
    return _conversations(read_json_lines(src, "conversation file"), src, options)


def read_openai(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """List the conversations of a JSON-lines file or JSON list; raises `DataError` if it is missing."""
    records = read_json_records(src, "conversation file")
    return _conversations(((n, _from_openai(record)) for n, record in records), src, options)


def _conversations(
    records: Iterator[tuple[int, Record | Problem]], src: Path, options: ReaderOptions
) -> Iterator[Item]:
    """Items of numbered records; media paths are relative to the folder of `src` or to `--media`."""
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
        declared_split=recorded_split(record),
        turns=turns,
        metadata=type_of(record),
    )


def _turn(message: object, root: Path) -> Turn:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise BadSampleError(BAD_RECORD, f"the role of a message is not one of {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise BadSampleError(BAD_RECORD, "a message has no 'content'")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "image", "audio") or not isinstance(part.get(kind), str):
            raise BadSampleError(BAD_RECORD, f"a part is not text, image, or audio: {part!r}"[:120])
        if kind == "text":
            problem = text_problem(part["text"], "a text part")
            if problem:
                raise BadSampleError(problem.reason, problem.message)
        parts.append(Part(kind, part["text"].strip() if kind == "text" else str(root / part[kind])))
    return Turn(message["role"], tuple(parts))


def _from_openai(record: Record | Problem) -> Record | Problem:
    """Convert a record of OpenAI's form to ours."""
    if isinstance(record, Problem) or not isinstance(messages := record.get("messages"), list):
        return record
    try:
        return {**record, "messages": [_from_openai_message(message) for message in messages]}
    except BadSampleError as error:
        return error.problem


def _from_openai_message(message: object) -> object:
    if not isinstance(message, dict):
        return message
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list):
        content = [_from_openai_part(part) for part in content]
    return {"role": "system" if role == "developer" else role, "content": content}


def _from_openai_part(part: object) -> object:
    if not isinstance(part, dict) or part.get("type") not in _OPENAI_MEDIA:
        return part
    kind, field = _OPENAI_MEDIA[part["type"]]
    inner = part.get(part["type"])
    path = str((inner.get(field) if isinstance(inner, dict) else inner) or "")
    if path.startswith("file://"):
        path = unquote(path.removeprefix("file://"))
    is_inline = path.startswith("data:") or len(path) > _MAX_PATH_CHARS
    if not path or is_inline or path.startswith(("http://", "https://")):
        found = "inline data" if is_inline else path or "nothing"
        raise BadSampleError(
            BAD_RECORD, f"{part['type']} contains {found} instead of the path of a local file"
        )
    return {"type": kind, kind: path}
