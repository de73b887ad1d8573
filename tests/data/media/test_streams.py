"""Audio is decoded to its end, whatever length its header declares; truncated files are refused."""

import io
import shutil
import struct
from collections.abc import Callable

import numpy as np
import pytest
import soundfile

from muomni.data.media.audio import decode_declared_length, resampled_length
from muomni.data.media.decode import declared_length, read_audio
from muomni.errors import DataError
from tests.data_prep.media.originals import (
    NUM_SAMPLES,
    RATE_HZ,
    by_ffmpeg,
    encoded,
    tone,
    without_first_frame,
)

WAV = encoded("WAV", "PCM_16")
_DATA = WAV.index(b"data")
_BYTES = 2 * NUM_SAMPLES


def _wav(outer: int, inner: int, rest: bytes = b"", wav: bytes = WAV) -> bytes:
    """The WAV with other sizes of the file and of its samples, and bytes behind them."""
    sizes = struct.pack("<I", outer & 0xFFFFFFFF), struct.pack("<I", inner & 0xFFFFFFFF)
    return wav[:4] + sizes[0] + wav[8 : _DATA + 4] + sizes[1] + wav[_DATA + 8 :] + rest


_LIST = b"LIST" + struct.pack("<I", 4) + b"INFO"
_OUTER = len(WAV) - 8


@pytest.mark.parametrize(
    "data",
    [
        _wav(0, 0),
        _wav(_OUTER, 0),
        _wav(-1, -1),
        _wav(0x7FFFFFFF, 0x7FFFFFDB),
        _wav(_OUTER, _BYTES + 2),
        _wav(_OUTER, 3 * _BYTES),
        _wav(_OUTER + _DATA + 8, _BYTES + _DATA + 8),
        _wav(_OUTER, _BYTES // 8),
        _wav(_OUTER + 12, _BYTES, _LIST),
        _wav(_OUTER, _BYTES, b"\r\n--boundary--"),
        encoded("RF64", "PCM_16"),
        encoded("WAVEX", "PCM_16"),
        encoded("W64", "PCM_16"),
    ],
    ids=[
        *("sizes-0", "size-0", "sizes-ff", "sizes-of-a-pipe", "long-by-2", "long", "with-header"),
        *("short", "list", "junk", "rf64", "extensible", "w64"),
    ],
)
def test_wav_with_any_size_has_all_samples(data: bytes) -> None:
    samples, rate_hz = read_audio(data)
    assert (len(samples), rate_hz) == (NUM_SAMPLES, RATE_HZ)
    np.testing.assert_array_equal(samples, read_audio(WAV)[0])
    assert resampled_length(data) == len(decode_declared_length(data)) == NUM_SAMPLES


def test_rf64_of_a_pipe_has_all_samples() -> None:
    data = bytearray(encoded("RF64", "PCM_16"))
    start = data.index(b"ds64") + 8
    data[start : start + 24] = bytes(24)
    assert len(read_audio(bytes(data))[0]) == NUM_SAMPLES


@pytest.mark.parametrize("kind", ["WAV", "RF64", "FLAC", "OGG"])
@pytest.mark.parametrize("num_missing", [400, 3000])
def test_truncated_files_are_refused(kind: str, num_missing: int) -> None:
    data = encoded(kind)
    with pytest.raises(DataError, match="broken audio clip"):
        read_audio(data[:-num_missing])


def test_wav_without_samples_is_empty() -> None:
    empty = _wav(_OUTER - _BYTES + 12, 0, _LIST, WAV[: _DATA + 8])
    for data in (_wav(_OUTER - _BYTES, 0, wav=WAV[: _DATA + 8]), empty):
        with pytest.raises(DataError, match="zero length"):
            read_audio(data)


def _flac_declaring(num_samples: int, data: bytes) -> bytes:
    field = (data[21] >> 4 << 36 | num_samples).to_bytes(5, "big")
    return data[:21] + field + data[26:]


@pytest.mark.parametrize("num_samples", [0, 1, NUM_SAMPLES // 2, NUM_SAMPLES])
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24"])
def test_flac_that_declares_too_little_has_all_samples(subtype: str, num_samples: int) -> None:
    whole = encoded("FLAC", subtype, 2)
    data = _flac_declaring(num_samples, whole)
    np.testing.assert_array_equal(read_audio(data)[0], read_audio(whole)[0])
    assert (declared_length(data) is None) == (num_samples == 0)


def test_flac_that_declares_too_much_is_refused() -> None:
    with pytest.raises(DataError, match=f"has {NUM_SAMPLES} of {NUM_SAMPLES + 1} samples"):
        read_audio(_flac_declaring(NUM_SAMPLES + 1, encoded("FLAC")))


@pytest.mark.parametrize("rest", [bytes(9000), b"TAG" + bytes(125), b"junk" * 3000])
def test_bytes_behind_a_flac_do_not_matter(rest: bytes) -> None:
    assert len(read_audio(encoded("FLAC") + rest)[0]) == NUM_SAMPLES


@pytest.mark.parametrize(
    "data",
    [encoded("FLAC"), encoded("OGG", "VORBIS"), encoded("OGG", "OPUS")],
    ids=["flac", "vorbis", "opus"],
)
def test_joined_files_are_decoded_one_after_the_other(data: bytes) -> None:
    once, joined = read_audio(data)[0], read_audio(3 * data)[0]
    np.testing.assert_array_equal(joined, np.concatenate([once, once, once]))
    assert declared_length(3 * data) is None
    assert resampled_length(3 * data) == len(decode_declared_length(3 * data)) == len(joined)


def test_joined_files_of_different_rates_are_refused() -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(), 8_000, format="OGG")
    with pytest.raises(DataError, match="different rates"):
        read_audio(encoded("OGG", "VORBIS") + buffer.getvalue())


def _uneven(num_channels: int, rate_hz: int) -> np.ndarray:
    """Two seconds that are silent first: the first frames are the smallest."""
    wave = tone(num_channels, 2 * rate_hz)
    wave[: rate_hz // 2] = 0
    wave[rate_hz // 2 :] += 0.2 * np.random.default_rng(2).standard_normal((1, num_channels))
    return wave


def _mp3(num_channels: int = 1, rate_hz: int = RATE_HZ, mode: str = "VARIABLE") -> bytes:
    buffer = io.BytesIO()
    wave = _uneven(num_channels, rate_hz)[::-1]
    soundfile.write(buffer, wave, rate_hz, format="MP3", bitrate_mode=mode)
    return buffer.getvalue()


@pytest.mark.parametrize("num_channels", [1, 2])
@pytest.mark.parametrize("rate_hz", [8_000, 16_000, 24_000, 44_100])
@pytest.mark.parametrize("mode", ["CONSTANT", "AVERAGE", "VARIABLE"])
def test_mp3_without_xing_header_has_all_samples(
    mode: str, rate_hz: int, num_channels: int
) -> None:
    whole = _mp3(num_channels, rate_hz, mode)
    expected, _ = read_audio(whole)
    assert len(expected) == 2 * rate_hz
    data = without_first_frame(whole)
    samples, _ = read_audio(data)
    # Without the header, the delay of encoder and decoder is not cut off.
    delay = len(samples) - len(expected)
    assert 0 < delay < 4000
    assert len(decode_declared_length(data)) == resampled_length(data)


def test_mp3_behind_tags_and_zeros_has_all_samples() -> None:
    data = without_first_frame(_mp3())
    num_samples = len(read_audio(data)[0])
    tag = b"ID3\x03\0\0\0\0\x1f\x76" + bytes(4086)
    for before, behind in (
        (tag, b""), (tag + tag, b""), (bytes(3000), b""), (bytes(900) + tag, b""),
        (b"", b"TAG" + bytes(125)), (b"", b"APETAGEX" + bytes(200)),
    ):  # fmt: skip
        assert len(read_audio(before + data + behind)[0]) == num_samples


def test_joined_mp3_has_all_samples(capfd: pytest.CaptureFixture[str]) -> None:
    data = _mp3()
    for joined in (data + data, data + b"TAG" + bytes(125) + data):
        assert 2 * 2 * RATE_HZ <= len(read_audio(joined)[0]) < 2 * 2 * RATE_HZ + 8000
    assert not capfd.readouterr().err


def test_xing_header_that_counts_all_frames_is_trusted() -> None:
    data = _mp3(2, 44_100)
    assert declared_length(data) == (len(read_audio(data)[0]), 44_100, 2)
    for other in (data + data, without_first_frame(data)):
        assert declared_length(other) is None


@pytest.mark.parametrize("num_bytes", range(12))
def test_mp3_that_ends_in_its_first_frame_is_refused(num_bytes: int) -> None:
    data = _mp3()
    first = data.index(data[:2], data.index(b"Info" if b"Info" in data else b"Xing") + 156)
    for cut in (data[:num_bytes], data[: first + num_bytes], without_first_frame(data)[:num_bytes]):
        with pytest.raises(DataError, match=r"broken audio clip|zero length"):
            read_audio(cut)


def test_truncated_mp3_with_xing_header_is_refused() -> None:
    data = _mp3()
    with pytest.raises(DataError, match=f"of {2 * RATE_HZ} samples"):
        read_audio(data[: len(data) // 2])


def test_mp3_in_wav() -> None:
    mp3 = without_first_frame(_mp3())
    header = struct.pack("<HHIIHH", 0x55, 1, RATE_HZ, 8000, 1, 0) + struct.pack("<H", 0)
    chunks = b"WAVEfmt " + struct.pack("<I", len(header)) + header
    chunks += b"data" + struct.pack("<I", len(mp3)) + mp3
    data = b"RIFF" + struct.pack("<I", len(chunks)) + chunks
    np.testing.assert_array_equal(read_audio(data)[0], read_audio(mp3)[0])
    assert len(decode_declared_length(data)) == resampled_length(data)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")
@pytest.mark.parametrize("rate_hz", [8_000, 16_000, 44_100])
@pytest.mark.parametrize("encoder", [("-q:a", "4"), ("-b:a", "48k", "-abr", "1"), ("-b:a", "64k")])
@pytest.mark.parametrize("num_channels", [1, 2])
def test_mp3_without_xing_header_agrees_with_ffmpeg(
    num_channels: int, encoder: tuple[str, str], rate_hz: int
) -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, _uneven(num_channels, rate_hz), rate_hz, "PCM_16", format="WAV")
    arguments = ("-write_xing", "0", "-f", "mp3")
    data = by_ffmpeg(*encoder, *arguments, data=buffer.getvalue())
    raw = by_ffmpeg("-f", "f32le", data=data, demuxer="mp3")
    expected = np.frombuffer(raw, "<f4").reshape(-1, num_channels)
    np.testing.assert_allclose(read_audio(data)[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    "break_it", [lambda data: data[:30], lambda data: b"", lambda data: data[:4]]
)
@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3", "RF64"])
def test_broken_headers_are_refused(kind: str, break_it: Callable[[bytes], bytes]) -> None:
    data = break_it(encoded(kind))
    for function in (read_audio, declared_length):
        try:
            result = function(data)
        except DataError as error:
            assert "broken audio clip" in str(error) or "zero length" in str(error)
        else:
            assert result is None


@pytest.mark.parametrize("rate_hz", [1, 999, 16_001, 47_999, 1_000_000])
def test_rates_that_cannot_be_resampled_are_refused(rate_hz: int) -> None:
    data = WAV[:24] + struct.pack("<II", rate_hz, 2 * rate_hz) + WAV[32:]
    for function in (read_audio, declared_length):
        with pytest.raises(DataError, match=f"sample rate of {rate_hz} Hz, which is not supported"):
            function(data)


@pytest.mark.parametrize("rate_hz", [4_000, 11_025, 12_345, 44_056, 192_000])
def test_unusual_rates_are_resampled(rate_hz: int) -> None:
    data = WAV[:24] + struct.pack("<II", rate_hz, 2 * rate_hz) + WAV[32:]
    assert len(decode_declared_length(data)) == resampled_length(data)
