"""Formats of images and audio clips, detected by content, and the members of samples that hold them.

Readers, the sharder, `index`, `verify`, and training share these tables. Nothing here imports torch.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from muomni.errors import DataError

Kind = Literal["image", "audio"]
# What training decodes as it is; what Pillow or libsndfile, or ffmpeg, converts before; what is refused.
Handling = Literal["kept", "converted", "ffmpeg", "refused"]

# Suffixes of members, in lower case; the case of a name never matters (`split_member_name`).
IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "jfif", "webp")
AUDIO_EXTENSIONS = ("flac", "wav", "ogg", "oga", "opus", "mp3")
EXTENSIONS: dict[Kind, tuple[str, ...]] = {"image": IMAGE_EXTENSIONS, "audio": AUDIO_EXTENSIONS}
# Suffixes of files in a corpus; the content decides whether they are kept, converted, or refused.
IMAGE_FILES = (
    *IMAGE_EXTENSIONS, "jpe", "gif", "bmp", "avif", "tif", "tiff", "jp2", "jxl", "heic", "heif", "svg", "ico",
    "psd",
)  # fmt: skip
AUDIO_FILES = (
    *AUDIO_EXTENSIONS, "sph", "aiff", "aif", "m4a", "webm", "aac", "wma", "w64", "caf", "au", "amr", "mp2",
    "mka",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class MediaFormat:
    """A format by its name in messages, such as `a GIF image`.

    Args:
        suffix: suffix of a member that keeps the bytes.
        demuxer: ffmpeg's name of the container, if ffmpeg decodes it.
    """

    name: str
    kind: Kind | None
    handling: Handling = "refused"
    suffix: str = ""
    demuxer: str = ""


PNG = MediaFormat("a PNG image", "image", "kept", "png")
JPEG = MediaFormat("a JPEG image", "image", "kept", "jpg")
WEBP = MediaFormat("a WebP image", "image", "kept", "webp")
WAV = MediaFormat("a WAV file", "audio", "kept", "wav")
FLAC = MediaFormat("a FLAC file", "audio", "kept", "flac")
OGG = MediaFormat("an Ogg file", "audio", "kept", "ogg")
MP3 = MediaFormat("an MP3 file", "audio", "kept", "mp3")
_AVIF = MediaFormat("an AVIF image", "image", "converted")
_HEIC = MediaFormat("a HEIC image", "image")
_MP4 = MediaFormat("an MP4 or M4A file", "audio", "ffmpeg", demuxer="mov")
_AAC = MediaFormat("an AAC file", "audio", "ffmpeg", demuxer="aac")
_SPEEX = MediaFormat("a Speex file", "audio", "ffmpeg", demuxer="ogg")
_SHORTEN = MediaFormat(
    "a SPHERE file compressed with Shorten", "audio", "ffmpeg", demuxer="nistsphere"
)

_STARTS: dict[bytes, MediaFormat] = {
    b"\x89PNG": PNG,
    b"\xff\xd8": JPEG,
    b"fLaC": FLAC,
    b"GIF8": MediaFormat("a GIF image", "image", "converted"),
    b"II*\0": MediaFormat("a TIFF image", "image"),
    b"MM\0*": MediaFormat("a TIFF image", "image"),
    b"II+\0": MediaFormat("a TIFF image", "image"),
    b"MM\0+": MediaFormat("a TIFF image", "image"),
    b"\0\0\0\x0cjP  ": MediaFormat("a JPEG 2000 image", "image"),
    b"\xff\x4f\xff\x51": MediaFormat("a JPEG 2000 image", "image"),
    b"\0\0\0\x0cJXL ": MediaFormat("a JPEG XL image", "image"),
    b"\xff\x0a": MediaFormat("a JPEG XL image", "image"),
    b"\0\0\1\0": MediaFormat("an ICO image", "image"),
    b"8BPS": MediaFormat("a Photoshop image", "image"),
    b"%!PS": MediaFormat("a PostScript file", None),
    b"%PDF": MediaFormat("a PDF document", None),
    b"PK\3\4": MediaFormat("a ZIP archive", None),
    b"\x1f\x8b": MediaFormat("a gzip file", None),
    b"version https://git-lfs": MediaFormat("a Git LFS pointer (run git lfs pull)", None),
    b"NIST_1A": MediaFormat("a SPHERE file", "audio", "converted"),
    b".snd": MediaFormat("an AU file", "audio", "converted"),
    b"caff": MediaFormat("a CAF file", "audio", "converted"),
    b"riff\x2e\x91\xcf\x11": MediaFormat("a W64 file", "audio", "converted"),
    b"\x1a\x45\xdf\xa3": MediaFormat(
        "a WebM or Matroska file", "audio", "ffmpeg", demuxer="matroska"
    ),
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11": MediaFormat(
        "a WMA file", "audio", "ffmpeg", demuxer="asf"
    ),
    b"#!AMR": MediaFormat("an AMR file", "audio", "ffmpeg", demuxer="amr"),
    b"MAC ": MediaFormat("a Monkey's Audio file", "audio", "ffmpeg", demuxer="ape"),
    b"wvpk": MediaFormat("a WavPack file", "audio", "ffmpeg", demuxer="wv"),
    b"ajkg": MediaFormat("a Shorten file", "audio", "ffmpeg", demuxer="shn"),
}
# Format type at byte 8 of RIFF and IFF files.
_RIFF_TYPES = {
    b"WAVE": WAV,
    b"WEBP": WEBP,
    b"AIFF": MediaFormat("an AIFF file", "audio", "converted"),
    b"AIFC": MediaFormat("an AIFF-C file", "audio", "converted"),
    b"AVI ": MediaFormat("an AVI video", None),
}
_HTML = re.compile(
    rb"\s*(?:\xef\xbb\xbf)?\s*(?:<!--.{0,200}-->\s*)?<(?:!doctype html|html|head)", re.I | re.S
)
_SVG = re.compile(rb"\s*(?:\xef\xbb\xbf)?\s*<(?:svg|\?xml.{0,500}<svg)", re.I | re.S)
# Zeros may precede the first frame of MPEG audio.
_MAX_ZEROS = 1 << 16
_HEAD_BYTES = 1 << 10


def detect_format(data: bytes) -> MediaFormat | None:
    """The format of a file by its content; None if it is unknown."""
    for length in (2, 3, 4, 5, 7, 8, 23):
        if found := _STARTS.get(data[:length]):
            is_shortened = data.startswith(b"NIST_1A") and b"shorten" in data[:_HEAD_BYTES]
            return _SHORTEN if is_shortened else found
    if data[:4] in (b"RIFF", b"RIFX", b"RF64", b"FORM"):
        return _RIFF_TYPES.get(data[8:12])
    if data[:4] == b"OggS":
        return _SPEEX if b"Speex   " in data[:64] else OGG
    if data[4:8] == b"ftyp":
        return _iso_format(data)
    if data[:2] == b"BM" and data[6:10] == bytes(4):
        return MediaFormat("a BMP image", "image", "converted")
    return _mpeg_format(data) or _markup_format(data[:_HEAD_BYTES])


def _iso_format(data: bytes) -> MediaFormat:
    """The format of an ISO base media file by its brands."""
    brands = data[8 : min(int.from_bytes(data[:4], "big"), _HEAD_BYTES)]
    if b"avif" in brands or b"avis" in brands:
        return _AVIF
    is_image = any(brand in brands for brand in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"))
    return _HEIC if is_image else _MP4


def _mpeg_format(data: bytes) -> MediaFormat | None:
    """MP3, or AAC or FLAC after an ID3 tag."""
    start = skip_tags(data, 0)
    if data[start : start + 4] == b"fLaC":
        return FLAC
    first, second, third = data[start : start + 3].ljust(3, b"\0")
    if first != 0xFF or second < 0xE0:
        return MP3 if data[:3] == b"ID3" else None
    if second & 0xF6 == 0xF0:
        return _AAC
    is_reserved = (
        second & 0x18 == 0x08 or not second & 0x06 or third >= 0xF0 or third & 0x0C == 0x0C
    )
    return None if is_reserved else MP3


def skip_tags(data: bytes, start: int) -> int:
    """The position after the ID3 tags and zeros that begin at `start`."""
    while True:
        rest = data[start : start + _MAX_ZEROS]
        start += len(rest) - len(rest.lstrip(b"\0"))
        if data[start : start + 3] != b"ID3" or len(data) < start + 10:
            return start
        size = 0
        for byte in data[start + 6 : start + 10]:
            size = size << 7 | byte & 0x7F
        start += 10 + size + (10 if data[start + 5] & 0x10 else 0)


def _markup_format(head: bytes) -> MediaFormat | None:
    if _HTML.match(head):
        return MediaFormat("an HTML page", None)
    return MediaFormat("an SVG image", "image") if _SVG.match(head) else None


def media_of(sample: Mapping[str, Any], extensions: tuple[str, ...]) -> list[tuple[str, bytes]]:
    """Names and bytes of the members whose last suffix is in `extensions`, in order."""
    return [
        (name, data)
        for name, data in sample.items()
        if isinstance(data, bytes) and name.rpartition(".")[2] in extensions
    ]


def only_medium(sample: Mapping[str, Any], kind: Kind) -> tuple[str, bytes]:
    """Name and bytes of the image or audio clip of a sample that has one.

    A name with one suffix (`jpg`) is preferred to others (`mask.png`). Raises `DataError` if there is no such
    member, or more than one.
    """
    what = "image" if kind == "image" else "audio clip"
    found = media_of(sample, EXTENSIONS[kind])
    chosen = [member for member in found if "." not in member[0]] or found
    if len(chosen) == 1:
        return chosen[0]
    names = ", ".join(name for name, _ in chosen)
    problem = (
        f"has {len(chosen)} members that could be its {what} ({names}); keep one"
        if chosen
        else f"has no {what} ({', '.join(EXTENSIONS[kind])})"
    )
    raise DataError(f"sample '{sample['__key__']}' {problem}")
