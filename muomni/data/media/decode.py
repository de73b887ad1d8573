"""Bytes of a sample to arrays: images, audio clips, and the checks that both are whole.

Images come as PNG, JPEG or WebP in any mode, audio clips as FLAC, WAV, OGG or MP3 in any rate and
channel count. A broken file raises `DataError`; the caller adds the key of its sample.
torch and torchaudio are imported only to resample (`resampling`), so data preparation stays light.
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
# All that Pillow may take bytes for, whatever the extension: others may start programs (PostScript).
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
AUDIO_EXTENSIONS = ("flac", "wav", "ogg", "mp3")

_BLOCK_SAMPLES = 1 << 22
# Samples of all channels of one audio clip: 4 GiB as float32, 18 hours of 16 kHz mono.
MAX_VALUES = 1 << 30
# What writes to a pipe declares a length from here on, since it cannot know it.
_UNKNOWN_WAV_BYTES = 0x7FFF0000


@dataclass(frozen=True, slots=True)
class AudioFacts:
    """What an audio clip is, before resampling."""

    duration_ms: int
    sample_rate_hz: int
    num_channels: int

    @classmethod
    def of(cls, samples: np.ndarray, sample_rate_hz: int) -> "AudioFacts":
        """The facts of a decoded audio clip [num_samples, num_channels]."""
        duration_ms = max(1, round(len(samples) * 1000 / sample_rate_hz))
        return cls(duration_ms, sample_rate_hz, samples.shape[1])


def image_size(data: bytes) -> tuple[int, int]:
    """Decode an image fully and give its width and height; raises as `open_image`."""
    with image_errors():
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        size = image.size
        # For JPEG an eighth of the size: all coefficients are still read, few pixels are made.
        image.draft(image.mode, (1, 1))
        image.load()
        return size


def open_image(data: bytes, smallest_side: int = 0) -> Image.Image:
    """Decode an image fully, upright and as RGB; transparency is laid on white.

    With `smallest_side`, a JPEG may come at a half, a quarter or an eighth of its size, neither side
    below that. Raises `DataError` when the bytes are no image or are cut off.
    """
    with image_errors():
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        if smallest_side:  # decoding to fewer frequencies takes a fraction of the time
            image.draft(image.mode, (smallest_side, smallest_side))
        image.load()
        return flat(upright(image))


def upright(image: Image.Image) -> Image.Image:
    """A decoded image as its EXIF data turns it, RGB, or RGBA where parts are transparent."""
    ImageOps.exif_transpose(image, in_place=True)
    image = _eight_bits(image)
    has_alpha = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    mode = "RGBA" if has_alpha else "RGB"
    return image if image.mode == mode else image.convert(mode)


def flat(image: Image.Image) -> Image.Image:
    """What `upright` gave as RGB; transparency is laid on white."""
    if image.mode == "RGB":
        return image
    ground = Image.new("RGBA", image.size, "white")
    ground.alpha_composite(image)
    return ground.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """A gray image of 16 bits with its upper eight; Pillow would cut all levels above 255 to white."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))


@contextmanager
def image_errors() -> Iterator[None]:
    """Everything that Pillow raises for broken or absurdly large images becomes `DataError`."""
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
    """What libsndfile says of the bytes of an audio clip, as an error of the sample."""
    return DataError(f"broken audio clip ({_reason(error)})")


def _reason(error: Exception) -> str:
    """What a library says of bytes, without the address of the buffer that they lay in."""
    return re.sub(r"<_io.BytesIO object at \w+>", "its bytes", str(error)).strip()


def read_audio(data: bytes) -> tuple[np.ndarray, int]:
    """Decode an audio clip to float32 [num_samples, num_channels] and its own sample rate.

    Raises `DataError` when it cannot be decoded, is empty, cut off, of absurd length, or holds
    non-finite values.
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
    # MP3 and streams may not know their length (frames is then huge); others must be whole.
    if 0 < num_declared < 2**62 and len(samples) < num_declared:
        raise DataError(f"broken audio clip (holds {len(samples)} of {num_declared} samples)")
    if not np.isfinite(samples).all():
        raise DataError("broken audio clip (non-finite samples)")
    return samples, sample_rate_hz


def _read_samples(file: soundfile.SoundFile) -> np.ndarray:
    """All samples, a block at a time: a header may claim a length that no memory could hold."""
    blocks = []
    num_values = 0
    while len(block := file.read(_BLOCK_SAMPLES, dtype="float32", always_2d=True)):
        blocks.append(block)
        num_values += block.size
        if num_values > MAX_VALUES:
            raise DataError(
                f"audio clip of more than {MAX_VALUES} samples; cut it into parts, or list segments"
            )
    if not blocks:
        return np.empty((0, file.channels), dtype=np.float32)
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


def _check_wav_length(data: bytes) -> None:
    """Raise `DataError` for a WAV with fewer bytes than it declares; libsndfile would not mind."""
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return
    position = 12
    while position + 8 <= len(data):
        num_bytes = int.from_bytes(data[position + 4 : position + 8], "little")
        if data[position : position + 4] == b"data":
            num_there = len(data) - position - 8
            if num_there < num_bytes < _UNKNOWN_WAV_BYTES:
                raise DataError(f"broken audio clip (holds {num_there} of {num_bytes} bytes)")
            return
        position += 8 + num_bytes + num_bytes % 2


def audio_facts(data: bytes) -> AudioFacts:
    """Decode an audio clip fully and say how long it is; raises as `read_audio`."""
    return AudioFacts.of(*read_audio(data))


def decode_audio(data: bytes) -> np.ndarray:
    """Decode an audio clip to float32 [num_samples], mono (mean of channels) at `SAMPLE_RATE_HZ`."""
    samples, sample_rate_hz = read_audio(data)
    mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
    if sample_rate_hz == SAMPLE_RATE_HZ:
        return np.ascontiguousarray(mono)
    # torch takes seconds to import, and most corpora are sharded without.
    from muomni.data.media.resampling import resample

    return resample(mono[:, None], sample_rate_hz, SAMPLE_RATE_HZ)[:, 0]
