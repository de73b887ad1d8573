"""Bytes of a sample to arrays: pictures, recordings, and the checks that both are whole.

Pictures come as PNG, JPEG or WebP in any mode, recordings as FLAC, WAV, OGG or MP3 in any rate and
channel count. A broken file raises `DataError`; the caller adds the key of its sample.
torch and torchaudio are imported only to resample, so data preparation stays light.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import soundfile
from PIL import Image, ImageOps

from muomni.config.models import SAMPLE_RATE_HZ
from muomni.errors import DataError

if TYPE_CHECKING:
    from torchaudio.transforms import Resample

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
AUDIO_EXTENSIONS = ("flac", "wav", "ogg", "mp3")


@dataclass(frozen=True, slots=True)
class AudioFacts:
    """What a recording is, before resampling."""

    duration_ms: int
    sample_rate_hz: int
    num_channels: int

    @classmethod
    def of(cls, samples: np.ndarray, sample_rate_hz: int) -> "AudioFacts":
        """The facts of a decoded recording [num_samples, num_channels]."""
        duration_ms = max(1, round(len(samples) * 1000 / sample_rate_hz))
        return cls(duration_ms, sample_rate_hz, samples.shape[1])


def image_size(data: bytes) -> tuple[int, int]:
    """Decode a picture fully and give its width and height; raises as `open_image`."""
    with _picture_errors():
        image = Image.open(io.BytesIO(data))
        image.load()
        return image.size


def open_image(data: bytes) -> Image.Image:
    """Decode a picture fully, upright and as RGB; transparency is laid on white.

    Raises `DataError` when the bytes are no picture or are cut off.
    """
    with _picture_errors():
        image = Image.open(io.BytesIO(data))
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            layer = image.convert("RGBA")
            image = Image.new("RGBA", layer.size, "white")
            image.alpha_composite(layer)
        return image.convert("RGB")


@contextmanager
def _picture_errors() -> Iterator[None]:
    """Everything that Pillow raises for broken or absurdly large pictures becomes `DataError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        raise DataError(f"broken picture ({_reason(error)})") from error


def broken_recording(error: Exception) -> DataError:
    """What libsndfile says of the bytes of a recording, as an error of the sample."""
    return DataError(f"broken recording ({_reason(error)})")


def _reason(error: Exception) -> str:
    """What a library says of bytes, without the address of the buffer that they lay in."""
    return re.sub(r"<_io.BytesIO object at \w+>", "its bytes", str(error)).strip()


def decode_image(data: bytes, size: int) -> np.ndarray:
    """Decode a picture to uint8 [3, size, size].

    The shorter side is resized to `size` (bicubic, antialiased) and the centre is cut out, as
    CLIP does at evaluation.
    """
    image = ImageOps.fit(open_image(data), (size, size), method=Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))


def read_audio(data: bytes) -> tuple[np.ndarray, int]:
    """Decode a recording to float32 [num_samples, num_channels] and its own sample rate.

    Raises `DataError` when it cannot be decoded, is empty, cut off, or holds non-finite values.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            num_declared = file.frames
            samples = file.read(dtype="float32", always_2d=True)
            sample_rate_hz = int(file.samplerate)
    except (soundfile.SoundFileError, ValueError, OSError) as error:
        raise broken_recording(error) from error
    if len(samples) == 0:
        raise DataError("recording of zero length")
    # MP3 and streams may not know their length (frames is then huge); others must be whole.
    if 0 < num_declared < 2**62 and len(samples) < num_declared:
        raise DataError(f"broken recording (holds {len(samples)} of {num_declared} samples)")
    if not np.isfinite(samples).all():
        raise DataError("broken recording (non-finite samples)")
    return samples, sample_rate_hz


def audio_facts(data: bytes) -> AudioFacts:
    """Decode a recording fully and say how long it is; raises as `read_audio`."""
    return AudioFacts.of(*read_audio(data))


def decode_audio(data: bytes) -> np.ndarray:
    """Decode a recording to float32 [num_samples], mono (mean of channels) at `SAMPLE_RATE_HZ`."""
    samples, sample_rate_hz = read_audio(data)
    mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
    if sample_rate_hz == SAMPLE_RATE_HZ:
        return np.ascontiguousarray(mono)
    import torch

    resampled = _resampler(sample_rate_hz)(torch.from_numpy(np.ascontiguousarray(mono)))
    return resampled.numpy()


@lru_cache(maxsize=32)
def _resampler(sample_rate_hz: int) -> "Resample":
    """Windowed-sinc resampler from `sample_rate_hz`; its filter is computed once a process."""
    from torchaudio.transforms import Resample

    return Resample(sample_rate_hz, SAMPLE_RATE_HZ)
