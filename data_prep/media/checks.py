"""Read, check, and convert the images and audio clips of items.

With check=decode each file is fully decoded once, so every medium in a shard is usable in training.
Functions raise `BadSampleError` for media that fail the check.
"""

import io
from dataclasses import dataclass
from functools import lru_cache

import imagesize
import numpy as np
import soundfile

from data_prep.corpus import BROKEN_AUDIO, BROKEN_IMAGE, BadSampleError, Media
from data_prep.media.convert import read_media
from data_prep.media.preprocessing import convert_audio, convert_image
from data_prep.options import Preprocessing
from muomni.data.media.decode import (
    AudioFacts,
    declared_length,
    identify_image,
    image_errors,
    image_size,
    read_audio,
)
from muomni.data.media.formats import FLAC, MP3, detect_format
from muomni.data.media.streams import joined_streams, with_flac_samples
from muomni.errors import DataError

# Conversations may share media; the most recent ones are not decoded again.
_CACHE_SIZE = 32
# Larger images go through Pillow's check for decompression bombs.
_MAX_TRUSTED_PIXELS = 1 << 25


@dataclass(frozen=True, slots=True)
class CheckedImage:
    """An image as stored in a shard; sizes are (width, height) in pixels."""

    extension: str
    data: bytes
    size: tuple[int, int]
    original_size: tuple[int, int]

    @property
    def num_pixels(self) -> int:
        return self.size[0] * self.size[1]


@dataclass(frozen=True, slots=True)
class CheckedAudio:
    """An audio clip as stored in a shard, with the sample rate and duration of its original file."""

    extension: str
    data: bytes
    facts: AudioFacts
    original_rate_hz: int
    original_ms: int


@lru_cache(maxsize=_CACHE_SIZE)
def checked_image(media: Media, preprocessing: Preprocessing) -> CheckedImage:
    """Read, check, and convert an image."""
    extension, data = read_media(media, "image")
    try:
        if preprocessing.changes_images:
            return CheckedImage(*convert_image(preprocessing, extension, data))
        size = image_size(data) if preprocessing.check == "decode" else header_size(data)
        return CheckedImage(extension, data, size, size)
    except DataError as error:
        raise BadSampleError(BROKEN_IMAGE, f"{media}: {error}") from error


@lru_cache(maxsize=_CACHE_SIZE)
def checked_audio(media: Media, preprocessing: Preprocessing) -> CheckedAudio:
    """Read, check, and convert an audio clip; its samples are discarded to save memory."""
    if preprocessing.check == "header" and not preprocessing.changes_audio:
        extension, data = read_media(media, "audio")
        try:
            facts = _header_facts(data)
        except DataError as error:
            raise BadSampleError(BROKEN_AUDIO, f"{media}: {error}") from error
        return CheckedAudio(extension, data, facts, facts.sample_rate_hz, facts.duration_ms)
    return decoded_audio(media, preprocessing)[0]


def decoded_audio(media: Media, preprocessing: Preprocessing) -> tuple[CheckedAudio, np.ndarray]:
    """An audio clip and the samples [num_samples, num_channels] of its original file."""
    extension, data = read_media(media, "audio")
    try:
        samples, original_rate_hz = read_audio(data)
        data = with_right_length(data, len(samples))
        extension, data, converted, rate_hz = convert_audio(
            preprocessing, extension, data, samples, original_rate_hz
        )
    except (DataError, soundfile.SoundFileError, ValueError) as error:
        raise BadSampleError(BROKEN_AUDIO, f"{media}: {error}") from error
    facts = AudioFacts.of(converted, rate_hz)
    original_ms = AudioFacts.of(samples, original_rate_hz).duration_ms
    return CheckedAudio(extension, data, facts, original_rate_hz, original_ms), samples


def with_right_length(data: bytes, num_samples: int) -> bytes:
    """A FLAC file whose header declares the decoded length, since other tools rely on it; other files as is."""
    if detect_format(data) is not FLAC:
        return data
    corrected = with_flac_samples(data, num_samples)
    return corrected if corrected == data or len(joined_streams(data)) == 1 else data


def header_size(data: bytes) -> tuple[int, int]:
    """Width and height of an image from its header; raises `DataError` for a broken header."""
    # imagesize also reads formats that training cannot decode, and returns (-1, -1) on failure.
    found = detect_format(data)
    if found and found.kind == "image" and found.handling == "kept":
        width, height = imagesize.get(io.BytesIO(data), exif_rotation=False)
        if width > 0 and 0 < height <= _MAX_TRUSTED_PIXELS // width:
            return width, height
    with image_errors():
        return identify_image(data).size


def _header_facts(data: bytes) -> AudioFacts:
    """Facts by the header; a clip whose length its header does not tell is decoded.

    So is every MP3: its header counts frames that a truncated file no longer has.
    """
    declared = None if detect_format(data) is MP3 else declared_length(data)
    if declared is None:
        return AudioFacts.of(*read_audio(data))
    num_samples, rate_hz, num_channels = declared
    return AudioFacts(max(1, round(num_samples * 1000 / rate_hz)), rate_hz, num_channels)
