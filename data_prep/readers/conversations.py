"""Items of conversations, from records of any form.

`chat_forms.py` reads the messages of a record, `chat_media.py` its media, and `chat_placement.py` puts these
at the tags of the messages. A record is rejected if one of its fields has a file that is not read. Turns after
the last answer are dropped, and the sample records how many. Empty system turns are dropped.

Group: the field `group`, else the first image, else the first audio clip, else the id.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from data_prep.corpus import (
    BAD_RECORD,
    DROPPED_TURNS,
    EMPTY_TEXT,
    BadSampleError,
    Item,
    Problem,
    clean_key,
    recorded_split,
    type_of,
)
from data_prep.options import ReaderOptions
from data_prep.readers.chat_forms import (
    READ_KEYS,
    Message,
    messages_of,
    turn_objects,
)
from data_prep.readers.chat_media import RecordMedia
from data_prep.readers.chat_placement import Placement
from data_prep.readers.columns import ABSENT, field_of
from data_prep.readers.text_files import Record
from data_prep.values import name_value
from muomni.data.text.turns import Part, Turn
from muomni.errors import ConfigError, DataError

# Fields whose values are read, and so may look like the name of a file.
NAME_KEYS = frozenset({"id", "group", "split", "type"})


@dataclass(frozen=True, slots=True)
class Position:
    """Where a record is: `source` for messages, `name` for its key, and what its file declares."""

    source: str
    name: str
    block: str = ""
    split: str | None = None


def conversation_items(
    records: Iterable[tuple[Position, Record | Problem]], media: RecordMedia, options: ReaderOptions
) -> Iterator[Item]:
    """Items of the records of a file; a bad record becomes an item with its problem.

    Raises `ConfigError` for a name in `--columns` that is not read, and `DataError` if no record has its field.
    """
    unknown = next((name for name in options.columns if name not in READ_KEYS | NAME_KEYS), None)
    if unknown:
        raise ConfigError(
            f"--columns: {unknown!r} is not a field that is read, such as messages, image, or instruction"
        )
    unseen, at = set(options.columns), None
    for at, record in records:
        try:
            if isinstance(record, Problem):
                raise BadSampleError(record.reason, record.message)
            if options.columns:
                record = _renamed(record, options.columns)
                unseen -= record.keys()
            yield _item(record, at, media, options)
        except BadSampleError as error:
            yield Item(
                key=clean_key(_name(record) or at.name),
                group=at.source,
                source=at.source,
                problem=error.problem,
                block=at.block,
            )
    if unseen and at:
        name = min(unseen)
        raise DataError(
            f"no record has {options.columns[name]!r} (the last one is {at.source}); check --columns {name}"
        )


def _renamed(record: Record, columns: dict[str, str]) -> Record:
    """A record with the names of `--columns`, which win over fields that have such a name already."""
    mapped = {ours: field_of(record, theirs) for ours, theirs in columns.items()}
    kept = {key: value for key, value in record.items() if key not in {*columns, *columns.values()}}
    return kept | {ours: value for ours, value in mapped.items() if value is not ABSENT}


def _name(record: Record | Problem) -> str:
    try:
        return name_value(record.get("id"), "id") if isinstance(record, dict) else ""
    except BadSampleError:
        return ""


def _item(record: Record, at: Position, media: RecordMedia, options: ReaderOptions) -> Item:
    media.begin(at.source)
    name = name_value(record.get("id"), "id") or at.name
    metadata, split = type_of(record), recorded_split(record) or at.split
    messages = messages_of(record, options.keeps_tools)
    placed = Placement(record, messages, media)
    turns = [(message, placed.parts(message)) for message in messages]
    placed.require_all_used()
    for fields in (record, *turn_objects(record)):
        for key, value in fields.items():
            if key not in READ_KEYS and key not in NAME_KEYS:
                media.refuse_unread(key, value)
    turns = [turn for turn in turns if turn[1] or turn[0].role != "system"]
    kept = _through_last_answer(turns)
    if len(kept) < len(turns):
        metadata[DROPPED_TURNS] = str(len(turns) - len(kept))
    group = name_value(record.get("group"), "group") or placed.group(kept) or f"id:{name}"
    finished = [
        Turn(message.role, (*parts, *(placed.part("audio", raw) for raw in message.spoken)))
        for message, parts in kept
    ]
    listed, finished = placed.listed(finished)
    return Item(
        key=clean_key(name),
        group=group,
        source=at.source,
        declared_split=split,
        media=listed,
        turns=tuple(finished),
        metadata=metadata,
        block=at.block,
    )


def _through_last_answer(
    turns: list[tuple[Message, list[Part]]],
) -> list[tuple[Message, list[Part]]]:
    """The turns up to the last answer that is not empty; raises `BadSampleError` if one of them is empty."""
    answers = [n for n, (message, _) in enumerate(turns) if message.role == "assistant"]
    given = [n for n in answers if turns[n][1] or turns[n][0].spoken]
    if not given:
        reason, what = (
            (EMPTY_TEXT, "answer that is not empty") if answers else (BAD_RECORD, "answer")
        )
        raise BadSampleError(reason, f"the conversation has no {what}")
    kept = turns[: given[-1] + 1]
    if all(message.role == "assistant" for message, _ in kept):
        raise BadSampleError(BAD_RECORD, "the conversation has no question")
    empty = next((message.role for message, parts in kept if not parts), None)
    if empty == "assistant":
        raise BadSampleError(EMPTY_TEXT, "an answer has no text")
    if empty:
        raise BadSampleError(EMPTY_TEXT, f"a turn of {empty} is empty")
    return kept
