"""Conversations in the form of OpenAI's chat API: {"messages": [{"role", "content"}]} a line.

Parts of a content: {"type": "text", "text"}, {"type": "image_url", "image_url": {"url": path}},
{"type": "audio_url", "audio_url": {"url": path}} and {"type": "input_audio", "input_audio": {"data": path}}.
Media are local files, with or without `file://`, any number in a turn.
"""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from data_prep.corpus import BAD_RECORD, BadSampleError, Item, Problem, ReaderOptions
from data_prep.readers.json_records import Record, read_json_records
from data_prep.readers.messages import message_conversations

# Type of a part: our kind, and the field of the path inside.
_MEDIA = {
    "image_url": ("image", "url"),
    "audio_url": ("audio", "url"),
    "input_audio": ("audio", "data"),
}
_MAX_PATH_CHARS = 4096


def read_openai(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """List the conversations of a JSONL file or JSON list; raises `DataError` when it is missing."""
    records = read_json_records(src, "conversation file")
    as_messages = ((number, _as_messages(record)) for number, record in records)
    return message_conversations(as_messages, src, options)


def _as_messages(record: Record | Problem) -> Record | Problem:
    """The record in the form of `messages.py`."""
    if isinstance(record, Problem) or not isinstance(messages := record.get("messages"), list):
        return record
    try:
        return {**record, "messages": [_message(message) for message in messages]}
    except BadSampleError as error:
        return error.problem


def _message(message: object) -> object:
    if not isinstance(message, dict):
        return message
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list):
        content = [_part(part) for part in content]
    return {"role": "system" if role == "developer" else role, "content": content}


def _part(part: object) -> object:
    if not isinstance(part, dict) or part.get("type") not in _MEDIA:
        return part
    kind, field = _MEDIA[part["type"]]
    inner = part.get(part["type"])
    path = str((inner.get(field) if isinstance(inner, dict) else inner) or "")
    if path.startswith("file://"):
        path = unquote(path.removeprefix("file://"))
    is_inline = path.startswith("data:") or len(path) > _MAX_PATH_CHARS
    if not path or is_inline or path.startswith(("http://", "https://")):
        what = "inline" if is_inline else path or "nothing"
        raise BadSampleError(
            BAD_RECORD, f"{part['type']} holds {what}, not the path of a local file"
        )
    return {"type": kind, kind: path}
