"""Tars of samples from other tools: media and their texts as members of one key.

Texts are in members such as `.txt`, or in a field of `.json` (Emilia, YODAS, img2dataset). The members of a
sample may be apart. `index` adopts tars in place; this reader writes new shards where the layout does not
allow that. A folder or the name of a tar may declare a split.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep.corpus import BAD_RECORD, BadSampleError, Item, declared_split, require_folder
from data_prep.media.tar_files import read_member
from data_prep.options import ReaderOptions
from data_prep.readers.rows import Row, image_item, speech_item, text_item
from data_prep.readers.tars import Members, members_of_kind, tar_samples
from data_prep.readers.text_files import Record
from data_prep.readers.walk import AUDIO_SUFFIXES, IMAGE_SUFFIXES, find_files
from data_prep.values import is_missing, shown, texts_value
from muomni.errors import DataError

_TEXTS = (".txt", ".text", ".caption", ".transcript", ".lab")
_JSON = (".json",)
_COLUMNS = ("group", "split", "type", "speaker", "language")


@dataclass(frozen=True, slots=True)
class _Kind:
    """The columns of a task: that of the media and their suffixes, that of the text and its fields."""

    media: str
    suffixes: tuple[str, ...]
    text: str
    fields: tuple[str, ...]


_SPEECH = _Kind(
    "audio", AUDIO_SUFFIXES, "text", ("text", "transcript", "transcription", "sentence")
)
_IMAGE = _Kind("image", IMAGE_SUFFIXES, "caption", ("caption", "captions", "text"))
_TEXT = _Kind("", (), "text", ("text", "content"))


def read_speech_tars(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """List the audio clips with text in all tars in and below SRC.

    `--columns text=FIELD` selects a field of `.json`. Raises `DataError` if there is no tar or one is damaged.
    """
    for row, _ in _rows(src, _SPEECH, options):
        yield speech_item(row, src, options)


def read_image_tars(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """As `read_speech_tars`, for images with captions. Group: the URL of an image, else its name in the tar."""
    for row, record in _rows(src, _IMAGE, options):
        url = record.get("url")
        if isinstance(url, str) and url:
            row.metadata["url"] = url
        if is_missing(row.values.get("group")):
            row.values["group"] = f"url:{row.metadata['url']}" if row.metadata else row.name
        yield image_item(row, src)


def read_text_tars(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """As `read_speech_tars`, for documents."""
    for row, _ in _rows(src, _TEXT, options):
        yield text_item(row)


def _rows(src: Path, kind: _Kind, options: ReaderOptions) -> Iterator[tuple[Row, Record]]:
    """A row for each sample, and the record of its `.json`."""
    is_file = src.is_file()
    root = src.parent if is_file else require_folder(src, "folder of tars")
    paths = [src] if is_file else find_files(src, (".tar",), options.skipped)
    if not paths:
        report = options.skipped.report()
        raise DataError(
            f"{src} contains no *.tar{report and f' ({report})'}; check --src, or unpack *.tar.gz"
        )
    for path in paths:
        place = path.relative_to(root).as_posix()
        split = next((s for s in map(declared_split, Path(place).parts) if s), None)
        unique = (kind.suffixes, _TEXTS, _JSON)
        for key, members in tar_samples(path, unique, options.skipped).items():
            name = f"{place.removesuffix('.tar')}/{key.removeprefix('./')}"
            row = Row(name, f"{place} {key}", {"split": split}, block=place)
            record: Record = {}
            try:
                record = _record(members)
                row.values.update(_values(members, record, kind, options))
            except BadSampleError as error:
                row = replace(row, problem=error.problem)
            yield row, record


def _record(members: Members) -> Record:
    """The content of the `.json` member; empty if there is none."""
    for member in members_of_kind(members, _JSON):
        try:
            content = json.loads(read_member(member))
        except (ValueError, RecursionError) as error:
            raise BadSampleError(BAD_RECORD, f"{member.name} is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise BadSampleError(BAD_RECORD, f"{member.name} is not a JSON object")
        return content
    return {}


def _values(members: Members, record: Record, kind: _Kind, options: ReaderOptions) -> Record:
    values: Record = {}
    for name in _COLUMNS:
        value = record.get(options.columns.get(name, name))
        if not is_missing(value):
            values[name] = value
    if kind.media:
        media = members_of_kind(members, kind.suffixes)
        if len(media) != 1:
            count = f"{len(media)} files" if media else "no file"
            message = f"the sample has {count} of type {kind.media} (members: {', '.join(members)})"
            raise BadSampleError(BAD_RECORD, message)
        values[kind.media] = media[0]
    texts = _texts(members, record, kind, options)
    values[kind.text] = texts if kind is _IMAGE else "\n".join(texts)
    return values


def _texts(members: Members, record: Record, kind: _Kind, options: ReaderOptions) -> list[str]:
    """The captions or the text: of the field in `--columns`, else of a text member, else of a usual field."""
    chosen = options.columns.get(kind.text)
    files = [] if chosen else members_of_kind(members, _TEXTS)
    if files:
        text = read_member(files[0]).decode("utf-8-sig", errors="surrogateescape")
        return (
            text.splitlines() if kind is _IMAGE and files[0].name.endswith(".caption") else [text]
        )
    for field in (chosen,) if chosen else kind.fields:
        if not is_missing(record.get(field)):
            texts = texts_value(record[field], field)
            if len(texts) > 1 and kind is not _IMAGE:
                raise BadSampleError(BAD_RECORD, f"{field!r} has {len(texts)} texts, not one")
            return texts
    fields = f"; its .json has {shown(', '.join(record))[1:-1]}" if record else ""
    raise BadSampleError(
        BAD_RECORD,
        f"no text (members: {', '.join(members)}{fields}); name a field with --columns {kind.text}=FIELD",
    )
