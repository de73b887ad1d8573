"""Images and audio clips of items: read, checked, and changed where the treatment asks for it.

With the check `decode` each file is decoded once in full, so what reaches a shard can be trained on.
Raises `BadSampleError` otherwise.
"""

import io
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import soundfile
from PIL import Image

from data_prep.corpus import BROKEN_AUDIO, BROKEN_IMAGE, BadSampleError, Media
from data_prep.media.convert import read_media
from data_prep.media.image_header import size_in_header
from data_prep.media.treatment import Treatment, treat_audio, treat_image
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

# An image or question may serve many conversations; the last ones are not decoded again.
_NUM_KEPT = 32
_PLAIN_PIXELS = 1 << 25


@dataclass(frozen=True, slots=True)
class CheckedImage:
    """An image as it goes into a shard; `size` in pixels, and `original_size` that of its file."""

    extension: str
    data: bytes
    size: tuple[int, int]
    original_size: tuple[int, int]

    @property
    def num_pixels(self) -> int:
        return self.size[0] * self.size[1]


@dataclass(frozen=True, slots=True)
class Audio:
    """An audio clip as it goes into a shard; `original_rate_hz` is that of its file."""

    extension: str
    data: bytes
    facts: AudioFacts
    original_rate_hz: int


@lru_cache(maxsize=_NUM_KEPT)
def checked_image(media: Media, treatment: Treatment) -> CheckedImage:
    """An image that decodes."""
    extension, data = read_media(media, IMAGE_EXTENSIONS, BROKEN_IMAGE)
    try:
        if treatment.changes_images:
            return CheckedImage(*treat_image(treatment, extension, data))
        size = image_size(data) if treatment.check == "decode" else _size_in_header(data)
        return CheckedImage(extension, data, size, size)
    except DataError as error:
        raise BadSampleError(BROKEN_IMAGE, f"{media}: {error}") from error


@lru_cache(maxsize=_NUM_KEPT)
def checked_audio(media: Media, treatment: Treatment) -> Audio:
    """An audio clip that decodes and is not empty; its samples are not kept, they need much memory."""
    if treatment.check == "header" and treatment.sample_rate_hz is None:
        extension, data = read_media(media, AUDIO_EXTENSIONS, BROKEN_AUDIO)
        facts = _facts_in_header(media, data)
        return Audio(extension, data, facts, facts.sample_rate_hz)
    return decoded_audio(media, treatment)[0]


def decoded_audio(media: Media, treatment: Treatment) -> tuple[Audio, np.ndarray]:
    """An audio clip, and the samples [num_samples, num_channels] of its file."""
    extension, data = read_media(media, AUDIO_EXTENSIONS, BROKEN_AUDIO)
    try:
        samples, original_rate_hz = read_audio(data)
        extension, data, treated, rate_hz = treat_audio(
            treatment, extension, data, samples, original_rate_hz
        )
    except (DataError, soundfile.SoundFileError, ValueError) as error:
        raise BadSampleError(BROKEN_AUDIO, f"{media}: {error}") from error
    facts = AudioFacts.of(treated, rate_hz)
    return Audio(extension, data, facts, original_rate_hz), samples


def _size_in_header(data: bytes) -> tuple[int, int]:
    size = size_in_header(data)
    if size and size[0] * size[1] <= _PLAIN_PIXELS:
        return size
    # Pillow knows the other cases, and refuses what is absurdly large.
    with image_errors():
        return Image.open(io.BytesIO(data), formats=IMAGE_FORMATS).size


def _facts_in_header(media: Media, data: bytes) -> AudioFacts:
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if not 0 < file.frames < 2**40:
                raise DataError("its header does not say how long it is")
            duration_ms = max(1, round(file.frames * 1000 / file.samplerate))
            return AudioFacts(duration_ms, file.samplerate, file.channels)
    except (soundfile.SoundFileError, ValueError, OSError) as error:
        raise BadSampleError(BROKEN_AUDIO, f"{media}: {broken_audio(error)}") from error
    except DataError as error:
        raise BadSampleError(BROKEN_AUDIO, f"{media}: {error}") from error
