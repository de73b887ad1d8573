"""The forms of conversations in the records of other tools, converted to one list of messages.

A list of turns: `messages` or `conversations` of {role or from, content or value}, or of {user, assistant}
pairs (`texts` of The Cauldron). A question and its answer: `instruction`, `query`, `prompt`, or `question`,
with `input` or `context`, `output`, `response`, `completion`, or `answer`, and earlier rounds in `history`.
`system` precedes them.

A content is a text, or a list of parts: OpenAI's, Anthropic's, Qwen's, and our own.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from data_prep.corpus import BAD_RECORD, TOOL_TURN, BadSampleError
from data_prep.values import is_missing, shown, text_value
from muomni.data.text.turns import MediaKind, Role

_ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
}
# The model writes calls; their results are given to it.
_TOOL_ROLES: dict[str, Role] = {
    **dict.fromkeys(("function_call", "tool_call", "tool_calls"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "tool_result"), "user"),
}
_TURN_LISTS = ("messages", "conversations", "conversation", "texts")
_QUESTIONS = ("instruction", "query", "prompt", "question")
_CONTEXTS = ("input", "context")
_ANSWERS = ("output", "response", "completion", "answer")
_PAIR: dict[str, Role] = {
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("user", "human", *_QUESTIONS), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", *_ANSWERS), "assistant"),
}
MEDIA_KEYS: dict[MediaKind, tuple[str, ...]] = {
    "image": ("image", "images", "image_path", "image_paths"),
    "audio": ("audio", "audios", "audio_path", "audio_paths"),
}
_VIDEO_KEYS = ("video", "videos")
_TEXT_PARTS = ("text", "input_text", "output_text")
_MEDIA_PARTS: dict[str, MediaKind] = {
    **dict.fromkeys(("image", "image_url", "input_image"), "image"),
    **dict.fromkeys(("audio", "audio_url", "input_audio"), "audio"),
}
_KNOWN_PARTS = (*_TEXT_PARTS, *_MEDIA_PARTS)
# Keys of a part with its file, besides its type.
_FILE_KEYS = ("url", "path", "bytes", "base64", "data", "source")
READ_KEYS = frozenset(
    {*_TURN_LISTS, *_QUESTIONS, *_CONTEXTS, *_ANSWERS, *_PAIR, *_VIDEO_KEYS}
    | {
        "content",
        "value",
        "text",
        "system_prompt",
        "tools",
        "history",
        "tool_calls",
        "function_call",
    }
    | {key for keys in MEDIA_KEYS.values() for key in keys}
)


@dataclass(frozen=True, slots=True)
class RawMedium:
    """An image or audio clip of a message; without a value, it is the next one of the record."""

    kind: MediaKind
    value: object = None
    field: str = ""


@dataclass(slots=True)
class Message:
    """A message with its texts and media in order; `spoken` are audio clips of its answer."""

    role: Role
    parts: list[str | RawMedium] = field(default_factory=list)
    spoken: list[RawMedium] = field(default_factory=list)


def messages_of(record: Mapping[str, object], keeps_tools: bool) -> list[Message]:
    """The messages of a record in any form.

    Raises `BadSampleError` for a record without turns, an unknown role or part, video, an answer that is
    excluded from the loss, and a tool turn if they are not kept.
    """
    refuse_video(record)
    messages = list(_system(record, keeps_tools))
    turns = next((record[key] for key in _TURN_LISTS if not is_missing(record.get(key))), None)
    if turns is None:
        return [*messages, *_question_and_answer(record, keeps_tools)]
    if isinstance(turns, str):
        turns = _parsed(turns)
    if not isinstance(turns, list):
        raise BadSampleError(BAD_RECORD, f"the turns are not a list: {shown(turns)}")
    if not turns:
        raise BadSampleError(BAD_RECORD, "the conversation has no turns")
    return [*messages, *(m for turn in turns for m in _from_turn(turn, keeps_tools))]


def media_values(record: Mapping[str, object], kind: MediaKind) -> Iterator[RawMedium]:
    """The images or audio clips beside the texts of a record or message, in order."""
    for key in MEDIA_KEYS[kind]:
        if key in record:
            value = record[key]
            for entry in value if isinstance(value, list) else [value]:
                if not is_missing(entry) and entry not in ("", {}):
                    yield RawMedium(kind, entry, key)


def turn_objects(record: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    """The objects of the turns of a record."""
    for key in _TURN_LISTS:
        turns = record.get(key)
        yield from (
            (turn for turn in turns if isinstance(turn, dict)) if isinstance(turns, list) else ()
        )


def refuse_video(record: Mapping[str, object]) -> None:
    """Raise `BadSampleError` for a record or message with video."""
    key = next((key for key in _VIDEO_KEYS if _given(record, key)), None)
    if key:
        raise BadSampleError(BAD_RECORD, f"the record has {key!r}, and video is not supported")


def _given(record: Mapping[str, object], key: str) -> object:
    """A value that is neither missing nor empty, else None."""
    value = record.get(key)
    return None if is_missing(value) or value in ("", [], {}) else value


def _parsed(text: str) -> object:
    """A list that a table holds as JSON; other texts are returned unchanged."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _system(record: Mapping[str, object], keeps_tools: bool) -> Iterator[Message]:
    """The system turn of the fields `system` and `tools`, if they are not empty."""
    texts = [text_value(record.get(key), key) for key in ("system", "system_prompt")]
    tools = _given(record, "tools")
    if tools and tools != "[]":
        _require_tools("the record has 'tools'", keeps_tools)
        texts.append(tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False))
    if any(text.strip() for text in texts):
        yield Message("system", list(texts))


def _question_and_answer(record: Mapping[str, object], keeps_tools: bool) -> Iterator[Message]:
    def first(keys: tuple[str, ...]) -> str | None:
        return next((key for key in keys if not is_missing(record.get(key))), None)

    question, context, answer = first(_QUESTIONS), first(_CONTEXTS), first(_ANSWERS)
    if answer is None or not (question or context):
        raise BadSampleError(
            BAD_RECORD,
            "the record has neither a list 'messages' or 'conversations' nor a question and its answer; "
            f"its fields are {shown(', '.join(record))[1:-1]}",
        )
    history = _given(record, "history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadSampleError(
                BAD_RECORD, f"an entry of 'history' is not a question and its answer: {shown(pair)}"
            )
        yield Message("user", [text_value(pair[0], "history")])
        yield Message("assistant", [text_value(pair[1], "history")])
    asked = [record[key] for key in (question, context) if key is not None]
    if any(isinstance(value, list) for value in asked):
        for value in asked:
            for turn in value if isinstance(value, list) else []:
                yield from _from_turn(turn, keeps_tools)
    else:
        texts = [text_value(record[key], key) for key in (question, context) if key is not None]
        yield Message("user", ["\n".join(text for text in texts if text.strip())])
    given = record[answer]
    for turn in given if isinstance(given, list) else [{"role": "assistant", "content": given}]:
        yield from _from_turn(turn, keeps_tools)


def _from_turn(turn: object, keeps_tools: bool) -> Iterator[Message]:
    """The messages of one turn, or of a pair of a question and its answer."""
    if not isinstance(turn, dict):
        raise BadSampleError(
            BAD_RECORD, f"a turn is not an object with role and content: {shown(turn)}"
        )
    refuse_video(turn)
    role = next((turn[key] for key in ("role", "from") if not is_missing(turn.get(key))), None)
    if role is None:
        roles = [key for key in _PAIR if not is_missing(turn.get(key))]
        if not roles:
            raise BadSampleError(BAD_RECORD, f"a turn has no role: {shown(turn)}")
        for key in sorted(roles, key=lambda key: ("system", "user", "assistant").index(_PAIR[key])):
            yield Message(_PAIR[key], _parts(turn[key], key))
        return
    yield _from_message(turn, role, keeps_tools)


def _from_message(turn: dict[str, object], name: object, keeps_tools: bool) -> Message:
    key = name.strip().lower() if isinstance(name, str) else ""
    if key in _TOOL_ROLES:
        _require_tools(f"a turn has the role {name!r}", keeps_tools)
    role = _ROLES.get(key) or _TOOL_ROLES.get(key)
    if role is None:
        raise BadSampleError(
            BAD_RECORD, f"a turn has the role {shown(name)}, not system, user, or assistant"
        )
    if role == "assistant" and (
        turn.get("weight") == 0 or turn.get("train") is False or turn.get("loss") is False
    ):
        raise BadSampleError(
            BAD_RECORD, "an answer is excluded from the loss, which is not supported"
        )
    where = next(
        (key for key in ("content", "value", "text") if not is_missing(turn.get(key))), None
    )
    message = Message(role, _parts(turn[where], where) if where else [])
    calls = _given(turn, "tool_calls") or _given(turn, "function_call")
    if calls:
        _require_tools("a turn calls a tool", keeps_tools)
        message.parts += [
            _call_text(call) for call in (calls if isinstance(calls, list) else [calls])
        ]
    images, audios = ([*media_values(turn, kind)] for kind in MEDIA_KEYS)
    if role == "assistant":
        message.parts += images
        message.spoken += audios
    else:
        message.parts[:0] = [*images, *audios]
    return message


def _require_tools(what: str, keeps_tools: bool) -> None:
    if not keeps_tools:
        raise BadSampleError(TOOL_TURN, f"{what}, and --tool-turns is reject")


def _call_text(call: object) -> str:
    """A call as JSON of its name and arguments."""
    inner = call.get("function", call) if isinstance(call, dict) else call
    if isinstance(inner, dict):
        inner = {key: inner[key] for key in ("name", "arguments") if key in inner} or inner
    return inner if isinstance(inner, str) else json.dumps(inner, ensure_ascii=False)


def _parts(content: object, field: str) -> list[str | RawMedium]:
    """The parts of a content: a text, a part, or a list of them."""
    if isinstance(content, str):
        return [content]
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise BadSampleError(
            BAD_RECORD, f"{field!r} is not a text or list of parts: {shown(content)}"
        )
    return [entry for part in content for entry in _part(part, field)]


def _part(part: object, field: str) -> Iterator[str | RawMedium]:
    """The text and media of a part, in order of its keys; a part with only a type is the next medium."""
    if isinstance(part, str):
        yield part
        return
    if not isinstance(part, dict):
        raise BadSampleError(BAD_RECORD, f"a part of {field!r} is not an object: {shown(part)}")
    given = [key for key, value in part.items() if not is_missing(value) and value not in ("", {})]
    kind = next((part[key] for key in given if key == "type"), None)
    media = [key for key in given if key in _MEDIA_PARTS]
    if (kind is None and not {*_TEXT_PARTS, *media} & {*given}) or kind not in (
        None,
        *_KNOWN_PARTS,
    ):
        raise BadSampleError(
            BAD_RECORD,
            f"a part is neither text, image, nor audio (type {shown(kind)}): {shown(part)}",
        )
    for key in given:
        if key in _TEXT_PARTS:
            yield text_value(part[key], key)
        elif key in media:
            yield RawMedium(_MEDIA_PARTS[key], part[key], key)
    if kind in _MEDIA_PARTS and _MEDIA_PARTS[kind] not in {_MEDIA_PARTS[key] for key in media}:
        key = next((key for key in _FILE_KEYS if key in given), None)
        value = part if key in ("bytes", "path") else part[key] if key else None
        yield RawMedium(_MEDIA_PARTS[kind], value, key or kind)
