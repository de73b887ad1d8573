"""Read the bytes of an image or audio clip: from a file, a tar, a Parquet cell, or a JSON record, or a segment
of an audio file.

All but segments are copied unchanged if training reads their format, and converted otherwise (`foreign`).
Segments are decoded and encoded losslessly as FLAC, or as WAV if FLAC cannot represent the samples.
"""

import io
import os
import stat
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile

from data_prep.corpus import (
    BAD_RECORD,
    BROKEN_AUDIO,
    BROKEN_IMAGE,
    MISSING_MEDIA,
    BadSampleError,
    Blob,
    Cell,
    Clip,
    Media,
    Member,
)
from data_prep.media.blob import read_blob
from data_prep.media.foreign import (
    convert_foreign_audio,
    encode_audio,
    exact_type,
    image_as_png,
    is_lossy,
)
from data_prep.media.located import located
from data_prep.media.tar_files import read_member
from muomni.data.media.decode import MAX_VALUES, read_audio
from muomni.data.media.formats import FLAC, MP3, Kind, detect_format
from muomni.data.media.streams import audio_streams, with_flac_samples
from muomni.errors import DataError

if TYPE_CHECKING:
    import pyarrow

# Neighboring rows are read in sequence; two row groups cover the border between them.
_NUM_KEPT_ROW_GROUPS = 2
# Annotations round the ends of segments, so these may lie outside of the file.
_MAX_BEFORE_START_S = 0.05
_MAX_BEYOND_END_S = 0.1
_MAX_ROUNDING_S = 0.001
# An MP3 frame needs bits of preceding frames: up to 0.5 s after a seek are decoded incorrectly.
_LEAD_IN_S = 2
# Enough to detect a format; tags may be longer.
_HEAD_BYTES = 1 << 12
# Segments of a file are read in sequence.
_NUM_KEPT_FILES = 1
_SUPPORTED: dict[Kind, str] = {
    "image": "supported are PNG, JPEG, WebP, GIF, BMP, and AVIF",
    "audio": "supported are FLAC, WAV, Ogg, MP3, and others listed in docs/media.md",
}
_BROKEN: dict[Kind, str] = {"image": BROKEN_IMAGE, "audio": BROKEN_AUDIO}


def read_media(media: Media, kind: Kind) -> tuple[str, bytes]:
    """Extension and bytes of an image or audio clip, as training reads it. The content decides, not the name.

    Raises `BadSampleError` if it is missing, is in a format that cannot be converted, or if a segment exceeds
    its file.
    """
    if isinstance(media, Clip):
        return _cut_segment(replace(media, path=located(media.path)))
    if isinstance(media, Member):
        return _readable(media, kind, read_member(media))
    if isinstance(media, Blob):
        return _readable(media, kind, read_blob(media))
    if isinstance(media, Cell):
        data = read_cell(media)
        if data is not None:
            return _readable(media, kind, data)
        if not media.file:
            raise BadSampleError(MISSING_MEDIA, f"{media} is empty")
        media = media.file
    media = located(media)
    return _readable(media, kind, _read_file(media))


def _readable(media: Media, kind: Kind, data: bytes) -> tuple[str, bytes]:
    """Extension and bytes, converted if training does not read the format."""
    found = detect_format(data)
    if found is not None and found.kind == kind:
        if found.handling == "kept":
            return found.suffix, data
        try:
            if found.handling == "converted" and kind == "image":
                return "png", image_as_png(found, data)
            if found.handling != "refused":
                return convert_foreign_audio(found, data)
        except (DataError, soundfile.SoundFileError, ValueError, OSError) as error:
            raise BadSampleError(_BROKEN[kind], f"{media}: {str(error).strip()}") from error
    what = found.name if found else "not a known image or audio file" if data else "empty"
    remedy = _SUPPORTED[kind] if found and found.kind == kind else f"{kind} file expected"
    raise BadSampleError(_BROKEN[kind], f"{media} is {what}; {remedy}")


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


@dataclass(frozen=True, slots=True)
class _AudioSource:
    """A path or bytes that libsndfile opens and can seek in, samples to skip, and their number.

    `extension` is empty if the file cannot be copied; `num_samples` is None if libsndfile knows it.
    """

    opened: str | bytes
    extension: str
    num_skipped: int = 0
    num_samples: int | None = None


def _audio_source(file: str | Member) -> _AudioSource:
    if isinstance(file, Member):
        opened: str | bytes = read_member(file)
        head = opened[:_HEAD_BYTES]
    else:
        opened = file
        with open(file, "rb") as raw:
            head = raw.read(_HEAD_BYTES)
    found = detect_format(head)
    if found is not None and (found is MP3 or found.demuxer):
        return _decodable(file)
    if found is FLAC and with_flac_samples(head, 0) == head:
        return _decodable(file)
    return _AudioSource(opened, found.suffix if found else "")


@lru_cache(maxsize=_NUM_KEPT_FILES)
def _decodable(file: str | Member) -> _AudioSource:
    """Bytes of a file whose length its header does not tell, or that only ffmpeg decodes."""
    data = _whole(file)
    found = detect_format(data)
    if found is not None and found.demuxer:
        return _AudioSource(_readable(file, "audio", data)[1], "")
    if found is FLAC:
        num_samples = len(read_audio(data)[0])
        return _AudioSource(with_flac_samples(data, num_samples), "flac")
    stream = audio_streams(data)[0]
    return _AudioSource(stream.data, "mp3", stream.num_skipped, stream.num_counted or None)


def _whole(file: str | Member) -> bytes:
    return read_member(file) if isinstance(file, Member) else _read_file(file)


def _cut_segment(clip: Clip) -> tuple[str, bytes]:
    """Cut a segment; one that covers a whole file in a format that training reads is copied."""
    if -_MAX_BEFORE_START_S <= clip.start_s < 0:
        clip = replace(clip, start_s=0.0, duration_s=clip.duration_s + clip.start_s)
    if clip.start_s < 0 or clip.duration_s <= 0:
        raise BadSampleError(BAD_RECORD, f"{clip} is not a valid segment")
    whole = clip.member or clip.path
    try:
        source = _audio_source(whole)
        opened = source.opened
        with (
            open(opened, "rb") if isinstance(opened, str) else io.BytesIO(opened) as raw,
            soundfile.SoundFile(raw) as file,
        ):
            if clip.channel is not None and not 0 <= clip.channel < file.channels:
                raise BadSampleError(BAD_RECORD, f"{whole} has no channel {clip.channel}")
            num_samples = source.num_samples or file.frames - source.num_skipped
            rest_s = num_samples / file.samplerate - clip.start_s
            if clip.duration_s > rest_s + _MAX_BEYOND_END_S:
                raise BadSampleError(BROKEN_AUDIO, f"{clip} exceeds the end of the audio file")
            is_all = clip.start_s == 0 and clip.duration_s > rest_s - _MAX_ROUNDING_S
            if is_all and source.extension and (clip.channel is None or file.channels == 1):
                return source.extension, _whole(whole)
            return _encode_segment(clip, file, source.num_skipped)
    except (DataError, soundfile.SoundFileError, ValueError) as error:
        raise BadSampleError(BROKEN_AUDIO, f"{clip}: {str(error).strip()}") from error
    except OSError as error:
        raise BadSampleError(MISSING_MEDIA, f"cannot read {clip.path}: {error.strerror}") from error


def _encode_segment(clip: Clip, file: soundfile.SoundFile, num_skipped: int) -> tuple[str, bytes]:
    start = round(clip.start_s * file.samplerate)
    num_samples = round((clip.start_s + clip.duration_s) * file.samplerate) - start
    start += num_skipped
    kind, subtype, dtype = exact_type(file)
    lead_in = min(start, _LEAD_IN_S * file.samplerate) if is_lossy(file) else 0
    if num_samples * file.channels > MAX_VALUES:
        raise BadSampleError(BAD_RECORD, f"{clip} exceeds the maximum length of an audio clip")
    file.seek(start - lead_in)
    samples: np.ndarray = file.read(lead_in + num_samples, dtype=dtype, always_2d=True)[lead_in:]
    if len(samples) < num_samples - _MAX_BEYOND_END_S * file.samplerate:
        raise BadSampleError(BROKEN_AUDIO, f"{clip} has {len(samples)} of {num_samples} samples")
    if clip.channel is not None:
        samples = samples[:, clip.channel]
    return encode_audio(samples, file.samplerate, kind, subtype)
