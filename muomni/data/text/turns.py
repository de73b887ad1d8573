"""Turns of a conversation, and the .json member that stores them in an sft sample.

Data preparation, training, and inference share these types. Nothing here imports torch.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from muomni.errors import DataError

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")
MediaKind = Literal["image", "audio"]
MEDIA_KINDS: tuple[MediaKind, ...] = ("image", "audio")
PartKind = Literal["text", "image", "audio"]
_PLACEHOLDER = re.compile("<image>|<audio>")


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a turn: a text, or the name or path of an image or audio clip."""

    kind: PartKind
    value: str


@dataclass(frozen=True, slots=True)
class Turn:
    """One message; an audio part of an assistant turn is the spoken answer."""

    role: Role
    parts: tuple[Part, ...]


def read_turns(sample: Mapping[str, Any]) -> list[Turn]:
    """Parse the .json member of an sft sample; raises DataError if it is missing or malformed."""
    if "json" not in sample:
        raise DataError("the sample has no .json member with its turns")
    try:
        turns = json.loads(sample["json"])["turns"]
        return [Turn(_role(turn["role"]), tuple(map(_part, turn["content"]))) for turn in turns]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"its .json member has no list of turns ({error!r})") from None


def turns_as_json(turns: Iterable[Turn]) -> list[dict[str, Any]]:
    """The value of "turns" in the .json member; inverse of `read_turns`."""
    return [
        {
            "role": turn.role,
            "content": [
                {"type": part.kind, _value_key(part.kind): part.value} for part in turn.parts
            ],
        }
        for turn in turns
    ]


def split_placeholders(text: str, files: Mapping[MediaKind, list[str]]) -> list[Part]:
    """Split a text at each `<image>` and `<audio>`, which takes the first name from its list.

    Text parts are stripped. Raises DataError for a placeholder whose list is empty.
    """

    def next_file(tag: re.Match[str]) -> Part:
        kind: MediaKind = "image" if tag[0] == "<image>" else "audio"
        if not files[kind]:
            raise DataError(f"{tag[0]} has no file in {kind!r}")
        return Part(kind, files[kind].pop(0))

    return split_text(text, _PLACEHOLDER, next_file)


def split_text(
    text: str, tag: re.Pattern[str], part_of: Callable[[re.Match[str]], Part | None]
) -> list[Part]:
    """Split a text at its tags, and replace each tag by its part; a tag without a part (None) stays text.

    Text parts are stripped, and empty ones are dropped.
    """
    parts: list[Part] = []
    start = 0
    for match in tag.finditer(text):
        part = part_of(match)
        if part is not None:
            parts += [*_stripped(text[start : match.start()]), part]
            start = match.end()
    return [*parts, *_stripped(text[start:])]


def find_medium(media: Mapping[str, bytes], name: str) -> bytes:
    """The bytes of an image or audio clip; raises DataError if the sample lacks it.

    The names of a sample's members are in lower case, whatever the case in its tar.
    """
    found = media.get(name, media.get(name.lower()))
    if found is None:
        raise DataError(f"a turn refers to {name}, which is not in the sample")
    return found


def _stripped(text: str) -> list[Part]:
    return [Part("text", text.strip())] if text.strip() else []


def _role(name: Any) -> Role:
    if name not in ROLES:
        raise DataError(f"a turn has role {name!r}; must be one of {', '.join(ROLES)}")
    return name


def _part(content: dict[str, Any]) -> Part:
    kind = content["type"]
    if kind not in ("text", *MEDIA_KINDS):
        raise DataError(f"a part has type {kind!r}; must be text, image, or audio")
    return Part(kind, str(content[_value_key(kind)]))


def _value_key(kind: PartKind) -> str:
    return "text" if kind == "text" else "name"
