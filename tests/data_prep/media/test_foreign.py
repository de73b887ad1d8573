"""Formats that training does not read are converted without loss, or refused by name."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from data_prep.corpus import BadSampleError, Clip
from data_prep.media.checks import checked_audio
from data_prep.media.convert import read_media
from data_prep.options import Preprocessing
from muomni.data.media.audio import decode_declared_length
from muomni.data.media.decode import open_image, read_audio
from muomni.data.media.formats import Kind
from tests.data_prep.corpus_files import write_file
from tests.data_prep.media.originals import (
    NUM_SAMPLES,
    RATE_HZ,
    by_ffmpeg,
    encoded,
    originals,
    tone,
)

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")


def _message(media: str | Clip, kind: Kind) -> str:
    with pytest.raises(BadSampleError) as error:
        read_media(media, kind)
    assert error.value.problem.reason == f"broken-{kind}"
    return error.value.problem.message


@pytest.mark.parametrize("name", ["png", "jpeg", "webp", "wav", "flac", "vorbis", "mp3", "opus"])
def test_kept_formats_keep_their_bytes_under_any_name(tmp_path: Path, name: str) -> None:
    kind, data = originals()[name]
    path = str(write_file(tmp_path / "a.gif", data))
    extension = {"jpeg": "jpg", "vorbis": "ogg", "opus": "ogg"}.get(name, name)
    assert read_media(path, kind) == (extension, data)


@pytest.mark.parametrize("name", ["gif", "bmp", "avif"])
def test_images_become_png(tmp_path: Path, name: str) -> None:
    _, data = originals()[name]
    extension, png = read_media(str(write_file(tmp_path / "a.jpg", data)), "image")
    assert extension == "png" and png.startswith(b"\x89PNG")
    original = Image.open(io.BytesIO(data)).convert("RGB")
    np.testing.assert_array_equal(np.array(open_image(png)), np.array(original))


def test_transparency_of_a_gif_is_kept(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((0, 0), 0)
    buffer = io.BytesIO()
    image.save(buffer, "GIF", transparency=0)
    _, png = read_media(str(write_file(tmp_path / "a.gif", buffer.getvalue())), "image")
    pixels = np.array(Image.open(io.BytesIO(png)).convert("RGBA"))
    assert pixels[0, 0, 3] == 0 and pixels[1, 1].tolist() == [0, 255, 0, 255]


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (
            b"II*\0" + bytes(50),
            "image",
            "a.jpg is a TIFF image; supported are PNG, JPEG, WebP, GIF",
        ),
        (encoded("FLAC"), "image", "a.jpg is a FLAC file; image file expected"),
        (b"<html>403</html>", "image", "a.jpg is an HTML page; image file expected"),
        (b"", "audio", "a.jpg is empty"),
        (b"words", "audio", "a.jpg is not a known image or audio file"),
        (b"GIF89a" + bytes(30), "image", "a.jpg: broken image"),
        (originals()["aiff"][1][:-500], "audio", "a.jpg: broken audio clip (has "),
    ],
)
def test_refused_files_are_named(tmp_path: Path, content: bytes, kind: Kind, message: str) -> None:
    assert message in _message(str(write_file(tmp_path / "a.jpg", content)), kind)


@pytest.mark.parametrize("kind", ["AIFF", "AU", "CAF", "W64", "NIST"])
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "PCM_32", "FLOAT", "ULAW"])
def test_uncompressed_audio_keeps_its_samples(tmp_path: Path, kind: str, subtype: str) -> None:
    if not soundfile.check_format(kind, subtype):
        pytest.skip(f"{kind} has no {subtype}")
    content = encoded(kind, subtype, 2)
    path = str(write_file(tmp_path / "a.wav", content))
    extension, data = read_media(path, "audio")
    assert extension == ("wav" if subtype in ("PCM_32", "FLOAT") else "flac")
    np.testing.assert_array_equal(read_audio(data)[0], read_audio(content)[0])
    assert "broken audio clip" in _message(str(write_file(tmp_path / "b", content[:-900])), "audio")


def test_flac_gets_the_right_length(tmp_path: Path) -> None:
    whole = encoded("FLAC", "PCM_16")
    for declared in (0, 100):
        data = whole[:22] + declared.to_bytes(4, "big") + whole[26:]
        path = str(write_file(tmp_path / f"{declared}.flac", data))
        audio = checked_audio(path, Preprocessing())
        assert (audio.data, audio.facts.duration_ms) == (whole, 300)
        assert len(decode_declared_length(audio.data)) == NUM_SAMPLES
    header_only = checked_audio(str(tmp_path / "0.flac"), Preprocessing(check="header"))
    assert header_only.facts.duration_ms == 300


@pytest.mark.parametrize("name", ["mp3-without-xing", "vorbis-chained"])
def test_header_check_decodes_what_does_not_tell_its_length(tmp_path: Path, name: str) -> None:
    path = str(write_file(tmp_path / "a", originals()[name][1]))
    facts = [
        checked_audio(path, Preprocessing(check=check)).facts for check in ("header", "decode")
    ]
    assert facts[0] == facts[1]


@pytest.mark.parametrize("name", ["mp3-without-xing", "flac", "aiff", "w64"])
def test_segments_of_files_of_unknown_length(tmp_path: Path, name: str) -> None:
    data = originals()[name][1]
    if name == "flac":
        data = data[:22] + bytes(4) + data[26:]
    path = str(write_file(tmp_path / "a.dat", data))
    whole, _ = read_audio(data)
    extension, part = read_media(Clip(path, 0.1, 0.05), "audio")
    assert extension == "flac"
    expected = whole[RATE_HZ // 10 : RATE_HZ * 3 // 20]
    np.testing.assert_allclose(read_audio(part)[0], expected, atol=2e-4)
    assert "exceeds the end" in _message(Clip(path, 0.1, 1.0), "audio")


@needs_ffmpeg
@pytest.mark.parametrize("name", ["m4a", "webm", "aac"])
def test_ffmpeg_formats_become_flac(tmp_path: Path, name: str) -> None:
    path = str(write_file(tmp_path / "a.wav", originals()[name][1]))
    extension, data = read_media(path, "audio")
    samples, rate_hz = read_audio(data)
    assert extension == "flac" and soundfile.info(io.BytesIO(data)).subtype == "PCM_16"
    assert NUM_SAMPLES / RATE_HZ <= len(samples) / rate_hz < NUM_SAMPLES / RATE_HZ + 0.2
    extension, part = read_media(Clip(path, 0.1, 0.1), "audio")
    assert (extension, len(read_audio(part)[0])) == ("flac", rate_hz // 10)


@needs_ffmpeg
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24"])
def test_lossless_codec_keeps_its_samples(tmp_path: Path, subtype: str) -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(), RATE_HZ, subtype, format="WAV")
    wavpack = by_ffmpeg("-c:a", "wavpack", "-f", "wv", data=buffer.getvalue())
    _, data = read_media(str(write_file(tmp_path / "a.wv", wavpack)), "audio")
    assert soundfile.info(io.BytesIO(data)).subtype == subtype
    np.testing.assert_array_equal(read_audio(data)[0], read_audio(buffer.getvalue())[0])


def test_without_ffmpeg_the_file_and_the_remedy_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    header = b"\0\0\0\x1cftypM4A \0\0\0\0M4A mp42" + bytes(100)
    message = _message(str(write_file(tmp_path / "talk.m4a", header)), "audio")
    assert "talk.m4a: it is an MP4 or M4A file, which needs ffmpeg; install ffmpeg, or" in message


@needs_ffmpeg
def test_broken_file_of_ffmpeg_is_refused(tmp_path: Path) -> None:
    header = b"\0\0\0\x1cftypM4A \0\0\0\0M4A mp42" + bytes(100)
    message = _message(str(write_file(tmp_path / "talk.m4a", header)), "audio")
    assert "is an MP4 or M4A file that ffmpeg cannot decode" in message
