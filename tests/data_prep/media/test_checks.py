"""Sizes from image headers agree with Pillow, and only formats that decode are accepted."""

import io
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.corpus import BadSampleError
from data_prep.media.checks import checked_audio, header_size
from data_prep.options import Preprocessing
from muomni.errors import DataError


def _encode(kind: str, mode: str, size: tuple[int, int], **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(1, 1), (37, 500), (1200, 3)])
@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("PNG", "RGBA", {}),
        ("PNG", "P", {}),
        ("JPEG", "RGB", {}),
        ("JPEG", "L", {"progressive": True}),
        ("JPEG", "CMYK", {"comment": b"x" * 3000, "optimize": True}),
        (
            "JPEG",
            "RGB",
            {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"},
        ),
        ("WEBP", "RGB", {}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("WEBP", "RGBA", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"}),
    ],
)
def test_header_size(
    kind: str, mode: str, options: dict[str, object], size: tuple[int, int]
) -> None:
    data = _encode(kind, mode, size, **options)
    assert header_size(data) == size
    for length in range(64):
        with suppress(DataError):
            assert header_size(data[:length]) == size


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_other_formats_are_rejected(kind: str) -> None:
    with pytest.raises(DataError):
        header_size(_encode(kind, "RGB", (8, 8)))


@settings(deadline=None, max_examples=200)
@given(
    start=st.sampled_from(
        [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n....IHDR", b"RIFF....WEBPVP8X"]
    ),
    rest=st.binary(max_size=60),
)
def test_arbitrary_bytes(start: bytes, rest: bytes) -> None:
    with suppress(DataError):
        assert min(header_size(start + rest)) > 0


def test_the_header_of_a_truncated_mp3_is_not_trusted(tmp_path: Path) -> None:
    path = tmp_path / "a.mp3"
    soundfile.write(path, 0.3 * np.sin(np.arange(32_000) / 7), 16_000, format="MP3")
    trusting = Preprocessing(check="header")
    assert checked_audio(str(path), trusting).facts.duration_ms == 2000
    whole = path.read_bytes()
    (tmp_path / "cut.mp3").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadSampleError, match="broken audio clip"):
        checked_audio(str(tmp_path / "cut.mp3"), trusting)
