"""Read the bytes of an image or audio clip from a file, a Parquet cell, a JSON record, or a segment of an
audio file.

All but segments are copied unchanged. Segments are decoded and encoded losslessly as FLAC, or as WAV if
FLAC cannot represent the samples.
"""

import io
import os
import stat
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import soundfile

from data_prep.corpus import (
    BAD_RECORD,
    BROKEN_AUDIO,
    MISSING_MEDIA,
    BadSampleError,
    Blob,
    Cell,
    Clip,
    Media,
    Member,
)
from data_prep.media.blob import read_blob
from data_prep.media.located import located
from data_prep.media.tar_files import open_audio, read_member
from muomni.data.media.decode import MAX_VALUES

if TYPE_CHECKING:
    import pyarrow

_SAME_FORMAT = {"jpeg": "jpg", "opus": "ogg", "oga": "ogg"}
# Neighboring rows are read in sequence; two row groups cover the border between them.
_NUM_KEPT_ROW_GROUPS = 2
# Annotations round the ends of segments, so these may lie outside of the file.
_MAX_BEFORE_START_S = 0.05
_MAX_BEYOND_END_S = 0.1
_MAX_ROUNDING_S = 0.001
# Subtype of an audio file: format and subtype of its segments, and the sample type that preserves them.
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
# Lossy decoders return floats that may exceed [-1, 1]; soundfile clips them when it writes 16 bits.
_LOSSY: tuple[str, str, _SampleType] = ("FLAC", "PCM_16", "float32")
# An MP3 frame needs bits of preceding frames: up to 0.5 s after a seek are decoded incorrectly.
_LEAD_IN_S = 2
_LOSSY_SUBTYPES = ("VORBIS", "OPUS", "MPEG_LAYER_I", "MPEG_LAYER_II", "MPEG_LAYER_III")


def read_media(media: Media, known: tuple[str, ...], broken: str) -> tuple[str, bytes]:
    """Extension and bytes of an image or audio clip.

    Raises `BadSampleError` if it is missing or a segment exceeds its file, and with the reason `broken` if
    its format is not in `known`.
    """
    if isinstance(media, Clip):
        return _cut_segment(replace(media, path=located(media.path)), known)
    if isinstance(media, Member):
        suffix = os.path.splitext(media.name)[1].lower().lstrip(".")
        return _checked(media, suffix, known, broken), read_member(media)
    if isinstance(media, Blob):
        data = read_blob(media)
        return _checked(media, detect_format(data), known, broken), data
    if isinstance(media, Cell):
        data = read_cell(media)
        if data is not None:
            return _checked(media, detect_format(data), known, broken), data
        if not media.file:
            raise BadSampleError(MISSING_MEDIA, f"{media} is empty")
        media = media.file
    media = located(media)
    extension = os.path.splitext(media)[1].lower().lstrip(".")
    return _checked(media, extension, known, broken), _read_file(media)


def _checked(media: Media, extension: str, known: tuple[str, ...], broken: str) -> str:
    extension = _SAME_FORMAT.get(extension, extension)
    if extension not in known:
        raise BadSampleError(broken, f"{media} is not one of {', '.join(known)}")
    return extension


def _read_file(path: str) -> bytes:
    """All bytes of a regular file; reading a pipe or some devices would never end."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadSampleError(MISSING_MEDIA, f"cannot read {path!r}: {reason}") from error
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise BadSampleError(MISSING_MEDIA, f"{path} is not a regular file")
        with open(descriptor, "rb", buffering=0, closefd=False) as file:
            return file.read()
    except OSError as error:
        raise BadSampleError(MISSING_MEDIA, f"cannot read {path}: {error.strerror}") from error
    finally:
        os.close(descriptor)


def detect_format(data: bytes) -> str:
    """The extension that the first bytes imply; empty for unknown formats."""
    if data[:4] == b"RIFF":
        return {b"WAVE": "wav", b"WEBP": "webp"}.get(data[8:12], "")
    # MPEG frames start with eleven set bits.
    if data[:1] == b"\xff" and data[1:2] >= b"\xe0":
        return "mp3"
    starts = {b"\x89PNG": "png", b"\xff\xd8": "jpg", b"fLaC": "flac", b"OggS": "ogg", b"ID3": "mp3"}
    return next((name for start, name in starts.items() if data.startswith(start)), "")


def read_cell(cell: Cell) -> bytes | None:
    """The bytes of a binary or text cell, or None if it is empty.

    Raises `BadSampleError` if the file or row no longer exists.
    """
    import pyarrow

    try:
        value = _read_column(cell.path, cell.row_group, cell.column)[cell.row].as_py()
        # Only the leaf column is read, so each struct has one field.
        for position in cell.index:
            value = _leaf(value)[position]
        value = _leaf(value)
    except (OSError, pyarrow.ArrowException, IndexError, TypeError) as error:
        raise BadSampleError(MISSING_MEDIA, f"cannot read {cell}: {error}") from error
    return value if value is None or isinstance(value, bytes) else str(value).encode()


def _leaf(value: Any) -> Any:
    """The value inside of structs of one field."""
    while isinstance(value, dict):
        (value,) = value.values()
    return value


@lru_cache(maxsize=_NUM_KEPT_ROW_GROUPS)
def _read_column(path: str, row_group: int, column: str) -> "pyarrow.ChunkedArray":
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        values = file.read_row_group(row_group, columns=[column]).column(0)
    # A field of structs is read alone, so each struct has one field.
    while pyarrow.types.is_struct(values.type):
        values = values.flatten()[0]
    return values


def _cut_segment(clip: Clip, known: tuple[str, ...]) -> tuple[str, bytes]:
    """Cut a segment; one that covers a whole file in a known format is copied."""
    if -_MAX_BEFORE_START_S <= clip.start_s < 0:
        clip = replace(clip, start_s=0.0, duration_s=clip.duration_s + clip.start_s)
    if clip.start_s < 0 or clip.duration_s <= 0:
        raise BadSampleError(BAD_RECORD, f"{clip} is not a valid segment")
    extension = Path(clip.file_name).suffix.lower().lstrip(".")
    extension = _SAME_FORMAT.get(extension, extension)
    try:
        with open_audio(clip) as raw, soundfile.SoundFile(raw) as file:
            if clip.channel is not None and not 0 <= clip.channel < file.channels:
                raise BadSampleError(
                    BAD_RECORD, f"{clip.member or clip.path} has no channel {clip.channel}"
                )
            rest_s = file.frames / file.samplerate - clip.start_s
            if clip.duration_s > rest_s + _MAX_BEYOND_END_S:
                raise BadSampleError(BROKEN_AUDIO, f"{clip} exceeds the end of the audio file")
            is_all = clip.start_s == 0 and clip.duration_s > rest_s - _MAX_ROUNDING_S
            if is_all and extension in known and (clip.channel is None or file.channels == 1):
                raw.seek(0)
                return extension, raw.read()
            return _encode_segment(clip, file)
    except (soundfile.SoundFileError, ValueError) as error:
        raise BadSampleError(BROKEN_AUDIO, f"{clip}: {str(error).strip()}") from error
    except OSError as error:
        raise BadSampleError(MISSING_MEDIA, f"cannot read {clip.path}: {error.strerror}") from error


def _encode_segment(clip: Clip, file: soundfile.SoundFile) -> tuple[str, bytes]:
    start = round(clip.start_s * file.samplerate)
    num_samples = round((clip.start_s + clip.duration_s) * file.samplerate) - start
    if file.subtype in _LOSSY_SUBTYPES:
        kind, subtype, dtype = _LOSSY
        lead_in = min(start, _LEAD_IN_S * file.samplerate)
    else:
        kind, subtype, dtype = _EXACT.get(file.subtype, _SIXTEEN_BITS)
        lead_in = 0
    if num_samples * file.channels > MAX_VALUES:
        raise BadSampleError(BAD_RECORD, f"{clip} exceeds the maximum length of an audio clip")
    file.seek(start - lead_in)
    samples: np.ndarray = file.read(lead_in + num_samples, dtype=dtype, always_2d=True)[lead_in:]
    if len(samples) < num_samples - _MAX_BEYOND_END_S * file.samplerate:
        raise BadSampleError(BROKEN_AUDIO, f"{clip} has {len(samples)} of {num_samples} samples")
    if clip.channel is not None:
        samples = samples[:, clip.channel]
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, file.samplerate, subtype, format=kind)
    return kind.lower(), _clear_time_stamp(
        buffer.getvalue()
    ) if kind == "WAV" else buffer.getvalue()


def _clear_time_stamp(data: bytes) -> bytes:
    """Clear the time stamp in the PEAK chunk of a WAV, so that equal segments have equal bytes."""
    # The chunk precedes the samples: name, size, and version of 4 bytes each, then the time stamp.
    start = data.find(b"PEAK", 0, data.find(b"data"))
    return data if start < 0 else data[: start + 12] + bytes(4) + data[start + 16 :]
