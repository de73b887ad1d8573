"""Decodes images and audio clips to arrays and checks that they are complete.

Images are PNG, JPEG, or WebP in any mode; audio clips are FLAC, WAV, OGG, or MP3 with any rate and number
of channels. A broken file raises `DataError`; the caller adds the sample's key. torch and torchaudio are
imported only for resampling, so data preparation stays light.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import soundfile
from PIL import Image, ImageOps

from muomni.config.models import SAMPLE_RATE_HZ
from muomni.errors import DataError

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
# The only formats Pillow may detect, whatever the extension: others can run programs (PostScript).
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
AUDIO_EXTENSIONS = ("flac", "wav", "ogg", "mp3")

_BLOCK_SAMPLES = 1 << 22
# Limit on samples times channels of an audio clip: 4 GiB as float32, 18 hours of 16 kHz mono.
MAX_VALUES = 1 << 30
# Programs that write to a pipe declare a length from here on, since it is unknown.
_UNKNOWN_WAV_BYTES = 0x7FFF0000


@dataclass(frozen=True, slots=True)
class AudioFacts:
    """Duration, rate, and channels of an audio clip before resampling."""

    duration_ms: int
    sample_rate_hz: int
    num_channels: int

    @classmethod
    def of(cls, samples: np.ndarray, sample_rate_hz: int) -> "AudioFacts":
        """The facts of a decoded audio clip [num_samples, num_channels]."""
        duration_ms = max(1, round(len(samples) * 1000 / sample_rate_hz))
        return cls(duration_ms, sample_rate_hz, samples.shape[1])


def image_size(data: bytes) -> tuple[int, int]:
    """Decode an image fully and return its width and height; raises as `open_image` does."""
    with image_errors():
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        size = image.size
        # A JPEG is decoded at an eighth of its size: all coefficients are read, but few pixels computed.
        image.draft(image.mode, (1, 1))
        image.load()
        return size


def open_image(data: bytes, smallest_side: int = 0) -> Image.Image:
    """Decode an image fully to upright RGB; transparent pixels are blended with white.

    With `smallest_side`, a JPEG may be decoded at 1/2, 1/4, or 1/8 of its size, with no side below
    `smallest_side`. Raises `DataError` if the bytes are not an image or are truncated.
    """
    with image_errors():
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        if smallest_side:  # decoding fewer frequencies is several times faster
            image.draft(image.mode, (smallest_side, smallest_side))
        image.load()
        return flat(upright(image))


def upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation of a decoded image and convert to RGB, or RGBA if it has transparency."""
    ImageOps.exif_transpose(image, in_place=True)
    image = _eight_bits(image)
    has_alpha = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    mode = "RGBA" if has_alpha else "RGB"
    return image if image.mode == mode else image.convert(mode)


def flat(image: Image.Image) -> Image.Image:
    """Convert the result of `upright` to RGB; transparent pixels are blended with white."""
    if image.mode == "RGB":
        return image
    ground = Image.new("RGBA", image.size, "white")
    ground.alpha_composite(image)
    return ground.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Keep the upper 8 bits of a 16-bit gray image; Pillow would clip all levels above 255 to white."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))


@contextmanager
def image_errors() -> Iterator[None]:
    """Convert everything that Pillow raises for broken or huge images to `DataError`."""
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
        raise DataError(f"broken image ({_reason(error)})") from error


def broken_audio(error: Exception) -> DataError:
    """An error of libsndfile as a `DataError`."""
    return DataError(f"broken audio clip ({_reason(error)})")


def _reason(error: Exception) -> str:
    """The message of a library, without the address of the buffer."""
    return re.sub(r"<_io.BytesIO object at \w+>", "its bytes", str(error)).strip()


def read_audio(data: bytes) -> tuple[np.ndarray, int]:
    """Decode an audio clip to float32 [num_samples, num_channels] and its original sample rate.

    Raises `DataError` if it cannot be decoded, is empty, truncated, or too long, or has non-finite
    samples.
    """
    _check_wav_length(data)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            num_declared = file.frames
            samples = _read_samples(file)
            sample_rate_hz = int(file.samplerate)
    except (soundfile.SoundFileError, ValueError, OSError) as error:
        raise broken_audio(error) from error
    if len(samples) == 0:
        raise DataError("audio clip of zero length")
    # MP3 and streams may not declare their length (frames is then huge); others must be complete.
    if 0 < num_declared < 2**62 and len(samples) < num_declared:
        raise DataError(f"broken audio clip (has {len(samples)} of {num_declared} samples)")
    if not np.isfinite(samples).all():
        raise DataError("broken audio clip (non-finite samples)")
    return samples, sample_rate_hz


def _read_samples(file: soundfile.SoundFile) -> np.ndarray:
    """All samples, read in blocks: a header may declare a length that exceeds memory."""
    blocks = []
    num_values = 0
    while len(block := file.read(_BLOCK_SAMPLES, dtype="float32", always_2d=True)):
        blocks.append(block)
        num_values += block.size
        if num_values > MAX_VALUES:
            raise DataError(
                f"audio clip has more than {MAX_VALUES} samples; split it, or list segments"
            )
    if not blocks:
        return np.empty((0, file.channels), dtype=np.float32)
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


def _check_wav_length(data: bytes) -> None:
    """Raise `DataError` if a WAV has fewer bytes than it declares, which libsndfile ignores."""
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return
    position = 12
    while position + 8 <= len(data):
        num_bytes = int.from_bytes(data[position + 4 : position + 8], "little")
        if data[position : position + 4] == b"data":
            num_present = len(data) - position - 8
            if num_present < num_bytes < _UNKNOWN_WAV_BYTES:
                raise DataError(f"broken audio clip (has {num_present} of {num_bytes} bytes)")
            return
        position += 8 + num_bytes + num_bytes % 2


def audio_facts(data: bytes) -> AudioFacts:
    """Decode an audio clip fully and return its facts; raises as `read_audio` does."""
    return AudioFacts.of(*read_audio(data))


def decode_audio(data: bytes) -> np.ndarray:
    """Decode an audio clip to float32 [num_samples], mono (mean of channels), at `SAMPLE_RATE_HZ`."""
    samples, sample_rate_hz = read_audio(data)
    mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
    if sample_rate_hz == SAMPLE_RATE_HZ:
        return np.ascontiguousarray(mono)
    # torch takes seconds to import, and most corpora need no resampling.
    from muomni.data.media.resampling import resample

    return resample(mono[:, None], sample_rate_hz, SAMPLE_RATE_HZ)[:, 0]
