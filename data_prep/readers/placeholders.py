"""Conversations with `<image>` and `<audio>` placeholders in their texts: LLaVA and ShareGPT.

LLaVA, extended to audio: a JSON list of
{"id", "image": path or list, "audio": path or list, "conversations": [{"from", "value"}]}.
Each placeholder stands for the next file of its list; without any placeholder, the files precede the
first human turn. A gpt turn may carry "audio", the spoken form of its value. Group: the field "group",
else the first image, else the first audio clip, else the id. "split" declares a split; metrics are also
reported by "type".

ShareGPT, as written by LLaMA-Factory and others, as a JSON list or JSON lines:
{"conversations": [{"from", "value"}], "images": [path, ...], "audios": [path, ...], "system": text}, or
{"messages": [{"role", "content"}]} with the same placeholders.
"""

from collections.abc import Iterator
from pathlib import Path

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
from data_prep.readers.text_files import Record, read_json_list, read_json_records
from muomni.data.text.turns import MEDIA_KINDS, MediaKind, Part, Role, Turn, split_placeholders
from muomni.errors import DataError

_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def read_llava(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """List the conversations of a JSON file; media paths are relative to it or to `media_root`.

    Raises `DataError` if the file is missing or not a JSON list.
    """
    return _conversations(read_json_list(src, "LLaVA file"), src, options)


def read_sharegpt(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """List the conversations of a file; media paths are relative to it or to `media_root`.

    Raises `DataError` if the file is missing or neither a JSON list nor JSON lines.
    """
    records = read_json_records(src, "ShareGPT file")
    return _conversations(((n, _as_llava(record)) for n, record in records), src, options)


def _as_llava(record: Record | Problem) -> Record | Problem:
    """Convert a ShareGPT record to the form of LLaVA."""
    if isinstance(record, Problem):
        return record
    if record.get("videos"):
        return Problem(BAD_RECORD, "the record has videos, which are not supported")
    turns = record.get("conversations") or record.get("messages")
    if isinstance(turns, list):
        turns = [_as_llava_turn(turn) for turn in turns]
        if record.get("system"):
            turns = [{"from": "system", "value": record["system"]}, *turns]
    return {
        **{name: record.get(name) for name in ("id", "group", "split", "type")},
        "image": record.get("images") or record.get("image"),
        "audio": record.get("audios") or record.get("audio"),
        "conversations": turns,
    }


def _as_llava_turn(turn: object) -> object:
    if not isinstance(turn, dict) or "role" not in turn:
        return turn
    return {**turn, "from": turn["role"], "value": turn.get("content")}


def _conversations(
    records: Iterator[tuple[int, Record | Problem]], src: Path, options: ReaderOptions
) -> Iterator[Item]:
    """Items of numbered records in the form of LLaVA."""
    root = options.media_root or src.parent
    for number, record in records:
        source, name = f"{src.name} record {number}", f"{src.stem}-{number:08d}"
        try:
            yield _item(record, root, source, name)
        except BadSampleError as error:
            given = record.get("id") if isinstance(record, dict) else None
            key = clean_key(str(given or name))
            yield Item(key=key, group=source, source=source, problem=error.problem)


def _item(record: Record | Problem, root: Path, source: str, default_id: str) -> Item:
    if isinstance(record, Problem):
        raise BadSampleError(record.reason, record.message)
    conversation = record.get("conversations")
    if not isinstance(conversation, list):
        raise BadSampleError(BAD_RECORD, "the record has no list 'conversations'")
    files: dict[MediaKind, list[str]] = {kind: _paths(record, kind, root) for kind in MEDIA_KINDS}
    first = next((paths[0] for paths in files.values() if paths), "")
    values = [_fields(turn) for turn in conversation]
    unplaced: list[MediaKind] = [
        kind
        for kind in MEDIA_KINDS
        if files[kind] and not any(f"<{kind}>" in value for _, value, _ in values)
    ]
    turns = []
    for role, value, spoken in values:
        parts: list[Part] = []
        if role == "user" and unplaced:
            for kind in unplaced:
                parts += [Part(kind, path) for path in files[kind]]
                files[kind] = []
            unplaced = []
        try:
            parts += split_placeholders(value, files)
        except DataError as error:
            raise BadSampleError(BAD_RECORD, str(error)) from None
        if spoken:
            parts.append(Part("audio", str(root / spoken)))
        turns.append(Turn(role, tuple(parts)))
    unused = [path for paths in files.values() for path in paths]
    if unused:
        raise BadSampleError(BAD_RECORD, f"{unused[0]} is listed but has no placeholder")
    name = str(record.get("id") or default_id)
    group = str(record.get("group") or "") or (image_group(first) if first else f"id:{name}")
    return Item(
        key=clean_key(name),
        group=group,
        source=source,
        declared_split=recorded_split(record),
        turns=tuple(turns),
        metadata=type_of(record),
    )


def _fields(turn: object) -> tuple[Role, str, str]:
    """Role, text, and path of the spoken answer of a turn."""
    if not isinstance(turn, dict) or turn.get("from") not in _ROLES:
        raise BadSampleError(
            BAD_RECORD, f"a turn is not from human, gpt, or system: {turn!r}"[:120]
        )
    value = turn.get("value")
    if not isinstance(value, str):
        raise BadSampleError(BAD_RECORD, "a turn has no text 'value'")
    problem: Problem | None = text_problem(value, "a turn")
    if problem:
        raise BadSampleError(problem.reason, problem.message)
    role = _ROLES[turn["from"]]
    spoken = str(turn.get("audio") or "")
    if spoken and role != "assistant":
        raise BadSampleError(BAD_RECORD, "only gpt turns may have 'audio'; use <audio> elsewhere")
    return role, value, spoken


def _paths(record: Record, kind: str, root: Path) -> list[str]:
    value = record.get(kind)
    names = value if isinstance(value, list) else [value] if value else []
    return [str(root / str(name)) for name in names]
