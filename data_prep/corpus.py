"""The `Item` that a reader yields for each sample: cheap to list, not yet decoded or checked.

Readers list items and report problems in the annotations; the sharder opens the media. Groups determine
the split, so items that must not leak across splits share a group.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.options import ReaderOptions
from data_prep.problems import BAD_RECORD, BadSampleError, Problem
from data_prep.values import name_value, shown
from muomni.data.shards.manifest import SPLIT_NAMES, hash64
from muomni.data.text.normalization import folded, words_of
from muomni.data.text.turns import Turn
from muomni.errors import DataError

MAX_KEY_LENGTH = 90
# The metadata of a conversation without its last turns: their number.
DROPPED_TURNS = "dropped_turns"
_APOSTROPHE = "'"

# A character that is not white space, control, or format (such as zero-width space and byte order mark).
_VISIBLE = re.compile(r"[^\s\x00-\x1f\x7f-\x9f\xad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]")

_DECLARING = {
    "train": "train",
    "training": "train",
    # The images of COCO's validation set that Karpathy's split adds to train.
    "restval": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}

# Reason codes of bad samples. Like those of filters, they are keys of `dropped` in manifest and records.
EMPTY_TEXT = "empty-text"
BAD_UTF8 = "bad-utf8"
MISSING_MEDIA = "missing-media"
BROKEN_IMAGE = "broken-image"
BROKEN_AUDIO = "broken-audio"
CAPTION_WITHOUT_IMAGE = "caption-without-image"
MISSING_TRANSCRIPT = "missing-transcript"
NO_SPEECH = "no-speech"
TOOL_TURN = "tool-turn"

# Estimate for FLAC, mostly 16-bit at 16 kHz; affects only the size of shards.
_CLIP_BYTES_PER_S = 24_000


@dataclass(frozen=True, slots=True)
class TextSpan:
    """Bytes `start` to `end` of a text file: a document that is read when its shard is written."""

    path: str
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class PackedSpan(TextSpan):
    """Bytes `start` to `end` of the content of a compressed text file, in the block that starts at `block`.

    The documents of a block are read at once, since reading starts at the beginning of the file.
    """

    block: int


@dataclass(frozen=True, slots=True)
class Member:
    """A file in the tar `path`: `num_bytes` bytes from byte `start` on; `name` is its name in the tar."""

    path: str
    start: int
    num_bytes: int
    name: str

    def __str__(self) -> str:
        return f"{self.name} in {self.path}"


@dataclass(frozen=True, slots=True)
class Clip:
    """A segment of an audio file, in seconds; `channel` selects one of several channels.

    With `member`, the file is in the tar `path`.
    """

    path: str
    start_s: float
    duration_s: float
    channel: int | None = None
    # Not in `repr`, from which the digest of a dataset is computed.
    member: Member | None = field(default=None, repr=False)

    @property
    def file_name(self) -> str:
        """Path of the audio file, or its name in the tar."""
        return self.path if self.member is None else self.member.name

    @property
    def num_bytes(self) -> int:
        """Estimated size as FLAC."""
        return int(self.duration_s * _CLIP_BYTES_PER_S)

    def __str__(self) -> str:
        return f"{self.member or self.path} from {self.start_s:g} s for {self.duration_s:g} s"


@dataclass(frozen=True, slots=True)
class Cell:
    """A value in a Parquet file: row `row` of a row group in the leaf column `column`.

    `file` is the path stored beside the bytes, which is read if the cell is empty. `num_bytes` is the
    mean size of the values in the row group. `index` is the position in each list around the value.
    """

    path: str
    row_group: int
    row: int
    column: str
    file: str = ""
    num_bytes: int = 0
    # Excluded from `repr`, and so from the digests of plans, for cells that are not in lists.
    index: tuple[int, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        entry = "".join(f" entry {position}" for position in self.index)
        return f"{self.path} row group {self.row_group} row {self.row} column {self.column}{entry}"


@dataclass(frozen=True, slots=True)
class Blob:
    """A file in base64 inside of a record: the bytes `start` to `end` of the JSON file `path`.

    The base64 text is read when the sample is written. `held` is that text where the file cannot be read in
    part (a compressed file). `name` is its position, for messages.
    """

    path: str
    name: str
    start: int
    end: int
    content_hash: int
    held: str = field(default="", repr=False)

    @property
    def num_bytes(self) -> int:
        """Estimated size of the file."""
        return (self.end - self.start) * 3 // 4

    def __str__(self) -> str:
        return self.name


# A path stands for a file that is copied unchanged.
Media = str | Clip | Cell | Member | Blob


@dataclass(frozen=True, slots=True)
class Item:
    """A sample as its corpus describes it.

    Args:
        key: unique name in the dataset.
        group: determines the split.
        source: position in the corpus, for messages.
        declared_split: split that the corpus assigns.
        texts: captions or transcript.
        media: the image or audio clip. Of a conversation, all its media, which the turns refer to by position;
            without `media`, the turns refer to files by their path.
        span: the document, if it is read later.
        block: items of a block stay together in the shards because they are read together (rows of a
            Parquet row group).
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
        """All files and parts of files that the sample is read from."""
        in_turns = (part.value for turn in self.turns for part in turn.parts if part.kind != "text")
        span = () if self.span is None else (self.span,)
        return (*(self.media or in_turns), *span)

    def medium(self, name: str) -> Media:
        """The image or audio clip that a turn refers to."""
        return self.media[int(name)] if self.media else name

    @property
    def files(self) -> tuple[str, ...]:
        """Paths of all files that the sample is read from."""
        return tuple(each if isinstance(each, str) else each.path for each in self.inputs)


Reader = Callable[[Path, ReaderOptions], Iterator[Item]]


def clean_key(text: str) -> str:
    """A key of [A-Za-z0-9_-]{1,90} for an id; if the id must be changed, a hash keeps the key unique."""
    cleaned = re.sub(r"[^A-Za-z0-9_-]", "-", text)
    if cleaned == text and 0 < len(text) <= MAX_KEY_LENGTH:
        return text
    return f"{cleaned[: MAX_KEY_LENGTH - 17]}-{hash64(text.encode(errors='surrogatepass')):016x}"


def image_group(path: str) -> str:
    """Group of an image: its file name without the folder, hence the same in every corpus.

    Splits follow from the hash of the group, so another prefix would move samples between splits.
    """
    return f"picture:{Path(path).stem}"  # terms: allow


def image_path_group(path: str) -> str:
    """Group of an image whose file name is not unique: its path without suffix."""
    return f"picture:{Path(path).with_suffix('').as_posix()}"  # terms: allow


def transcript_group(text: str) -> str:
    """Group of a spoken text: its words in lower case, without punctuation except apostrophes."""
    return f"speech:{' '.join(words_of(folded(text), also=_APOSTROPHE))}"


def text_group(text: str) -> str:
    """Group of a document: its words in lower case, whatever their spacing and composition (NFC)."""
    words = " ".join(unicodedata.normalize("NFC", text).lower().split())
    return f"text:{hash64(words.encode(errors='surrogatepass')):016x}"


def declared_split(name: str) -> str | None:
    """The split that the first word of a subset, folder, or file name declares, if any."""
    words = re.match(r"[a-z]+", name.lower())
    return _DECLARING.get(words[0]) if words else None


def type_of(record: Mapping[str, object]) -> dict[str, str]:
    """The metadata of a record that has a "type", the name of a kind of sample; else empty.

    Raises `BadSampleError` for a type that is neither text nor an integer.
    """
    name = name_value(record.get("type"), "type")
    return {"type": name} if name else {}


def recorded_split(record: Mapping[str, object]) -> str | None:
    """The split that the field "split" of a record declares, if any.

    Raises `BadSampleError` for an unknown split.
    """
    named = name_value(record.get("split"), "split")
    split = declared_split(named)
    if named and split is None:
        raise BadSampleError(
            BAD_RECORD, f"split {shown(named)} is not one of {', '.join(SPLIT_NAMES)}"
        )
    return split


def is_utf8(text: str) -> bool:
    """Whether a text has no lone surrogates, which stand for bytes that are not UTF-8."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def text_problem(text: str, what: str) -> Problem | None:
    """The problem of a text that was not UTF-8 (read with surrogateescape) or shows nothing, if any."""
    if not is_utf8(text):
        return Problem(BAD_UTF8, f"{what} is not valid UTF-8: {shown(text)}")
    if not text.strip():
        return Problem(EMPTY_TEXT, f"{what} is empty")
    if not _VISIBLE.search(text):
        return Problem(EMPTY_TEXT, f"{what} has only invisible characters: {shown(text)}")
    return None


def require_file(path: Path, what: str) -> Path:
    """Return the path; raises `DataError` if it is not a file."""
    if path.is_dir():
        raise DataError(f"{what} {path} is a folder, not a file; check --src")
    if not path.is_file():
        raise DataError(f"{what} {path} does not exist; check --src")
    return path


def require_folder(path: Path, what: str) -> Path:
    """Return the path; raises `DataError` if it is not a folder."""
    if path.is_file():
        raise DataError(f"{what} {path} is a file, not a folder; check --src")
    if not path.is_dir():
        raise DataError(f"{what} {path} does not exist; check --src")
    return path
