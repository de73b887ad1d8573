"""Decodes images and audio clips to arrays and checks that they are complete.

Images are PNG, JPEG, or WebP in any mode; audio clips are FLAC, WAV, Ogg, or MP3 with any rate and number of
channels. The content decides, not the name. Audio is decoded to its end, whatever length its header declares.
A broken file raises `DataError`; the caller adds the sample's key. torch and torchaudio are imported only for
resampling, so data preparation stays light.
"""

import io
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import soundfile
from PIL import Image, ImageOps, UnidentifiedImageError

from muomni.config.models import SAMPLE_RATE_HZ
from muomni.data.media.formats import (
    AUDIO_EXTENSIONS,
    IMAGE_EXTENSIONS,
    JPEG,
    Kind,
    MediaFormat,
    detect_format,
)
from muomni.data.media.streams import AudioStream, audio_streams, joined_streams
from muomni.errors import DataError

# The only formats Pillow may detect, whatever the extension: others can run programs (PostScript).
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
_BLOCK_VALUES = 1 << 22
_SMALL_BLOCK = 1 << 16
# Limit on samples times channels of an audio clip: 4 GiB as float32, 18 hours of 16 kHz mono.
MAX_VALUES = 1 << 30
# Rates that microphones have. An odd rate, such as 16,001 Hz, needs a filter of its own for each output sample.
MIN_RATE_HZ, MAX_RATE_HZ = 1_000, 768_000
_MAX_WEIGHTS = 1 << 26
# libsndfile reports more for streams of unknown length.
_MAX_SAMPLES = 1 << 40
_JPEG_END = b"\xff\xd9"


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
        image = identify_image(data)
        size = image.size
        # A JPEG is decoded at an eighth of its size: all coefficients are read, but few pixels computed.
        image.draft(image.mode, (1, 1))
        load_image(image, data)
        return size


def open_image(data: bytes, smallest_side: int = 0) -> Image.Image:
    """Decode an image fully to upright RGB; transparent pixels are blended with white.

    With `smallest_side`, a JPEG may be decoded at 1/2, 1/4, or 1/8 of its size, with no side below
    `smallest_side`. Raises `DataError` if the bytes are not an image or are truncated.
    """
    with image_errors():
        image = identify_image(data)
        if smallest_side:  # decoding fewer frequencies is several times faster
            image.draft(image.mode, (smallest_side, smallest_side))
        return flat(upright(load_image(image, data)))


def identify_image(data: bytes) -> Image.Image:
    """Open an image without decoding it; raises `DataError` that names a format that training does not read."""
    try:
        return Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except UnidentifiedImageError:
        found = detect_format(data)
        if found is None or (found.kind == "image" and found.handling == "kept"):
            raise
        raise wrong_format(found, "image") from None


def load_image(image: Image.Image, data: bytes) -> Image.Image:
    """Decode the pixels of an opened image.

    A JPEG may lack its end marker if all pixels are there, which cannot be told of progressive ones.
    """
    try:
        image.load()
        return image
    except OSError:
        if image.info.get("progressive") or not _lacks_only_its_end(data):
            raise
    completed = identify_image(data + _JPEG_END)
    completed.draft(image.mode, image.size)
    completed.load()
    return completed


def _lacks_only_its_end(data: bytes) -> bool:
    if detect_format(data) is not JPEG:
        return False
    import simplejpeg

    try:
        # Unlike Pillow, it refuses missing coefficients.
        simplejpeg.decode_jpeg(data + _JPEG_END)
    except ValueError:
        return False
    return True


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
        RuntimeError,  # of the AVIF decoder
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        raise DataError(f"broken image ({_reason(error)})") from error


def _not_decoded(data: bytes, error: Exception) -> DataError:
    """An error of libsndfile as a `DataError`, or that the bytes have another format."""
    found = detect_format(data)
    if found is None or (found.kind == "audio" and found.handling == "kept"):
        return DataError(f"broken audio clip ({_reason(error)})")
    return wrong_format(found, "audio")


def wrong_format(found: MediaFormat, kind: Kind) -> DataError:
    """That a file has a format that training does not decode as `kind`."""
    known = ", ".join(IMAGE_EXTENSIONS if kind == "image" else AUDIO_EXTENSIONS)
    what = "broken image" if kind == "image" else "broken audio clip"
    return DataError(f"{what} (it is {found.name}, not one of {known})")


def _reason(error: Exception) -> str:
    """The message of a library, without the address of the buffer."""
    return re.sub(r"<_io.BytesIO object at \w+>", "its bytes", str(error)).strip()


def read_audio(data: bytes) -> tuple[np.ndarray, int]:
    """Decode an audio clip to float32 [num_samples, num_channels] and its original sample rate.

    Raises `DataError` if it cannot be decoded, is empty, truncated, or too long, or has non-finite
    samples.
    """
    streams = audio_streams(data)
    try:
        decoded = [_read_stream(stream) for stream in streams]
    except soundfile.SoundFileError:
        try:
            decoded = [_read_stream(stream) for stream in joined_streams(data)]
        except (soundfile.SoundFileError, ValueError, OSError) as error:
            raise _not_decoded(data, error) from error
    except (ValueError, OSError) as error:
        raise _not_decoded(data, error) from error
    parts = [samples for samples, _ in decoded]
    rates_hz = {rate_hz for _, rate_hz in decoded}
    if len(rates_hz) > 1 or len({part.shape[1] for part in parts}) > 1:
        raise DataError("audio clip of joined parts with different rates or channels")
    samples = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if len(samples) == 0:
        raise DataError("audio clip of zero length")
    _check_rate(*rates_hz)
    if not np.isfinite(samples).all():
        raise DataError("broken audio clip (non-finite samples)")
    return samples, rates_hz.pop()


def _check_rate(rate_hz: int) -> None:
    """Raise `DataError` for a rate that would need minutes or gigabytes to resample."""
    divisor = math.gcd(rate_hz, SAMPLE_RATE_HZ)
    num_weights = rate_hz // divisor * (SAMPLE_RATE_HZ // divisor)
    if not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ or num_weights > _MAX_WEIGHTS:
        raise DataError(
            f"audio clip with a sample rate of {rate_hz} Hz, which is not supported; resample it, for "
            f"example with ffmpeg -ar {SAMPLE_RATE_HZ}"
        )


def _read_stream(stream: AudioStream) -> tuple[np.ndarray, int]:
    with AudioFile(io.BytesIO(stream.data)) as file:
        samples = _read_samples(file, stream.num_samples)
        num_declared = file.frames if stream.num_samples is None else stream.num_samples
        rate_hz = int(file.samplerate)
    samples = samples[stream.num_skipped :]
    if len(samples) < num_declared < _MAX_SAMPLES:
        raise DataError(f"broken audio clip (has {len(samples)} of {num_declared} samples)")
    return samples, rate_hz


class AudioFile(soundfile.SoundFile):
    """A file that is read without seeking, which fails at the end of streams of unknown length."""

    def seekable(self) -> bool:
        return False


def _read_samples(file: soundfile.SoundFile, num_expected: int | None) -> np.ndarray:
    """All samples, read in blocks: a header may declare a length that exceeds memory."""
    blocks = []
    num_values = 0
    # One sample more than declared shows whether there are more. libsndfile clears the rest of a block behind
    # the end, so blocks are hardly larger than the clip.
    expected = file.frames if num_expected is None else (num_expected or _SMALL_BLOCK) + 1
    num_wanted = min(expected, _BLOCK_VALUES // file.channels)
    while len(block := file.read(num_wanted, dtype="float32", always_2d=True)):
        blocks.append(block)
        num_values += block.size
        if len(block) < num_wanted or num_values == file.frames * file.channels:
            num_wanted = 1
        if num_values > MAX_VALUES:
            raise DataError(
                f"audio clip has more than {MAX_VALUES} samples; split it, or list segments"
            )
    if not blocks:
        return np.empty((0, file.channels), dtype=np.float32)
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


def declared_length(data: bytes) -> tuple[int, int, int] | None:
    """Samples, rate, and channels of an audio clip by its header; None if only decoding tells its length.

    Headers of files that were joined or written to a pipe do not tell it, nor those of MP3 without a Xing
    header. Raises `DataError` if the header is broken.
    """
    streams = audio_streams(data)
    is_joined = len(streams) > 1 or len(joined_streams(data)) > 1
    if is_joined or streams[0].num_skipped:
        return None
    try:
        with soundfile.SoundFile(io.BytesIO(streams[0].data)) as file:
            num_samples = streams[0].num_samples
            num_samples = file.frames if num_samples is None else num_samples
            if not 0 < num_samples < _MAX_SAMPLES:
                return None
            _check_rate(int(file.samplerate))
            return num_samples, int(file.samplerate), file.channels
    except (soundfile.SoundFileError, ValueError, OSError) as error:
        raise _not_decoded(data, error) from error


def decode_audio(data: bytes) -> np.ndarray:
    """Decode an audio clip to float32 [num_samples], mono (mean of channels), at `SAMPLE_RATE_HZ`."""
    samples, sample_rate_hz = read_audio(data)
    mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
    if sample_rate_hz == SAMPLE_RATE_HZ:
        return np.ascontiguousarray(mono)
    # torch takes seconds to import, and most corpora need no resampling.
    from muomni.data.media.resampling import resample

    return resample(mono[:, None], sample_rate_hz, SAMPLE_RATE_HZ)[:, 0]
