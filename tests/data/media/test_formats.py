"""Formats are detected by content; one table of suffixes says which member training reads."""

import pytest

from muomni.data.media.formats import detect_format, only_medium
from muomni.errors import DataError
from tests.data_prep.media.originals import originals

_NAMES = {
    "png": "a PNG image", "jpeg": "a JPEG image", "webp": "a WebP image", "gif": "a GIF image",
    "bmp": "a BMP image", "avif": "an AVIF image", "wav": "a WAV file", "rf64": "a WAV file",
    "flac": "a FLAC file", "vorbis": "an Ogg file", "opus": "an Ogg file", "mp3": "an MP3 file",
    "aiff": "an AIFF file", "au": "an AU file", "caf": "a CAF file", "w64": "a W64 file",
    "sphere": "a SPHERE file", "m4a": "an MP4 or M4A file", "webm": "a WebM or Matroska file",
    "aac": "an AAC file",
}  # fmt: skip


@pytest.mark.parametrize(("name", "file"), originals().items(), ids=lambda value: str(value)[:20])
def test_originals_are_detected(name: str, file: tuple[str, bytes]) -> None:
    kind, data = file
    found = detect_format(data)
    assert found is not None and found.kind == kind
    assert found.name == _NAMES[name.partition("-")[0]]


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"II*\0....", "a TIFF image"),
        (b"\0\0\0\x1cftypheic\0\0\0\0mif1heic", "a HEIC image"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0avifmif1", "an AVIF image"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000 image"),
        (b"\n<!DOCTYPE html><html>", "an HTML page"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg">', "an SVG image"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer (run git lfs pull)"),
        (b"NIST_1A\n   1024\nsample_coding -s26 pcm,embedded-shorten-v2.00\n",
         "a SPHERE file compressed with Shorten"),
        (b"ID3\x03\0\0\0\0\0\x0a" + bytes(10) + b"fLaC", "a FLAC file"),
        (bytes(20) + b"\xff\xfb\x90\x64", "an MP3 file"),
        (b"OggS\0\2" + bytes(20) + b"\1PSpeex   1.2", "a Speex file"),
    ],
)  # fmt: skip
def test_other_formats_are_named(data: bytes, name: str) -> None:
    found = detect_format(data)
    assert found is not None and found.name == name


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"hello", b"\xff", bytes(100), b"RIFF....ABCD", b"ID3"[:2]]
)
def test_unknown_bytes(data: bytes) -> None:
    assert detect_format(data) is None


def test_member_of_a_sample() -> None:
    sample = {"__key__": "k", "image.jpg": b"a", "txt": b"b", "json": b"{}"}
    assert only_medium(sample, "image") == ("image.jpg", b"a")
    assert only_medium({**sample, "jfif": b"c"}, "image") == ("jfif", b"c"), "the plain name wins"
    assert only_medium({"__key__": "k", "opus": b"d"}, "audio") == ("opus", b"d")
    with pytest.raises(DataError, match="sample 'k' has 2 members that could be its image"):
        only_medium({**sample, "mask.png": b"c"}, "image")
    with pytest.raises(DataError, match=r"sample 'k' has no audio clip .flac, wav"):
        only_medium(sample, "audio")
