"""A table row under standard column names, and its conversion to an item.

The columns are `image` and `caption`; `audio` and `text`; or `text`. Optional columns are `id`, `group`,
`split`, `type`, `speaker`, and `language`; metrics are also reported by `type`. Readers of tables and of most
speech corpora create such rows.
"""

from dataclasses import dataclass, field
from pathlib import Path

from data_prep.corpus import (
    BAD_RECORD,
    EMPTY_TEXT,
    BadSampleError,
    Cell,
    Clip,
    Item,
    Media,
    Problem,
    clean_key,
    image_group,
    recorded_split,
    text_group,
    text_problem,
    transcript_group,
    type_of,
)
from data_prep.options import ReaderOptions

IMAGE_COLUMNS = ("image", "caption")
SPEECH_COLUMNS = ("audio", "text")
TEXT_COLUMNS = ("text",)
MORE_COLUMNS = ("id", "group", "split", "type", "speaker", "language")


@dataclass(frozen=True, slots=True)
class Row:
    """Values by standard column name, with the position `source` in the corpus.

    `name` is the key of a row without id. `image` and `audio` are a path (relative to the media folder), a
    `Clip`, or a `Cell`. `span` locates a text that is read later. `metadata` is stored with the sample.
    """

    name: str
    source: str
    values: dict[str, object]
    problem: Problem | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    span: Cell | None = None
    block: str = ""

    def text(self, column: str) -> str:
        """A value as text; empty if missing."""
        return str(self.values.get(column) or "")

    def media(self, column: str, root: Path) -> Media | None:
        """An image or audio clip, with paths relative to `root`; None if missing."""
        value = self.values.get(column)
        if isinstance(value, Clip | Cell):
            return value
        return str(root / str(value)) if value else None


def image_item(row: Row, root: Path) -> Item:
    """The image of a row with one or several captions. Group: the image's file name."""
    value = row.values.get("caption")
    captions = [str(text) for text in value] if isinstance(value, list) else [row.text("caption")]
    texts = tuple(" ".join(text.split()) for text in captions if text.strip())
    problem = next((p for p in (text_problem(text, "the caption") for text in texts) if p), None)
    if not texts:
        problem = Problem(EMPTY_TEXT, "the caption is empty")
    media = row.media("image", root)
    name = (media.file or media) if isinstance(media, Cell) else row.text("image")
    group = row.text("group") or image_group(str(name))
    return _item(row, group, texts, _one(media), problem or _no_media(media), row.metadata)


def speech_item(row: Row, root: Path, options: ReaderOptions) -> Item:
    """The audio clip of a row with its transcript.

    Group: column `group`, else as selected by `--group`: `speaker`, `transcript`, or `chapter`, which is the
    audio file. By default, segments are grouped by audio file, and whole files by their words.
    """
    text = row.text("text")
    problem = text_problem(text, "the transcript")
    text = " ".join(text.split())
    speaker = options.speaker or row.text("speaker")
    media = row.media("audio", root)
    metadata = {
        "speaker": speaker,
        "language": options.language or row.text("language"),
        **row.metadata,
    }
    group = row.text("group")
    if not group and options.group_by == "speaker":
        group = f"speaker:{row.text('speaker')}"
    if not group and isinstance(media, Clip) and options.group_by != "transcript":
        # Splits follow from the hash of the group, so another prefix would move samples.
        group = f"recording:{Path(media.path).stem}"
    group = group or transcript_group(text.encode(errors="replace").decode())
    return _item(row, group, (text,), _one(media), problem or _no_media(media), metadata)


def text_item(row: Row) -> Item:
    """The text of a row. Group: column `group`, else the words of the text."""
    text = row.text("text")
    group = row.text("group") or text_group(text)
    problem = text_problem(text, "the text")
    return _item(row, group, () if row.span else (text,), (), problem, row.metadata)


def _one(media: Media | None) -> tuple[Media, ...]:
    return () if media is None else (media,)


def _no_media(media: Media | None) -> Problem | None:
    return Problem(BAD_RECORD, "the row has no media file") if media is None else None


def _item(
    row: Row,
    group: str,
    texts: tuple[str, ...],
    media: tuple[Media, ...],
    problem: Problem | None,
    metadata: dict[str, str],
) -> Item:
    split, kind = None, {}
    problem = row.problem or problem
    try:
        split, kind = recorded_split(row.values), type_of(row.values)
    except BadSampleError as error:
        problem = problem or error.problem
    return Item(
        key=clean_key(row.text("id") or row.name),
        group=group.encode(errors="replace").decode(),
        source=row.source,
        declared_split=split,
        texts=() if problem else texts,
        media=media,
        span=row.span,
        metadata={} if problem else {**metadata, **kind},
        problem=problem,
        block=row.block,
    )
