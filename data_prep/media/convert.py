"""Bytes of an image or audio clip: a file, a cell of a Parquet file, a part of an audio clip.

Files and cells are taken as they are. A part of an audio clip is decoded and written again without
loss: FLAC, or WAV for samples that FLAC cannot hold.
"""

import io
import os
import stat
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import soundfile

from data_prep.corpus import (
    BAD_RECORD,
    BROKEN_AUDIO,
    MISSING_MEDIA,
    BadSampleError,
    Cell,
    Clip,
    Media,
)
from muomni.data.media.decode import MAX_VALUES

if TYPE_CHECKING:
    import pyarrow

_SAME_FORMAT = {"jpeg": "jpg", "opus": "ogg", "oga": "ogg"}
# Neighboring rows are asked for one after the other; two groups serve a border between them.
_NUM_KEPT_ROW_GROUPS = 2
# Annotations round the ends of segments.
_MAX_BEYOND_END_S = 0.1
_MAX_ROUNDING_S = 0.001
# Subtype in an audio clip: format and subtype of its parts, and the samples that carry them over.
_SampleType = Literal["int16", "int32", "float32", "float64"]
_EXACT: dict[str, tuple[str, str, _SampleType]] = {
    "PCM_S8": ("FLAC", "PCM_S8", "int16"),
    "PCM_U8": ("FLAC", "PCM_S8", "int16"),
    "PCM_24": ("FLAC", "PCM_24", "int32"),
    "PCM_32": ("WAV", "PCM_32", "int32"),
    "FLOAT": ("WAV", "FLOAT", "float32"),
    "DOUBLE": ("WAV", "DOUBLE", "float64"),
}
_SIXTEEN_BITS: tuple[str, str, _SampleType] = ("FLAC", "PCM_16", "int16")
# Lossy decoders give floats that may leave [-1, 1]; soundfile clips them when it writes 16 bits.
_LOSSY: tuple[str, str, _SampleType] = ("FLAC", "PCM_16", "float32")
# A frame of MP3 needs bits of the frames before it: right after a seek up to 0.5 s come out wrong.
_LEAD_IN_S = 2
_LOSSY_SUBTYPES = ("VORBIS", "OPUS", "MPEG_LAYER_I", "MPEG_LAYER_II", "MPEG_LAYER_III")


def read_media(media: Media, known: tuple[str, ...], broken: str) -> tuple[str, bytes]:
    """Extension and bytes of an image or audio clip.

    Raises `BadSampleError` when it is missing, when a part lies outside of its audio clip, and with
    the reason `broken` when its format is none of `known`.
    """
    if isinstance(media, Clip):
        return _cut(media, known)
    if isinstance(media, Cell):
        data = read_cell(media)
        if data is not None:
            return _checked(media, _format_of(data), known, broken), data
        if not media.file:
            raise BadSampleError(MISSING_MEDIA, f"{media} is empty")
        media = media.file
    extension = os.path.splitext(media)[1].lower().lstrip(".")
    return _checked(media, extension, known, broken), _read_file(media)


def _checked(media: Media, extension: str, known: tuple[str, ...], broken: str) -> str:
    extension = _SAME_FORMAT.get(extension, extension)
    if extension not in known:
        raise BadSampleError(broken, f"{media} is none of {', '.join(known)}")
    return extension


def _read_file(path: str) -> bytes:
    """All bytes of a regular file: a pipe would never end, nor would some devices."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadSampleError(MISSING_MEDIA, f"cannot read {path!r}: {reason}") from error
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise BadSampleError(MISSING_MEDIA, f"{path} is no regular file")
        with open(descriptor, "rb", buffering=0, closefd=False) as file:
            return file.read()
    except OSError as error:
        raise BadSampleError(MISSING_MEDIA, f"cannot read {path}: {error.strerror}") from error
    finally:
        os.close(descriptor)


def _format_of(data: bytes) -> str:
    """The extension that the first bytes tell; empty for an unknown format."""
    if data[:4] == b"RIFF":
        return {b"WAVE": "wav", b"WEBP": "webp"}.get(data[8:12], "")
    # An MPEG frame starts with eleven set bits.
    if data[:1] == b"\xff" and data[1:2] >= b"\xe0":
        return "mp3"
    starts = {
        b"\x89PNG": "png",
        b"\xff\xd8": "jpg",
        b"fLaC": "flac",
        b"OggS": "ogg",
        b"ID3": "mp3",
    }
    return next((name for start, name in starts.items() if data.startswith(start)), "")


def read_cell(cell: Cell) -> bytes | None:
    """The bytes of a binary or text cell, None for an empty one.

    Raises `BadSampleError` when the file or the row is not there any more.
    """
    import pyarrow

    try:
        value = _read_column(cell.path, cell.row_group, cell.column)[cell.row].as_py()
    except (OSError, pyarrow.ArrowException, IndexError) as error:
        raise BadSampleError(MISSING_MEDIA, f"cannot read {cell}: {error}") from error
    return value if value is None or isinstance(value, bytes) else str(value).encode()


@lru_cache(maxsize=_NUM_KEPT_ROW_GROUPS)
def _read_column(path: str, row_group: int, column: str) -> "pyarrow.ChunkedArray":
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        return file.read_row_group(row_group, columns=[column]).flatten().column(0)


def _cut(clip: Clip, known: tuple[str, ...]) -> tuple[str, bytes]:
    """A part of an audio clip; one that is the whole of a file in a known format stays as it is."""
    if clip.start_s < 0 or clip.duration_s <= 0:
        raise BadSampleError(BAD_RECORD, f"{clip} is no part of an audio clip")
    extension = Path(clip.path).suffix.lower().lstrip(".")
    extension = _SAME_FORMAT.get(extension, extension)
    try:
        with open(clip.path, "rb") as raw, soundfile.SoundFile(raw) as file:
            if clip.channel is not None and not 0 <= clip.channel < file.channels:
                raise BadSampleError(BAD_RECORD, f"{clip.path} has no channel {clip.channel}")
            rest_s = file.frames / file.samplerate - clip.start_s
            if clip.duration_s > rest_s + _MAX_BEYOND_END_S:
                raise BadSampleError(BROKEN_AUDIO, f"{clip} lies beyond the end of the audio clip")
            is_all = clip.start_s == 0 and clip.duration_s > rest_s - _MAX_ROUNDING_S
            if is_all and extension in known and (clip.channel is None or file.channels == 1):
                return extension, _read_file(clip.path)
            return _encode_part(clip, file)
    except (soundfile.SoundFileError, ValueError) as error:
        raise BadSampleError(BROKEN_AUDIO, f"{clip}: {str(error).strip()}") from error
    except OSError as error:
        raise BadSampleError(MISSING_MEDIA, f"cannot read {clip.path}: {error.strerror}") from error


def _encode_part(clip: Clip, file: soundfile.SoundFile) -> tuple[str, bytes]:
    start = round(clip.start_s * file.samplerate)
    num_samples = round((clip.start_s + clip.duration_s) * file.samplerate) - start
    if file.subtype in _LOSSY_SUBTYPES:
        kind, subtype, dtype = _LOSSY
        lead_in = min(start, _LEAD_IN_S * file.samplerate)
    else:
        kind, subtype, dtype = _EXACT.get(file.subtype, _SIXTEEN_BITS)
        lead_in = 0
    if num_samples * file.channels > MAX_VALUES:
        raise BadSampleError(BAD_RECORD, f"{clip} is longer than any audio clip may be")
    file.seek(start - lead_in)
    samples: np.ndarray = file.read(lead_in + num_samples, dtype=dtype, always_2d=True)[lead_in:]
    if len(samples) < num_samples - _MAX_BEYOND_END_S * file.samplerate:
        raise BadSampleError(BROKEN_AUDIO, f"{clip} holds {len(samples)} of {num_samples} samples")
    if clip.channel is not None:
        samples = samples[:, clip.channel]
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, file.samplerate, subtype, format=kind)
    return kind.lower(), _without_time(buffer.getvalue()) if kind == "WAV" else buffer.getvalue()


def _without_time(data: bytes) -> bytes:
    """A WAV whose PEAK chunk has no time of writing: equal parts must give equal bytes."""
    # The chunk stands before the samples: name, size and version of 4 bytes each, then the time.
    place = data.find(b"PEAK", 0, data.find(b"data"))
    return data if place < 0 else data[: place + 12] + bytes(4) + data[place + 16 :]
