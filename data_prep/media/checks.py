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
from PIL import Image

from data_prep.corpus import BROKEN_AUDIO, BROKEN_IMAGE, BadSampleError, Media
from data_prep.media.convert import detect_format, read_media
from data_prep.media.preprocessing import convert_audio, convert_image
from data_prep.options import Preprocessing
from muomni.data.media.decode import (
    AUDIO_EXTENSIONS,
    IMAGE_EXTENSIONS,
    IMAGE_FORMATS,
    AudioFacts,
    broken_audio,
    image_errors,
    image_size,
    read_audio,
)
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
    """An audio clip as stored in a shard, with the sample rate of its original file."""

    extension: str
    data: bytes
    facts: AudioFacts
    original_rate_hz: int


@lru_cache(maxsize=_CACHE_SIZE)
def checked_image(media: Media, preprocessing: Preprocessing) -> CheckedImage:
    """Read, check, and convert an image."""
    extension, data = read_media(media, IMAGE_EXTENSIONS, BROKEN_IMAGE)
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
    if preprocessing.check == "header" and preprocessing.sample_rate_hz is None:
        extension, data = read_media(media, AUDIO_EXTENSIONS, BROKEN_AUDIO)
        facts = _header_facts(media, data)
        return CheckedAudio(extension, data, facts, facts.sample_rate_hz)
    return decoded_audio(media, preprocessing)[0]


def decoded_audio(media: Media, preprocessing: Preprocessing) -> tuple[CheckedAudio, np.ndarray]:
    """An audio clip and the samples [num_samples, num_channels] of its original file."""
    extension, data = read_media(media, AUDIO_EXTENSIONS, BROKEN_AUDIO)
    try:
        samples, original_rate_hz = read_audio(data)
        extension, data, converted, rate_hz = convert_audio(
            preprocessing, extension, data, samples, original_rate_hz
        )
    except (DataError, soundfile.SoundFileError, ValueError) as error:
        raise BadSampleError(BROKEN_AUDIO, f"{media}: {error}") from error
    facts = AudioFacts.of(converted, rate_hz)
    return CheckedAudio(extension, data, facts, original_rate_hz), samples


def header_size(data: bytes) -> tuple[int, int]:
    """Width and height of an image from its header; raises `DataError` for a broken header."""
    # imagesize also reads formats that training cannot decode, and returns (-1, -1) on failure.
    if detect_format(data) in IMAGE_EXTENSIONS:
        width, height = imagesize.get(io.BytesIO(data), exif_rotation=False)
        if width > 0 and 0 < height <= _MAX_TRUSTED_PIXELS // width:
            return width, height
    with image_errors():
        return Image.open(io.BytesIO(data), formats=IMAGE_FORMATS).size


def _header_facts(media: Media, data: bytes) -> AudioFacts:
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if not 0 < file.frames < 2**40:
                raise DataError("its header does not give its length")
            duration_ms = max(1, round(file.frames * 1000 / file.samplerate))
            return AudioFacts(duration_ms, file.samplerate, file.channels)
    except (soundfile.SoundFileError, ValueError, OSError) as error:
        raise BadSampleError(BROKEN_AUDIO, f"{media}: {broken_audio(error)}") from error
    except DataError as error:
        raise BadSampleError(BROKEN_AUDIO, f"{media}: {error}") from error
