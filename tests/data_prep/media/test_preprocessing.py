"""Preprocessing: sizes, formats, rates, and texts are as requested, and results are deterministic."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.cli.main import main
from data_prep.media.preprocessing import convert_audio, convert_image, normalize_text, trimmed
from data_prep.options import CHECKS, NORMALIZERS, OUTPUT_FORMATS, Check, ImageFormat, Preprocessing
from muomni.data.media.decode import image_size, open_image, read_audio
from muomni.data.shards.manifest import Manifest
from muomni.data.shards.reader import SplitReader
from tests.data_prep.raw_corpora import audio, write_coco, write_ljspeech


def _image(
    width: int, height: int, mode: str = "RGB", kind: str = "JPEG", turned: bool = False
) -> bytes:
    ramp = np.linspace(0, 255, width * height).reshape(height, width).astype(np.uint8)
    image = Image.fromarray(ramp).convert(mode)
    exif = Image.Exif()
    if turned:
        exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"exif": exif} if turned else {}))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("size", "turned", "expected"),
    [
        ((400, 200), False, (100, 50)),
        ((101, 100), False, (50, 50)),
        ((300, 600), True, (100, 50)),
        ((60, 50), False, (60, 50)),
        ((40, 30), False, (40, 30)),
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_only_larger_images_are_shrunk(
    size: tuple[int, int], turned: bool, expected: tuple[int, int], kind: str
) -> None:
    data = _image(*size, kind=kind, turned=turned)
    extension = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[kind]
    converted = convert_image(Preprocessing(resize_shorter=50), extension, data)
    assert converted[0] == extension and converted[2:] == (expected, size)
    assert image_size(converted[1]) == expected
    assert (converted[1] == data) == (min(size) <= 50)
    whole = open_image(data).resize(expected, Image.Resampling.BICUBIC)
    difference = np.asarray(whole, np.int16) - np.asarray(open_image(converted[1]), np.int16)
    assert np.abs(difference).mean() < 4
    larger = convert_image(Preprocessing(resize_shorter=700, upscale=True), extension, data)
    assert min(larger[2]) == 700


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("form", OUTPUT_FORMATS)
def test_every_mode_is_resized(mode: str, form: ImageFormat) -> None:
    kind, extension = ("JPEG", "jpg") if mode == "CMYK" else ("PNG", "png")
    if mode == "I;16":
        buffer = io.BytesIO()
        Image.fromarray(np.full((64, 64), 0x8000, np.uint16)).save(buffer, "PNG")
        data = buffer.getvalue()
    else:
        data = _image(64, 64, mode, kind)
    converted = convert_image(Preprocessing(resize_shorter=32, image_format=form), extension, data)
    assert converted[0] == {"keep": extension, "jpeg": "jpg"}.get(form, form)
    image = open_image(converted[1])
    assert image.size == (32, 32)
    assert abs(np.asarray(image).mean() - np.asarray(open_image(data)).mean()) < 4


def _make(task: str, form: str, src: Path, out: Path, *options: str) -> Manifest:
    main(
        [
            *(task, "--format", form, "--src", str(src), "--out", str(out), "--workers", "1"),
            *("--val-fraction", "0", "--test-fraction", "0", "--shard-size", "5", *options),
        ]
    )
    return Manifest.load(out)


def _samples(manifest: Manifest) -> list[dict]:
    reader = SplitReader(manifest, "train")
    return [reader.read(index) for index in range(len(reader))]


def test_image_preprocessing_of_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = write_coco(tmp_path / "src", 12)
    options = ("--resize-shorter", "9", "--image-format", "webp", "--min-side", "18")
    manifest = _make("image-caption", "coco", src, tmp_path / "out", *options)
    assert manifest.preprocessing == {
        "resize_shorter": "9",
        "image_format": "webp",
        "quality": "90",
    }
    card = (tmp_path / "out/README.md").read_text()
    assert "- Preprocessing: image_format=webp, quality=90, resize_shorter=9\n" in card
    assert {image_size(sample["webp"]) for sample in _samples(manifest)} == {(12, 9)}
    assert manifest.split("train").totals.num_pixels == 12 * 12 * 9
    main(["verify", "--full", "--decode", "100", "--workers", "1", str(tmp_path / "out")])
    for number, workers in enumerate(("1", "2")):
        other = _make(
            "image-caption", "coco", src, tmp_path / f"o{number}", *options, "--workers", workers,
            "--name", "out",
        )  # fmt: skip
        assert other.fingerprint == manifest.fingerprint
    capsys.readouterr()
    with pytest.raises(SystemExit):
        _make("image-caption", "coco", src, tmp_path / "out", "--resize-shorter", "8")
    assert "with other options" in capsys.readouterr().err


def test_audio_clips_are_resampled(tmp_path: Path) -> None:
    src = write_ljspeech(tmp_path / "src", [f"Number {n}" for n in range(6)])
    tone = audio(3, rate=44_100, duration_s=0.5)
    (src / "wavs/LJ-0003.wav").write_bytes(tone)
    manifest = _make("speech", "ljspeech", src, tmp_path / "out", "--sample-rate", "16000")
    samples = {sample["__key__"]: sample for sample in _samples(manifest)}
    assert samples["LJ-0001"]["wav"] == audio(1)
    resampled, rate = soundfile.read(io.BytesIO(samples["LJ-0003"]["flac"]))
    assert (len(resampled), rate) == (8000, 16_000)
    spectrum = np.abs(np.fft.rfft(resampled))
    assert spectrum.argmax() * 2 == 260
    body = json.loads(samples["LJ-0003"]["json"])
    assert (body["sample_rate_hz"], body["original_sample_rate_hz"]) == (16_000, 44_100)
    assert body["duration_s"] == 0.5
    again = _make(
        "speech", "ljspeech", src, tmp_path / "b", "--sample-rate", "16000", "--workers", "2",
        "--name", "out",
    )  # fmt: skip
    assert again.fingerprint == manifest.fingerprint
    main(["verify", "--full", "--decode", "100", "--workers", "1", str(tmp_path / "out")])


def test_original_texts_are_kept(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("  “Cafe\u0301”,  he said…\nplain\n", encoding="utf-8")
    steps = "nfc,quotes,lower,punctuation,whitespace"
    manifest = _make("text", "txt", tmp_path / "t.txt", tmp_path / "out", "--normalize", steps)
    samples = {sample["txt"].decode(): sample for sample in _samples(manifest)}
    assert set(samples) == {"café he said", "plain"}
    assert json.loads(samples["café he said"]["json"]) == {
        "original_text": "  “Cafe\u0301”,  he said…"
    }
    assert "json" not in samples["plain"]
    assert manifest.split("train").totals.num_chars == 17
    src = write_ljspeech(tmp_path / "src", ["Well-known, isn't it?", "?!", "fine"])
    manifest = _make(
        "tts", "ljspeech", src, tmp_path / "tts", "--normalize", "lower,punctuation",
        "--max-bad-fraction", "0.5",
    )  # fmt: skip
    assert manifest.dropped == {"empty-text": 1}
    (sample,) = (s for s in _samples(manifest) if s["txt"] != b"fine")
    assert sample["txt"] == b"well-known isn't it"
    assert json.loads(sample["json"])["original_text"] == "Well-known, isn't it?"
    src = write_coco(tmp_path / "coco", 3)
    manifest = _make("image-caption", "coco", src, tmp_path / "c", "--normalize", "upper")
    body = json.loads(_samples(manifest)[0]["json"])
    assert body["captions"] == [text.upper() for text in body["original_captions"]]


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=60), st.sampled_from(sorted(NORMALIZERS)))
def test_normalizers_are_idempotent(text: str, step: str) -> None:
    once = normalize_text(Preprocessing(normalize=(step,)), text)
    assert normalize_text(Preprocessing(normalize=(step,)), once) == once


def test_check_header(tmp_path: Path) -> None:
    src = write_coco(tmp_path / "src", 6)
    image = src / "train2017/000000000003.png"
    image.write_bytes(image.read_bytes()[:60])
    common = ("image-caption", "coco", src)
    strict = _make(*common, tmp_path / "strict", "--max-bad-fraction", "0.5")
    loose = _make(*common, tmp_path / "loose", "--check", "header")
    assert strict.dropped == {"broken-image": 1} and loose.dropped == {}
    assert loose.preprocessing == {"check": "header"}
    assert loose.split("train").totals.num_pixels == 6 * 24 * 18
    speech = write_ljspeech(tmp_path / "lj", [f"Number {n}" for n in range(3)])
    (speech / "wavs/LJ-0002.wav").write_bytes(b"RIFFnothing")
    manifest = _make(
        "tts", "ljspeech", speech, tmp_path / "tts", "--check", "header", "--max-bad-fraction",
        "0.5", "--max-silence-fraction", "0.9",
    )  # fmt: skip
    assert manifest.dropped == {"broken-audio": 1}
    assert manifest.split("train").totals.duration_ms == 600


def test_retry_applies_the_same_preprocessing(tmp_path: Path) -> None:
    src = write_coco(tmp_path / "src", 6)
    image = src / "train2017/000000000003.png"
    whole = image.read_bytes()
    image.write_bytes(whole[:60])
    options = ("--resize-shorter", "9", "--normalize", "upper", "--max-bad-fraction", "0.5")
    _make("image-caption", "coco", src, tmp_path / "out", *options)
    image.write_bytes(whole)
    main(["retry-bad", str(tmp_path / "out"), "--workers", "1"])
    samples = _samples(Manifest.load(tmp_path / "out"))
    assert {image_size(sample["png"]) for sample in samples} == {(12, 9)}
    assert all(sample["txt"].isupper() for sample in samples)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resize-shorter", "0"], "--resize-shorter must be at least 1, got 0"),
        (["--upscale"], "--upscale requires --resize-shorter"),
        (["--quality", "0"], "--quality must be between 1 and 100, got 0"),
        (["--normalize", "nfc,magic"], "'magic' is unknown; choose from nfc"),
    ],
)
def test_invalid_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    src = write_coco(tmp_path / "src", 2)
    with pytest.raises(SystemExit) as stop:
        _make("image-caption", "coco", src, tmp_path / "out", *options)
    assert stop.value.code == 2 and message in capsys.readouterr().err


@settings(deadline=None, max_examples=60)
@given(
    resize=st.none() | st.integers(1, 999),
    form=st.sampled_from(OUTPUT_FORMATS),
    quality=st.integers(1, 100),
    rate=st.none() | st.integers(4000, 192_000),
    steps=st.lists(st.sampled_from(sorted(NORMALIZERS)), max_size=3),
    check=st.sampled_from(CHECKS),
)
def test_preprocessing_text_round_trip(
    resize: int | None,
    form: ImageFormat,
    quality: int,
    rate: int | None,
    steps: list[str],
    check: Check,
) -> None:
    preprocessing = Preprocessing(check, resize, False, form, quality, rate, tuple(steps))
    if not preprocessing.changes_images:
        preprocessing = Preprocessing(check, resize, False, form, 90, rate, tuple(steps))
    assert Preprocessing.from_text(preprocessing.as_text()) == preprocessing


def _padded_tone(rate_hz: int, num_bits: int, channels: int = 1) -> np.ndarray:
    """Half a second of silence, one of a tone, and half a second of silence, as integers."""
    time = np.arange(rate_hz) / rate_hz
    tone = np.rint(0.9 * (1 << (num_bits - 1)) * np.sin(2 * np.pi * 220 * time))
    silence = np.zeros(rate_hz // 2)
    return np.concatenate([silence, tone, silence])[:, None].repeat(channels, 1).astype(np.int64)


@pytest.mark.parametrize(
    ("subtype", "num_bits", "stored"),
    [
        ("PCM_U8", 8, ("flac", "PCM_16")),
        ("PCM_16", 16, ("flac", "PCM_16")),
        ("PCM_24", 24, ("flac", "PCM_24")),
        ("FLOAT", 24, ("wav", "FLOAT")),
    ],
)
def test_trimming_keeps_the_samples(subtype: str, num_bits: int, stored: tuple[str, str]) -> None:
    rate_hz = 8000
    tone = _padded_tone(rate_hz, num_bits, channels=2)
    buffer = io.BytesIO()
    scaled = (tone << (32 - num_bits)).astype(np.int32)
    soundfile.write(
        buffer, scaled / 2.0**31 if subtype == "FLOAT" else scaled, rate_hz, subtype, format="WAV"
    )
    samples, _ = read_audio(buffer.getvalue())
    extension, data, kept, _ = convert_audio(
        Preprocessing(trim_dbfs=-50), "wav", buffer.getvalue(), samples, rate_hz
    )
    margin, frame = 800, 160
    assert abs(len(kept) - (rate_hz + 2 * margin)) <= 2 * frame
    assert (extension, soundfile.info(io.BytesIO(data)).subtype) == stored
    np.testing.assert_array_equal(read_audio(data)[0], kept)
    start = next(n for n in range(len(samples)) if np.array_equal(samples[n : n + len(kept)], kept))
    np.testing.assert_array_equal(samples[start : start + len(kept)], kept)


def test_what_is_not_trimmed_keeps_its_bytes() -> None:
    trim = Preprocessing(trim_dbfs=-50)
    for samples in (np.zeros(8000), np.sin(np.arange(8000))):
        buffer = io.BytesIO()
        soundfile.write(buffer, samples, 8000, format="WAV")
        decoded, _ = read_audio(buffer.getvalue())
        assert convert_audio(trim, "wav", buffer.getvalue(), decoded, 8000)[1] == buffer.getvalue()


@pytest.mark.parametrize("channel", [0, 1])
def test_a_loud_channel_is_not_silence(channel: int) -> None:
    samples = np.zeros((16_000, 2), np.float32)
    samples[4000:8000, channel] = 0.5
    kept = trimmed(samples, 16_000, -50)
    assert 4000 <= len(kept) <= 4000 + 2 * 1600 + 2 * 320
    assert kept[:, channel].sum() == samples[:, channel].sum()


def test_trimmed_clips_record_their_duration(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", _padded_tone(8000, 16).astype(np.int16), 8000)
    (tmp_path / "t.jsonl").write_text('{"audio": "a.wav", "text": "hello"}\n')
    command = ["tts", "--format", "jsonl", "--src", str(tmp_path / "t.jsonl"), "--workers", "1"]
    command += ["--val-fraction", "0", "--test-fraction", "0", "--check", "header"]
    main([*command, "--out", str(tmp_path / "out"), "--trim-silence"])
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.preprocessing["trim_dbfs"] == "-50.0"
    reader = SplitReader(manifest, "train")
    content = json.loads(reader.read(0)["json"])
    assert content["original_duration_s"] == 2
    assert content["duration_s"] == pytest.approx(1.2, abs=0.05)
    assert reader.columns[0]["duration_ms"] == round(1000 * content["duration_s"])
    main(["verify", "--full", "--decode", "100", "--workers", "1", str(tmp_path / "out")])


@pytest.mark.parametrize("level", ["0", "3", "-101", "nan"])
def test_levels_that_no_clip_has_are_refused(
    level: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.jsonl").write_text("")
    command = ["tts", "--format", "jsonl", "--src", str(tmp_path / "t.jsonl")]
    with pytest.raises(SystemExit) as stop:
        main([*command, "--out", str(tmp_path / "out"), "--trim-silence", level])
    assert stop.value.code == 2
    assert "--trim-silence" in capsys.readouterr().err
