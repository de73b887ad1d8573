"""What a reader yields: one `Item` a sample, cheap to list, not yet decoded or checked.

A reader lists items and names problems that it sees in the annotations; the sharder opens the
media. Groups decide the split, so everything that must not leak shares one group.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from muomni.data.shards.manifest import hash64
from muomni.errors import DataError

MAX_KEY_LENGTH = 90
Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")

_DECLARING = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}

# Reasons for which a sample is bad; they are keys of `dropped` in manifest and records, as are the
# reasons of filters.
EMPTY_TEXT = "empty-text"
BAD_UTF8 = "bad-utf8"
MISSING_MEDIA = "missing-media"
BROKEN_IMAGE = "broken-image"
BROKEN_AUDIO = "broken-audio"
CAPTION_WITHOUT_IMAGE = "caption-without-image"
MISSING_TRANSCRIPT = "missing-transcript"
BAD_RECORD = "bad-record"
NO_SPEECH = "no-speech"

# Segments become FLAC of mostly 16 kHz and 16 bits; only the size of shards is guessed from it.
_CLIP_BYTES_PER_S = 24_000


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a sample cannot be used: a reason code and a sentence."""

    reason: str
    message: str


class BadSampleError(Exception):
    """Raised while a sample is made; the sharder leaves it out and lists it with its reason."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.problem = Problem(reason, message)


@dataclass(frozen=True, slots=True)
class Part:
    """One piece of a turn: text, or the path of an image or audio clip."""

    kind: Literal["text", "image", "audio"]
    value: str


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation; an audio part of an assistant turn is a spoken answer."""

    role: Role
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class TextSpan:
    """Bytes `start` to `end` of a text file: a document that is read when it is written."""

    path: str
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Clip:
    """A part of an audio clip, in seconds; `channel` picks one of several channels."""

    path: str
    start_s: float
    duration_s: float
    channel: int | None = None

    @property
    def num_bytes(self) -> int:
        """About the size of its FLAC."""
        return int(self.duration_s * _CLIP_BYTES_PER_S)

    def __str__(self) -> str:
        return f"{self.path} from {self.start_s:g} s for {self.duration_s:g} s"


@dataclass(frozen=True, slots=True)
class Cell:
    """A value in a Parquet file: row `row` of a row group, in the leaf column `column`.

    `file` is the path that stands beside the bytes; it is read where the cell is empty. `num_bytes`
    is the mean size of the values in the row group.
    """

    path: str
    row_group: int
    row: int
    column: str
    file: str = ""
    num_bytes: int = 0

    def __str__(self) -> str:
        return f"{self.path} row group {self.row_group} row {self.row} column {self.column}"


# A path is a whole file, copied as it is.
Media = str | Clip | Cell


@dataclass(frozen=True, slots=True)
class Item:
    """A sample as its corpus describes it.

    `source` says where it stands, for messages; `declared_split` is the split that the corpus itself
    gives; `texts` are the captions or the transcript; `media` the image or audio clip. Items of one
    `block` stay together in the shards, since they are read together (rows of a Parquet row group).
    """

    key: str
    group: str
    source: str
    declared_split: str | None = None
    texts: tuple[str, ...] = ()
    media: tuple[Media, ...] = ()
    span: TextSpan | Cell | None = None
    turns: tuple[Turn, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)
    problem: Problem | None = None
    block: str = field(default="", repr=False)

    @property
    def inputs(self) -> tuple[Media | TextSpan, ...]:
        """All that the sample is read from: files and parts of files."""
        in_turns = (part.value for turn in self.turns for part in turn.parts if part.kind != "text")
        return (*self.media, *in_turns, *(() if self.span is None else (self.span,)))

    @property
    def files(self) -> tuple[str, ...]:
        """The paths of all files that the sample is read from."""
        return tuple(each if isinstance(each, str) else each.path for each in self.inputs)


@dataclass(frozen=True, slots=True)
class ReaderOptions:
    """Choices of the command line that readers look at."""

    media_root: Path | None = None
    document: str = "line"
    group_by: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    annotations: str = ""
    subsets: tuple[str, ...] = ()
    keep_case: bool = False
    text_form: str = ""
    language: str = ""
    speaker: str = ""

    def as_text(self) -> dict[str, str]:
        """The options that were set, for the manifest; paths stay out, since data may move."""
        texts = {
            "document": self.document if self.document != "line" else "",
            "group_by": self.group_by,
            "columns": ",".join(f"{k}={v}" for k, v in sorted(self.columns.items())),
            "annotations": self.annotations,
            "subsets": ",".join(self.subsets),
            "keep_case": "yes" if self.keep_case else "",
            "text_form": self.text_form,
            "language": self.language,
            "speaker": self.speaker,
        }
        return {name: text for name, text in texts.items() if text}

    @classmethod
    def from_text(cls, texts: dict[str, str], media_root: Path | None) -> "ReaderOptions":
        """What `as_text` gave, read again, with the folder that it leaves out."""
        columns = filter(None, texts.get("columns", "").split(","))
        plain = ("annotations", "group_by", "text_form", "language", "speaker")
        return cls(
            media_root=media_root,
            document=texts.get("document", "line"),
            columns=dict(pair.split("=", 1) for pair in columns),
            subsets=tuple(filter(None, texts.get("subsets", "").split(","))),
            keep_case="keep_case" in texts,
            **{name: texts.get(name, "") for name in plain},
        )


Reader = Callable[[Path, ReaderOptions], Iterator[Item]]


def clean_key(text: str) -> str:
    """A key of [A-Za-z0-9_-]{1,90} for an id; a changed or long one gets a hash, to stay unique."""
    cleaned = re.sub(r"[^A-Za-z0-9_-]", "-", text)
    if cleaned == text and 0 < len(text) <= MAX_KEY_LENGTH:
        return text
    return f"{cleaned[: MAX_KEY_LENGTH - 17]}-{hash64(text.encode(errors='surrogatepass')):016x}"


def image_group(path: str) -> str:
    """Group of an image: its file name without the folder, hence the same in every corpus.

    Splits follow from the hash of the group, so another prefix would move samples between splits.
    """
    return f"picture:{Path(path).stem}"


def transcript_group(text: str) -> str:
    """The group of a spoken text: words only, so that equal prompts stay together.

    Case, punctuation and spacing do not count; apostrophes do.
    """
    words = re.sub(r"[^\w']+", " ", text.lower()).split()
    return f"speech:{' '.join(words)}"


def declared_split(name: str) -> str | None:
    """The split that the first word of a subset's, folder's or file's name declares, else None."""
    words = re.match(r"[a-z]+", name.lower())
    return _DECLARING.get(words[0]) if words else None


def text_problem(text: str, what: str) -> Problem | None:
    """The problem with a text: bytes that are no UTF-8 (read by surrogateescape), or no content."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return Problem(BAD_UTF8, f"{what} is not valid UTF-8")
    if not text.strip():
        return Problem(EMPTY_TEXT, f"{what} is empty")
    return None


def require_file(path: Path, what: str) -> Path:
    """The path when it is a file; raises `DataError` that names it otherwise."""
    if not path.is_file():
        raise DataError(f"{what} {path} does not exist; check --src")
    return path


def require_folder(path: Path, what: str) -> Path:
    """The path when it is a folder; raises `DataError` that names it otherwise."""
    if not path.is_dir():
        raise DataError(f"{what} {path} does not exist; check --src")
    return path
