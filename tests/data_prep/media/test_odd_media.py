"""Unusual and broken images and audio clips are handled or quarantined.

They never cause a hang, a traceback, missing samples, or code execution.
"""

import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from data_prep.cli.main import main
from tests.data_prep.commands import quarantined, shard
from tests.data_prep.raw_corpora import audio, image


def _chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def _png(width: int, height: int, raw: bytes, extra: bytes = b"", depth: int = 8) -> bytes:
    size = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", size)
        + extra
        + _chunk(b"IDAT", zlib.compress(raw))
        + _chunk(b"IEND", b"")
    )


_PIXELS = (b"\0" + bytes(12)) * 4
_BOMB = zlib.compress(bytes(1 << 27))


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


_FRAMES = [Image.new("RGB", (20, 20), color) for color in ("red", "green", "blue")]
IMAGES: dict[str, tuple[str, bytes, bool]] = {
    "claims-many-pixels": ("png", _png(2**31 - 1, 2**31 - 1, b""), False),
    "claims-a-line": ("png", _png(2**31 - 1, 1, b""), False),
    "100-megapixels": ("png", _png(10_000, 10_000, b""), False),
    "no-pixels": ("png", _png(0, 0, b""), False),
    "text-bomb": ("png", _png(4, 4, _PIXELS, _chunk(b"zTXt", b"x\0\0" + _BOMB)), False),
    "profile-bomb": ("png", _png(4, 4, _PIXELS, _chunk(b"iCCP", b"x\0\0" + _BOMB)), False),
    "pixel-bomb": ("png", _png(4, 4, _PIXELS + bytes(1 << 27)), True),
    "16-bit-color": ("png", _png(4, 4, (b"\0" + bytes(24)) * 4, depth=16), True),
    "16-bit-gray": ("png", _saved(Image.new("I;16", (8, 8), 40_000), "PNG"), True),
    "cmyk": ("jpg", _saved(Image.new("CMYK", (8, 8), (9, 9, 9, 9)), "JPEG"), True),
    "progressive": ("jpg", _saved(_FRAMES[0], "JPEG", progressive=True), True),
    "animated-png": (
        "png",
        _saved(_FRAMES[0], "PNG", save_all=True, append_images=_FRAMES[1:]),
        True,
    ),
    "animated-webp": (
        "webp",
        _saved(_FRAMES[0], "WEBP", save_all=True, append_images=_FRAMES[1:]),
        True,
    ),
    "palette": ("png", _saved(_FRAMES[0].convert("P"), "PNG", transparency=0), True),
    "gif": ("gif", _saved(_FRAMES[0], "GIF"), True),
    "tiff": ("jpg", _saved(_FRAMES[0], "TIFF"), False),
    "postscript-inside": ("png", _saved(_FRAMES[0], "EPS"), False),
    "empty": ("jpg", b"", False),
    "html": ("jpg", b"<html>404</html>", False),
    "cut": ("jpg", _saved(_FRAMES[0], "JPEG")[:-30], False),
    "another-extension": ("png", _saved(_FRAMES[0], "JPEG"), True),
}


@pytest.mark.parametrize("preprocessing", [(), ("--resize-shorter", "4"), ("--check", "header")])
def test_images(tmp_path: Path, preprocessing: tuple[str, ...]) -> None:
    rows = ["id,image,caption"]
    for name, (extension, data, _) in IMAGES.items():
        (tmp_path / f"{name}.{extension}").write_bytes(data)
        rows.append(f"{name},{name}.{extension},a thing")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    out = tmp_path / "out"
    options = ("--max-bad-fraction", "1", *preprocessing)
    manifest = shard("image-caption", "csv", tmp_path / "t.csv", out, *options)
    expected = {name for name, (_, _, is_good) in IMAGES.items() if not is_good}
    if "header" in preprocessing:
        # What is broken behind its header is let in on request.
        assert set(quarantined(out)) <= expected
        return
    assert set(quarantined(out)) == expected
    assert set(quarantined(out).values()) == {"broken-image"}
    assert manifest.split("train").num_samples == len(IMAGES) - len(expected)
    main(["verify", "--full", "--decode", "100", "--workers", "1", str(out)])


def _claiming(data: bytes, position: int, field: bytes) -> bytes:
    return data[:position] + field + data[position + len(field) :]


def _tone(
    rate: int, channels: int, subtype: str, kind: str = "WAV", duration_s: float = 0.2
) -> bytes:
    buffer = io.BytesIO()
    tone = 0.3 * np.sin(np.arange(int(rate * duration_s)) / 9)
    soundfile.write(buffer, np.stack([tone] * channels, axis=1), rate, subtype, format=kind)
    return buffer.getvalue()


_FLAC, _WAV = audio(1, fmt="FLAC"), audio(1)
AUDIO_CLIPS: dict[str, tuple[str, bytes, bool]] = {
    **{
        f"{rate}-{channels}-{subtype}": ("wav", _tone(rate, channels, subtype), True)
        for rate in (8_000, 11_025, 16_000, 44_100, 96_000)
        for channels in (1, 2)
        for subtype in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW")
    },
    "ogg": ("ogg", _tone(16_000, 1, "VORBIS", "OGG"), True),
    "mp3": ("mp3", _tone(16_000, 1, "MPEG_LAYER_III", "MP3"), True),
    "zero-length": ("wav", _tone(16_000, 1, "PCM_16", duration_s=0), False),
    "empty": ("wav", b"", False),
    "no-audio": ("flac", b"<html>", False),
    "cut-flac": ("flac", _FLAC[:-500], False),
    "cut-wav": ("wav", _WAV[:-500], False),
    "claims-a-year": ("flac", _claiming(_FLAC, 21, bytes([_FLAC[21] | 15]) + b"\xff" * 4), False),
    "piped": ("wav", _claiming(_WAV, _WAV.index(b"data") + 4, b"\xff" * 4), True),
    "many-channels": ("wav", _claiming(_WAV, 22, b"\xff\xff"), False),
    "no-rate": ("wav", _claiming(_WAV, 24, bytes(4)), False),
    "not-a-number": ("wav", _tone(16_000, 1, "FLOAT")[:-4] + b"\0\0\xc0\x7f", False),
    "video": ("mp4", b"\0\0\0\x18ftypmp42", False),
}


@pytest.mark.parametrize("preprocessing", [(), ("--sample-rate", "16000")])
def test_audio_clips(tmp_path: Path, preprocessing: tuple[str, ...]) -> None:
    rows = []
    for name, (extension, data, _) in AUDIO_CLIPS.items():
        (tmp_path / f"{name}.{extension}").write_bytes(data)
        rows.append(json.dumps({"id": name, "audio": f"{name}.{extension}", "text": "words"}))
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    out = tmp_path / "out"
    options = ("--max-bad-fraction", "1", *preprocessing)
    manifest = shard("speech", "jsonl", tmp_path / "t.jsonl", out, *options)
    expected = {name for name, (_, _, is_good) in AUDIO_CLIPS.items() if not is_good}
    assert set(quarantined(out)) == expected
    assert set(quarantined(out).values()) == {"broken-audio"}
    good = len(AUDIO_CLIPS) - len(expected)
    assert manifest.split("train").num_samples == good
    main(["verify", "--full", "--decode", "100", "--workers", "1", str(out)])
    sheet = str(tmp_path / "sheet.png")
    main(["inspect", str(out), "--count", "100", "--png", sheet])


def test_endless_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "good.png").write_bytes(image(1))
    names = ("pipe", "zero", "folder", "loop", "good", "none", "nul\\u0000byte")
    rows = [f'{{"id": "{name}", "image": "{name}.png", "caption": "x"}}' for name in names]
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    out = tmp_path / "out"
    shard("image-caption", "jsonl", tmp_path / "t.jsonl", out, "--max-bad-fraction", "1")
    assert set(quarantined(out).values()) == {"missing-media"}
    assert len(quarantined(out)) == len(names) - 1
