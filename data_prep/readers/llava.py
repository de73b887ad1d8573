"""LLaVA conversations, extended to audio clips.

A JSON list of {"id", "image": path or list, "audio": path or list, "conversations": [{"from", "value"}]}.
Each `<image>` and `<audio>` in a value stands for the next file of its list; files without any
placeholder go before the first human turn, as in LLaVA. A gpt turn may carry "audio": the
audio clip of its value, a spoken answer. Group: the field "group" when given, else the first
image, else the first audio clip, else the id.
"""

from collections.abc import Iterator
from pathlib import Path

from data_prep.corpus import (
    BAD_RECORD,
    BadSampleError,
    Item,
    Part,
    Problem,
    ReaderOptions,
    Role,
    Turn,
    clean_key,
    image_group,
    text_problem,
)
from data_prep.readers.json_records import Record, read_json_list
from muomni.data.text.turns import MEDIA_KINDS, MediaKind, split_placeholders
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

    Raises `DataError` when the file is missing or no JSON list.
    """
    return placed_conversations(read_json_list(src, "LLaVA file"), src, options)


def placed_conversations(
    records: Iterator[tuple[int, Record | Problem]], src: Path, options: ReaderOptions
) -> Iterator[Item]:
    """The conversations of numbered records in LLaVA's form."""
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
    given = {kind: list(paths) for kind, paths in files.items()}
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
            parts = [Part(kind, path) for kind in unplaced for path in _take_all(files[kind])]
            unplaced = []
        parts += _parts(value, files)
        if spoken:
            parts.append(Part("audio", str(root / spoken)))
        turns.append(Turn(role, tuple(parts)))
    left = [path for paths in files.values() for path in paths]
    if left:
        raise BadSampleError(BAD_RECORD, f"{left[0]} is named but has no placeholder")
    name = str(record.get("id") or default_id)
    first = next((paths[0] for paths in (given["image"], given["audio"]) if paths), "")
    group = str(record.get("group") or "") or (image_group(first) if first else f"id:{name}")
    return Item(
        key=clean_key(name),
        group=group,
        source=source,
        turns=tuple(turns),
    )


def _fields(turn: object) -> tuple[Role, str, str]:
    """Role, text and spoken answer of one raw turn."""
    if not isinstance(turn, dict) or turn.get("from") not in _ROLES:
        raise BadSampleError(BAD_RECORD, f"a turn is not from human, gpt or system: {turn!r}"[:120])
    value = turn.get("value")
    if not isinstance(value, str):
        raise BadSampleError(BAD_RECORD, "a turn has no text 'value'")
    problem: Problem | None = text_problem(value, "a turn")
    if problem:
        raise BadSampleError(problem.reason, problem.message)
    role = _ROLES[turn["from"]]
    spoken = str(turn.get("audio") or "")
    if spoken and role != "assistant":
        raise BadSampleError(BAD_RECORD, "only a gpt turn can carry 'audio'; use <audio> elsewhere")
    return role, value, spoken


def _parts(value: str, files: dict[MediaKind, list[str]]) -> list[Part]:
    try:
        return [Part(part.kind, part.value) for part in split_placeholders(value, files)]
    except DataError as error:
        raise BadSampleError(BAD_RECORD, str(error)) from None


def _paths(record: Record, kind: str, root: Path) -> list[str]:
    value = record.get(kind)
    names = value if isinstance(value, list) else [value] if value else []
    return [str(root / str(name)) for name in names]


def _take_all(paths: list[str]) -> list[str]:
    taken = list(paths)
    paths.clear()
    return taken
