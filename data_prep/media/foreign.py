"""Convert images and audio clips of formats that training does not read, without further loss.

Pillow reads images, libsndfile uncompressed audio, and ffmpeg, where it is installed, all other audio.
Audio with at most 24 bits becomes FLAC, and WAV otherwise; decoded lossy audio becomes FLAC of 16 bits.
"""

import io
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile
from PIL import Image, ImageOps, features

from muomni.data.media.decode import MAX_VALUES, AudioFile, image_errors, read_audio
from muomni.data.media.formats import MediaFormat
from muomni.errors import DataError

_IMAGE_FORMATS = ("GIF", "BMP", "AVIF")
_FFMPEG_TIMEOUT_S = 600
# Subtype of an audio file: format and subtype that keep its samples, and the sample type that does.
_SampleType = Literal["int16", "int32", "float32", "float64"]
_EXACT: dict[str, tuple[str, str, _SampleType]] = {
    "PCM_S8": ("FLAC", "PCM_S8", "int16"),
    "PCM_U8": ("FLAC", "PCM_S8", "int16"),
    "PCM_24": ("FLAC", "PCM_24", "int32"),
    "ALAC_20": ("FLAC", "PCM_24", "int32"),
    "ALAC_24": ("FLAC", "PCM_24", "int32"),
    "PCM_32": ("WAV", "PCM_32", "int32"),
    "ALAC_32": ("WAV", "PCM_32", "int32"),
    "FLOAT": ("WAV", "FLOAT", "float32"),
    "DOUBLE": ("WAV", "DOUBLE", "float64"),
}
_SIXTEEN_BITS: tuple[str, str, _SampleType] = ("FLAC", "PCM_16", "int16")
# Lossy decoders return floats that may exceed [-1, 1]; soundfile clips them when it writes 16 bits.
_LOSSY: tuple[str, str, _SampleType] = ("FLAC", "PCM_16", "float32")
_LOSSY_SUBTYPES = ("VORBIS", "OPUS", "MPEG_LAYER_I", "MPEG_LAYER_II", "MPEG_LAYER_III")


def image_as_png(found: MediaFormat, data: bytes) -> bytes:
    """Encode an upright image as PNG, of an animation the first frame; raises `DataError` if it is broken."""
    if "AVIF" in found.name and not features.check("avif"):
        raise DataError(
            f"it is {found.name}, which the installed Pillow cannot read; upgrade pillow"
        )
    buffer = io.BytesIO()
    with image_errors():
        image = Image.open(io.BytesIO(data), formats=_IMAGE_FORMATS)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        image.save(buffer, "PNG")
    return buffer.getvalue()


def is_lossy(file: soundfile.SoundFile) -> bool:
    """Whether the samples of a file come from a lossy decoder."""
    return file.subtype in _LOSSY_SUBTYPES


def exact_type(file: soundfile.SoundFile) -> tuple[str, str, _SampleType]:
    """Format and subtype that keep the samples of a file, and the type to read them as."""
    return _LOSSY if is_lossy(file) else _EXACT.get(file.subtype, _SIXTEEN_BITS)


def encode_audio(samples: np.ndarray, rate_hz: int, kind: str, subtype: str) -> tuple[str, bytes]:
    """Extension and bytes of an audio file; equal samples have equal bytes."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate_hz, subtype, format=kind)
    data = buffer.getvalue()
    return kind.lower(), _clear_time_stamp(data) if kind == "WAV" else data


def _clear_time_stamp(data: bytes) -> bytes:
    """Clear the time stamp in the PEAK chunk of a WAV, so that equal segments have equal bytes."""
    # The chunk precedes the samples: name, size, and version of 4 bytes each, then the time stamp.
    start = data.find(b"PEAK", 0, data.find(b"data"))
    return data if start < 0 else data[: start + 12] + bytes(4) + data[start + 16 :]


def convert_foreign_audio(found: MediaFormat, data: bytes) -> tuple[str, bytes]:
    """Extension and bytes of an audio clip that training reads; raises `DataError` if it cannot be decoded."""
    if found.demuxer:
        return _by_ffmpeg(found, data)
    num_declared = _declared_bytes(data)
    if num_declared > len(data):
        raise DataError(f"broken audio clip (has {len(data)} of {num_declared} bytes)")
    read_audio(data)
    with AudioFile(io.BytesIO(data)) as file:
        kind, subtype, dtype = exact_type(file)
        samples = file.read(file.frames, dtype=dtype, always_2d=True)
        return encode_audio(samples, file.samplerate, kind, subtype)


def _declared_bytes(data: bytes) -> int:
    """The size of an AIFF, AU, W64, CAF, or SPHERE file by its header; 0 if unknown. libsndfile ignores it."""
    if data[:4] == b"FORM":
        size = int.from_bytes(data[4:8], "big")
        return size + 8 if size < 0x7FFF0000 else 0
    if data[:4] == b".snd":
        size = int.from_bytes(data[8:12], "big")
        return size + int.from_bytes(data[4:8], "big") if size < 0x7FFF0000 else 0
    if data[:4] == b"riff":
        size = int.from_bytes(data[16:24], "little")
        return size if size < 1 << 62 else 0
    if data[:4] == b"caff":
        position = 8
        while position + 12 <= len(data):
            size = int.from_bytes(data[position + 4 : position + 12], "big")
            position += 12 + (size if size < 1 << 62 else 0)
        return position
    fields = dict(line.split(b" -i ", 1) for line in data[:1024].splitlines() if b" -i " in line)
    size = 1
    for name in (b"sample_count", b"channel_count", b"sample_n_bytes"):
        value = fields.get(name, b"1" if name == b"sample_n_bytes" else b"").strip()
        size *= int(value) if value.isdigit() else 0
    header = data[8:16].strip()
    return size + int(header) if size and header.isdigit() else 0


def _by_ffmpeg(found: MediaFormat, data: bytes) -> tuple[str, bytes]:
    program = shutil.which("ffmpeg")
    if program is None:
        raise DataError(
            f"it is {found.name}, which needs ffmpeg; install ffmpeg, or convert it to FLAC, WAV, Ogg, or MP3"
        )
    with tempfile.TemporaryDirectory(prefix="muomni-") as folder:
        source, target = Path(folder, "source"), Path(folder, "target.wav")
        source.write_bytes(data)
        # Only this container may be opened, and no other file or address that it refers to.
        limits = (
            "-nostdin",
            "-v",
            "error",
            "-xerror",
            "-protocol_whitelist",
            "file",
            "-threads",
            "1",
        )
        reading = ("-f", found.demuxer, "-i", f"file:{source}", "-map", "0:a:0")
        writing = ("-c:a", "pcm_f32le", "-bitexact", "-fs", str(8 * MAX_VALUES), "-f", "wav")
        try:
            done = subprocess.run(
                [program, *limits, *reading, *writing, f"file:{target}"],
                capture_output=True,
                timeout=_FFMPEG_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired as error:
            raise DataError(
                f"it is {found.name}; ffmpeg took more than {_FFMPEG_TIMEOUT_S} s"
            ) from error
        if done.returncode or not target.is_file():
            lines = done.stderr.decode(errors="replace").replace(str(source), "it").splitlines()
            reason = lines[-1][:200] if lines else f"exit code {done.returncode}"
            raise DataError(f"it is {found.name} that ffmpeg cannot decode ({reason})")
        samples, rate_hz = read_audio(target.read_bytes())
    # Lossless codecs return integers.
    for bits in (16, 24):
        scaled = samples * np.float32(1 << bits - 1)
        if np.array_equal(scaled, np.rint(scaled)):
            return encode_audio(samples, rate_hz, "FLAC", f"PCM_{bits}")
    return encode_audio(samples, rate_hz, "FLAC", "PCM_16")
