"""Images and audio clips in records of conversations: paths, base64, and objects of bytes and path."""

import mmap
import re
from dataclasses import replace
from pathlib import Path

from data_prep.corpus import BAD_RECORD, BadSampleError, Blob, Cell, Media
from data_prep.readers.media_paths import find_media, is_base64
from data_prep.readers.tags import names_a_file
from data_prep.values import is_missing, shown
from muomni.data.shards.manifest import hash64
from muomni.errors import DataError

_BYTES_KEYS = ("bytes", "base64", "b64_json", "data")
_PATH_KEYS = ("path", "url", "file", "image_url", "audio_url", "image", "audio")
_OBJECT_KEYS = {*_BYTES_KEYS, *_PATH_KEYS, "source"}
_DATA_URI = re.compile(r"data:[^,]{0,200}?(;base64)?,", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]+={0,2}\s*")
_MAX_PATH_CHARS = 4096
_MAX_HELD_CHARS = 1 << 30


class RecordMedia:
    """Media of the records of one file; paths are relative to `root`.

    Base64 is not kept in memory: its position in the file is, found by searching on from the last one.
    Where it has none (in a compressed file), up to 1 GiB is held.
    """

    def __init__(self, path: Path, root: Path, has_positions: bool = True) -> None:
        self.root = root
        self._path = path
        self._text: mmap.mmap | None = None
        self._has_positions = has_positions
        self._escape = False
        self._start = self._end = 0
        self._num_held = 0
        self._source = ""
        self._count = 0
        self._read: set[str] = set()

    def begin(self, source: str) -> None:
        """Begin a record; `source` is its position, for messages."""
        self._source = source
        self._count = 0
        self._start = self._end
        self._read.clear()

    def medium(self, value: object, field: str) -> Media:
        """The image or audio clip of a value: a path, data URI, base64, or object of bytes or path.

        Raises `BadSampleError` for any other value, and for an address on the network.
        """
        if isinstance(value, Cell):
            return value
        if isinstance(value, dict):
            return self._from_object(value, field)
        if not isinstance(value, str) or not value.strip():
            raise BadSampleError(
                BAD_RECORD, f"{field!r} is neither a path, base64, nor bytes: {shown(value)}"
            )
        if is_base64(value) or _is_long_base64(value) or _DATA_URI.match(value):
            return self._blob(value, field)
        self._read.add(Path(value).name)
        return find_media(self.root, value, field)

    def refuse_unread(self, key: str, value: object) -> None:
        """Raise `BadSampleError` if a field names media that the record has not read."""
        for entry in value if isinstance(value, list) else [value]:
            if names_media(entry) and not (
                isinstance(entry, str) and Path(entry).name in self._read
            ):
                raise BadSampleError(
                    BAD_RECORD,
                    f"{key!r} has a file that is not read: {shown(entry)}; map it with --columns "
                    f"image={key} or audio={key}, or remove it",
                )

    def _from_object(self, value: dict[str, object], field: str) -> Media:
        if isinstance(value.get("source"), dict):
            return self.medium(value["source"], field)
        path = next((value[key] for key in _PATH_KEYS if not is_missing(value.get(key))), None)
        for key in _BYTES_KEYS:
            data = value.get(key)
            if isinstance(data, Cell):
                return replace(data, file=self._beside(path))
            if isinstance(data, str) and data:
                return self.medium(data, field) if key == "data" else self._blob(data, field)
            if not is_missing(data) and data != "":
                raise BadSampleError(
                    BAD_RECORD, f"{key!r} of {field!r} is not base64: {shown(data)}"
                )
        if path is None:
            raise BadSampleError(
                BAD_RECORD, f"{field!r} is an object without bytes and path: {shown(value)}"
            )
        return self.medium(path, field)

    def _beside(self, path: object) -> str:
        """The path beside bytes, which is read if there are no bytes; empty if it is not of a local file."""
        try:
            return find_media(self.root, path) if isinstance(path, str) and path else ""
        except BadSampleError:
            return ""

    def _blob(self, text: str, field: str) -> Blob:
        uri = _DATA_URI.match(text)
        if uri and not uri[1]:
            raise BadSampleError(
                BAD_RECORD, f"{field!r} is a data URI without base64: {shown(text)}"
            )
        text = text[uri.end() :] if uri else text
        self._count += 1
        name = f"{self._source} {field} (base64 number {self._count})"
        content_hash = hash64(text.encode(errors="replace"))
        span = self._find(text)
        if span is not None:
            return Blob(str(self._path), name, *span, content_hash)
        self._num_held += len(text)
        if self._num_held > _MAX_HELD_CHARS:
            raise DataError(
                f"{self._path} has more than {_MAX_HELD_CHARS >> 30} GiB of base64, which must be held in "
                "memory, since it is not a JSON file without compression; convert it to one"
            )
        return Blob(str(self._path), name, 0, len(text), content_hash, text)

    def _find(self, text: str) -> tuple[int, int] | None:
        """Start and end of a text in the file, after those of earlier records; None if it is compressed."""
        if not self._has_positions or not text.isascii():
            return None
        if self._text is None:
            with self._path.open("rb") as file:
                self._text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        for escape in (self._escape, not self._escape):
            needle = text.replace("/", "\\/").encode() if escape else text.encode()
            start = self._text.find(needle, self._start)
            if start >= 0:
                self._escape = escape
                self._end = max(self._end, start + len(needle))
                return start, start + len(needle)
        self._has_positions = False
        return None


def _is_long_base64(text: str) -> bool:
    return len(text) > _MAX_PATH_CHARS and bool(_BASE64.fullmatch(text[:_MAX_PATH_CHARS]))


def is_media_object(value: object) -> bool:
    """Whether a value is an object of bytes or path."""
    return isinstance(value, dict) and bool(_OBJECT_KEYS & value.keys())


def names_media(value: object) -> bool:
    """Whether a value is an image, audio clip, or video: a file name, data URI, or object of bytes."""
    if isinstance(value, dict):
        return not is_missing(value.get("bytes"))
    if isinstance(value, str):
        is_word = "." in value and len(value.split(maxsplit=1)) == 1
        return (is_word and names_a_file(value.strip())) or value.startswith(
            ("data:image", "data:audio", "data:video")
        )
    return isinstance(value, Cell)
