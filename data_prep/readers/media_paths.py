"""Paths of images and audio clips as other people and systems write them.

`find_media` interprets a name without access to files, since a corpus may have 10^8 of them. `located` in
`data_prep/media/located.py` looks for the file when its sample is written.
"""

import os
import re
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

from data_prep.problems import BAD_RECORD, BadSampleError
from data_prep.values import shown

_FILE_URL = "file://"
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
# Names that `Path` changes: empty parts, and parts that are a dot.
_NOT_PLAIN = re.compile(r"^$|^/|//|/$|(?:^|/)\.(?:/|$)")
_MAX_PATH_CHARS = 4096
# The first characters of PNG, JPEG, GIF, RIFF (WAV, WebP), FLAC, Ogg, and MP3 in base64.
_BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "ZkxhQ", "T2dnU", "SUQz")
_MIN_BASE64_CHARS = 64


def find_media(root: Path, name: str, field: str = "path") -> str:
    """The path that a name in a manifest means; relative names are below `root`.

    `file://` addresses are local paths. An absolute path whose folder this machine lacks is one of another
    machine, hence below `root`. Raises `BadSampleError` for other addresses and for data in place of a path.
    """
    if name[: len(_FILE_URL)].lower() == _FILE_URL:
        name = unquote(name[len(_FILE_URL) :]).removeprefix("localhost")
    if _ADDRESS.match(name):
        raise BadSampleError(
            BAD_RECORD,
            f"{field!r} is an address, not a local file: {shown(name)}; download it, and give its path",
        )
    if _is_data(name):
        raise BadSampleError(
            BAD_RECORD, f"{field!r} is data, not the path of a file: {shown(name)}"
        )
    if len(name) > _MAX_PATH_CHARS:
        raise BadSampleError(BAD_RECORD, f"{field!r} is not the path of a file: {shown(name)}")
    if name.startswith("~/"):
        name = os.path.expanduser(name)
    if name.startswith("/") and not _is_folder(os.path.dirname(name)):
        name = name.lstrip("/")
    # Parsing a path costs more than all the rest.
    return str(root / name) if _NOT_PLAIN.search(name) else f"{root}/{name}"


def is_base64(text: str) -> bool:
    """Whether a text is an image or audio clip in base64, rather than a path."""
    return text.startswith(_BASE64_STARTS) and len(text) >= _MIN_BASE64_CHARS and "." not in text


def _is_data(name: str) -> bool:
    """Whether a name is a data URI, or an image or audio clip in base64."""
    return name[:5].lower() == "data:" or is_base64(name)


@lru_cache(maxsize=4096)
def _is_folder(path: str) -> bool:
    return os.path.isdir(path)
