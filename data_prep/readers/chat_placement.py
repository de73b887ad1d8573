"""Put the images and audio clips of a conversation at their tags.

A tag takes the next image or audio clip of its message, else of the record, or the one of its number or name.
Media of a record without tags precede its first question. Tags and media that do not agree are refused.
"""

import re
from collections.abc import Iterator
from functools import partial

from data_prep.corpus import (
    BAD_RECORD,
    BadSampleError,
    Blob,
    Cell,
    Media,
    image_group,
    text_problem,
)
from data_prep.readers.chat_forms import Message, RawMedium, media_values
from data_prep.readers.chat_media import RecordMedia, is_media_object
from data_prep.readers.tags import TAG, Tag, stands_alone, tag_of, tags_in
from data_prep.readers.text_files import Record
from data_prep.values import is_missing, shown
from muomni.data.text.turns import MEDIA_KINDS, MediaKind, Part, Role, Turn, split_text


class Placement:
    """Puts the media of one record at their tags.

    `not_files` are the media besides files, by name.
    """

    def __init__(self, record: Record, messages: list[Message], media: RecordMedia) -> None:
        self._media = media
        self._files: dict[MediaKind, list[tuple[str, Media]]] = {kind: [] for kind in MEDIA_KINDS}
        self._used: dict[MediaKind, set[int]] = {kind: set() for kind in MEDIA_KINDS}
        self.not_files: dict[str, Media] = {}
        for kind in MEDIA_KINDS:
            for raw in media_values(record, kind):
                self._files[kind] += _by_tag(raw, media)
        self._asked = self._tags(messages, is_answer=False)
        answered = self._tags(messages, is_answer=True)
        self._unplaced: list[MediaKind] = [
            kind
            for kind in MEDIA_KINDS
            if self._files[kind] and not self._asked[kind] and not answered[kind]
        ]

    @staticmethod
    def _tags(messages: list[Message], is_answer: bool) -> dict[MediaKind, list[Tag]]:
        """Tags in questions or answers by kind, including parts that have only a type."""
        found: dict[MediaKind, list[Tag]] = {kind: [] for kind in MEDIA_KINDS}
        for message in messages:
            if (message.role == "assistant") == is_answer:
                for part in message.parts:
                    if isinstance(part, str):
                        if "<" in part:
                            for tag in tags_in(part):
                                found[tag.kind].append(tag)
                    elif part.value is None:
                        found[part.kind].append(Tag(part.kind, part.field))
        return found

    def part(self, kind: MediaKind, raw: RawMedium) -> Part:
        """The part of an image or audio clip with a value."""
        return self._as_part(kind, self._media.medium(raw.value, raw.field))

    def parts(self, message: Message) -> list[Part]:
        """The parts of a message; the first question gets the media of a record without tags."""
        parts: list[Part] = []
        if message.role == "user":
            for kind in self._unplaced:
                parts += [self._as_part(kind, medium) for _, medium in self._files[kind]]
                self._used[kind].update(range(len(self._files[kind])))
            self._unplaced = []
        own = self._own_files(message)
        for entry in message.parts:
            if isinstance(entry, RawMedium):
                if entry.value is None:
                    index = self._next(Tag(entry.kind, f"a part of type {entry.field!r}"))
                    parts.append(self._as_part(entry.kind, self._files[entry.kind][index][1]))
                elif entry.kind not in own:
                    parts.append(self.part(entry.kind, entry))
            elif entry.strip():
                problem = text_problem(entry, "a turn")
                if problem:
                    raise BadSampleError(problem.reason, problem.message)
                if "<" in entry:
                    at_tag = partial(self._at_tag, role=message.role, own=own)
                    parts += split_text(entry, TAG, at_tag)
                else:
                    parts.append(Part("text", entry.strip()))
        left = next((kind for kind, files in own.items() if files), None)
        if left:
            raise BadSampleError(BAD_RECORD, f"a turn has fewer <{left}> tags than files")
        return parts

    def _own_files(self, message: Message) -> dict[MediaKind, list[Media]]:
        """Media of a message that its texts have tags for, if the record has none."""
        if all(isinstance(entry, str) for entry in message.parts):
            return {}
        found = self._tags([message], is_answer=False)
        raw = [
            entry
            for entry in message.parts
            if isinstance(entry, RawMedium) and entry.value is not None
        ]
        return {
            kind: own
            for kind in MEDIA_KINDS
            if found[kind] and not self._files[kind]
            if (
                own := [
                    self._media.medium(each.value, each.field) for each in raw if each.kind == kind
                ]
            )
        }

    def _at_tag(
        self, match: re.Match[str], role: Role, own: dict[MediaKind, list[Media]]
    ) -> Part | None:
        """The part for a tag in a text; None if it is words."""
        tag = tag_of(match)
        if tag is None:
            return None
        files = self._files[tag.kind]
        if tag.path:
            return self._at_path(tag)
        if tag.kind in own:
            if not own[tag.kind]:
                raise BadSampleError(BAD_RECORD, f"a turn has more {tag.words} tags than files")
            return self._as_part(tag.kind, own[tag.kind].pop(0))
        if not files and role != "assistant" and stands_alone(match):
            raise BadSampleError(
                BAD_RECORD, f"{tag.words} has no file; the record has no {tag.kind}"
            )
        is_words = role == "assistant" and len(self._asked[tag.kind]) >= len(files)
        if not files or is_words:
            return None
        index = self._next(tag)
        return self._as_part(tag.kind, files[index][1])

    def _at_path(self, tag: Tag) -> Part:
        """The part of a tag around a path, which the record may list as well."""
        medium = self._media.medium(tag.path, tag.words)
        for index, (_, listed) in enumerate(self._files[tag.kind]):
            if listed == medium:
                self._used[tag.kind].add(index)
        return self._as_part(tag.kind, medium)

    def _next(self, tag: Tag) -> int:
        """Index of the file for a tag: by its name or number, else the first one without a tag."""
        files, used = self._files[tag.kind], self._used[tag.kind]
        index = next((n for n, (name, _) in enumerate(files) if name == tag.words.lower()), None)
        if index is None and tag.number is not None:
            starts_at_0 = any(each.number == 0 for each in self._asked[tag.kind])
            index = tag.number - (0 if starts_at_0 else 1)
        elif index is None:
            index = next((n for n in range(len(files)) if n not in used), len(files))
        if not 0 <= index < len(files):
            raise BadSampleError(
                BAD_RECORD,
                f"{tag.words} has no file; the record has {len(files)} of type {tag.kind}",
            )
        used.add(index)
        return index

    def _as_part(self, kind: MediaKind, medium: Media) -> Part:
        if not isinstance(medium, str):
            self.not_files[str(medium)] = medium
        return Part(kind, str(medium))

    def require_all_used(self) -> None:
        """Raise `BadSampleError` for a medium of the record without a tag."""
        for kind, files in self._files.items():
            for index, (_, medium) in enumerate(files):
                if index not in self._used[kind]:
                    raise BadSampleError(
                        BAD_RECORD, f"{shown(str(medium))[1:-1]} is listed but has no <{kind}> tag"
                    )

    def listed(self, turns: list[Turn]) -> tuple[tuple[Media, ...], list[Turn]]:
        """All media, and the turns with their positions in place of names; no change if all are files."""
        if not self.not_files:
            return (), turns
        media: list[Media] = []
        changed = []
        for turn in turns:
            parts = []
            for part in turn.parts:
                if part.kind != "text":
                    media.append(self.not_files.get(part.value, part.value))
                    part = Part(part.kind, str(len(media) - 1))
                parts.append(part)
            changed.append(Turn(turn.role, tuple(parts)))
        return tuple(media), changed

    def group(self, turns: list[tuple[Message, list[Part]]]) -> str:
        """The group of the first image, else audio clip; empty without media that can be compared."""
        media = [part for _, parts in turns for part in parts if part.kind != "text"]
        media.sort(key=lambda part: part.kind != "image")
        if not media:
            return ""
        medium = self.not_files.get(media[0].value, media[0].value)
        if isinstance(medium, Blob):
            return image_group(f"{medium.content_hash:016x}")
        name = medium.file if isinstance(medium, Cell) else str(medium)
        return image_group(name) if name else ""


def _by_tag(raw: RawMedium, media: RecordMedia) -> Iterator[tuple[str, Media]]:
    """The media of a value with the tags that name them, as in {"<image_00>": path}; else without a tag."""
    if isinstance(raw.value, dict) and not is_media_object(raw.value):
        for tag, value in raw.value.items():
            if not is_missing(value):
                yield tag.lower(), media.medium(value, f"{raw.field} {tag}")
    else:
        yield "", media.medium(raw.value, raw.field)
