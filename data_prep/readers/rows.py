"""A table row under standard column names, and its conversion to an item.

The columns are `image` and `caption`; `audio` and `text`; or `text`. Optional columns are `id`, `group`,
`split`, `type`, `speaker`, and `language`; metrics are also reported by `type`. Readers of tables and of most
speech corpora create such rows.
"""

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.corpus import (
    BAD_RECORD,
    BAD_UTF8,
    EMPTY_TEXT,
    BadSampleError,
    Cell,
    Clip,
    Item,
    Media,
    Member,
    Problem,
    clean_key,
    declared_split,
    image_group,
    is_utf8,
    recorded_split,
    text_group,
    text_problem,
    transcript_group,
    type_of,
)
from data_prep.options import ReaderOptions
from data_prep.readers.media_paths import find_media
from data_prep.values import name_value, shown, text_value, texts_value

IMAGE_COLUMNS = ("image", "caption")
SPEECH_COLUMNS = ("audio", "text")
TEXT_COLUMNS = ("text",)
MORE_COLUMNS = ("id", "group", "split", "type", "speaker", "language")


@dataclass(frozen=True, slots=True)
class Row:
    """Values by standard column name, with the position `source` in the corpus.

    `name` is the key of a row without id. `image` and `audio` are a path (relative to the media folder), a
    `Clip`, or a `Cell`. `span` locates a text that is read later. `metadata` is stored with the sample.
    Methods raise `BadSampleError` for values of other types.
    """

    name: str
    source: str
    values: dict[str, object]
    problem: Problem | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    span: Cell | None = None
    block: str = ""

    def text(self, column: str) -> str:
        """A text; empty if missing."""
        return text_value(self.values.get(column), column)

    def label(self, column: str) -> str:
        """A name, such as an id or a speaker, of which 0 is one; empty if missing."""
        label = name_value(self.values.get(column), column)
        if not is_utf8(label):
            raise BadSampleError(BAD_UTF8, f"{column!r} is not valid UTF-8: {shown(label)}")
        return label

    def media(self, column: str, root: Path) -> Media | None:
        """An image or audio clip, with paths relative to `root`; None if missing."""
        value = self.values.get(column)
        if isinstance(value, Clip | Cell | Member):
            return value
        name = value if isinstance(value, str) else name_value(value, column)
        return find_media(root, name, column) if name.strip() else None


def image_item(row: Row, root: Path) -> Item:
    """The image of a row with one or several captions. Group: the image's file name."""
    try:
        captions = texts_value(row.values.get("caption"), "caption")
        texts = tuple(" ".join(text.split()) for text in captions if text.strip())
        problem = next(
            (p for p in (text_problem(text, "the caption") for text in texts) if p), None
        )
        if not texts:
            problem = Problem(EMPTY_TEXT, "the caption is empty")
        media = row.media("image", root)
        name = media.file or media if isinstance(media, Cell) else row.values.get("image")
        group = row.label("group") or image_group(str(name or ""))
        return _item(row, group, texts, media, problem or _no_media(media), row.metadata)
    except BadSampleError as error:
        return _bad_item(row, error.problem)


def speech_item(row: Row, root: Path, options: ReaderOptions) -> Item:
    """The audio clip of a row with its transcript.

    Group: column `group`, else as selected by `--group`: `speaker`, `transcript`, or `chapter`, which is the
    audio file. By default, segments are grouped by audio file, and whole files by their words.
    """
    try:
        text = row.text("text")
        problem = text_problem(text, "the transcript")
        text = " ".join(text.split())
        speaker = row.label("speaker")
        media = row.media("audio", root)
        metadata = {
            "speaker": options.speaker or speaker,
            "language": options.language or row.label("language"),
            **row.metadata,
        }
        group = row.label("group")
        if not group and options.group_by == "speaker":
            group = f"speaker:{speaker}"
        if not group and isinstance(media, Clip) and options.group_by != "transcript":
            # Splits follow from the hash of the group, so another prefix would move samples.
            group = f"recording:{Path(media.file_name).stem}"
        group = group or transcript_group(text.encode(errors="replace").decode())
        return _item(row, group, (text,), media, problem or _no_media(media), metadata)
    except BadSampleError as error:
        return _bad_item(row, error.problem)


def text_item(row: Row) -> Item:
    """The text of a row. Group: column `group`, else the words of the text."""
    try:
        text = row.text("text")
        group = row.label("group") or text_group(text)
        problem = text_problem(text, "the text")
        return _item(row, group, () if row.span else (text,), None, problem, row.metadata)
    except BadSampleError as error:
        return _bad_item(row, error.problem)


def path_split(relative: Path) -> str | None:
    """The split that the name of a file below the source, or the name of its folder, declares."""
    return declared_split(relative.name) or declared_split(relative.parent.name)


def _no_media(media: Media | None) -> Problem | None:
    return Problem(BAD_RECORD, "the row has no media file") if media is None else None


def _item(
    row: Row,
    group: str,
    texts: tuple[str, ...],
    media: Media | None,
    problem: Problem | None,
    metadata: dict[str, str],
) -> Item:
    split, kind = recorded_split(row.values), type_of(row.values)
    problem = row.problem or problem
    metadata = {**metadata, **kind}
    damaged = next((name for name, text in metadata.items() if not is_utf8(text)), None)
    if damaged and not problem:
        problem = Problem(BAD_UTF8, f"{damaged!r} is not valid UTF-8: {shown(metadata[damaged])}")
    return Item(
        key=clean_key(row.label("id") or row.name),
        group=group.encode(errors="replace").decode(),
        source=row.source,
        declared_split=split,
        texts=() if problem else texts,
        media=() if media is None else (media,),
        span=row.span,
        metadata={} if problem else metadata,
        problem=problem,
        block=row.block,
    )


def _bad_item(row: Row, problem: Problem) -> Item:
    """The item of a row with a value of another type; a problem of the row itself comes first."""
    name = row.name
    with suppress(BadSampleError):
        name = row.label("id") or name
    problem, group = row.problem or problem, row.source.encode(errors="replace").decode()
    return Item(clean_key(name), group, row.source, problem=problem, block=row.block)
