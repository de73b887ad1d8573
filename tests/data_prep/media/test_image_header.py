"""Sizes from headers are those that Pillow gives, and no bytes make the search fail."""

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.media.image_header import size_in_header


@pytest.mark.parametrize("size", [(1, 1), (37, 500), (1200, 3)])
@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("PNG", "RGBA", {}),
        ("PNG", "P", {}),
        ("JPEG", "RGB", {}),
        ("JPEG", "L", {"progressive": True}),
        ("JPEG", "CMYK", {"comment": b"x" * 3000, "optimize": True}),
        ("WEBP", "RGB", {}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("WEBP", "RGBA", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"}),
    ],
)
def test_sizes(kind: str, mode: str, options: dict, size: tuple[int, int]) -> None:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind, **options)
    found = size_in_header(buffer.getvalue())
    assert found == size or (kind == "WEBP" and found is None)
    for length in range(0, 64):
        assert size_in_header(buffer.getvalue()[:length]) in (None, size)


@settings(deadline=None, max_examples=200)
@given(
    start=st.sampled_from(
        [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n....IHDR", b"RIFF....WEBPVP8X"]
    ),
    rest=st.binary(max_size=60),
)
def test_any_bytes(start: bytes, rest: bytes) -> None:
    size = size_in_header(start + rest)
    assert size is None or min(size) > 0
