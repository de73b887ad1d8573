"""Conversion of samples on their way into a shard: image size and format, sample rate, and text.

Nothing is converted by default. Results depend only on the file and the options, so shards have the same
bytes for any number of tasks. A file that already has the requested form keeps its bytes.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import soundfile
from PIL import ExifTags, Image

from data_prep.media.foreign import encode_audio
from data_prep.options import FRAME_S, NORMALIZERS, TRIM_MARGIN_S, Preprocessing
from muomni.data.media.decode import flat, identify_image, image_errors, load_image, upright

_PIL_FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}
# JPEGs are decoded at about twice the requested size, in steps of eighths.
_DRAFT_GAP = 2
_MORE_THAN_24_BITS = ("PCM_32", "FLOAT", "DOUBLE")
# EXIF orientations that swap width and height.
_TRANSPOSED = (5, 6, 7, 8)


def normalize_text(preprocessing: Preprocessing, text: str) -> str:
    """Apply all steps of `normalize` to a text."""
    for name in preprocessing.normalize:
        text = NORMALIZERS[name](text)
    return text


def convert_image(
    preprocessing: Preprocessing, extension: str, data: bytes
) -> tuple[str, bytes, tuple[int, int], tuple[int, int]]:
    """Decode an image and encode it as requested.

    The result is upright if EXIF data rotate the original, and has no EXIF data and color profile.

    Returns:
        Extension, bytes, size, and original size in pixels.

    Raises:
        DataError: the image is broken.
    """
    with image_errors():
        image = identify_image(data)
        before = image.size
        scale = _scale(preprocessing, before)
        wanted = extension if preprocessing.image_format == "keep" else preprocessing.image_format
        is_kept = scale == 1 and image.format == _PIL_FORMATS[wanted]
        if is_kept:
            image.draft(image.mode, (1, 1))
        elif scale < 1:
            width, height = (int(_DRAFT_GAP * scale * side) for side in before)
            image.draft(image.mode, (width, height))
        image = load_image(image, data)
        if is_kept:
            return extension, data, before, before
        # The draft mode has rounded the sides, so the aspect ratio is that of the original.
        is_transposed = image.getexif().get(ExifTags.Base.Orientation) in _TRANSPOSED
        sides = before[::-1] if is_transposed else before
        image = upright(image)
        size = (max(1, round(sides[0] * scale)), max(1, round(sides[1] * scale)))
        if size != image.size:
            image = _resized(image, size)
        encoded = _encode(image, _PIL_FORMATS[wanted], preprocessing.quality)
        return "jpg" if wanted == "jpeg" else wanted, encoded, size, before


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize an RGB or RGBA image; Pillow ignores the color of transparent pixels."""
    if image.mode == "RGBA":
        return image.resize(size, Image.Resampling.BICUBIC)
    # Imported late: torch takes seconds to import, and most corpora are sharded without it.
    from muomni.data.media.image import resized

    with _one_thread():
        return Image.fromarray(resized(np.array(image), size))


def _scale(preprocessing: Preprocessing, size: tuple[int, int]) -> float:
    if preprocessing.resize_shorter is None:
        return 1.0
    scale = preprocessing.resize_shorter / min(size)
    return scale if scale < 1 or preprocessing.upscale else 1.0


def _encode(image: Image.Image, image_format: str, quality: int) -> bytes:
    buffer = io.BytesIO()
    if image_format == "JPEG":
        flat(image).save(buffer, image_format, quality=quality)
    elif image_format == "WEBP":
        image.save(buffer, image_format, quality=quality, method=4)
    else:
        image.save(buffer, image_format)
    return buffer.getvalue()


def convert_audio(
    preprocessing: Preprocessing,
    extension: str,
    data: bytes,
    samples: np.ndarray,
    sample_rate_hz: int,
) -> tuple[str, bytes, np.ndarray, int]:
    """Trim and resample a decoded audio clip [num_samples, num_channels] as requested.

    A trimmed clip is FLAC of 16 or 24 bits, or WAV of 32-bit floats if its samples have more than 24 bits; a
    resampled one is 16-bit FLAC.

    Returns:
        Extension, bytes, samples, and rate; the arguments if nothing changes.
    """
    kept = samples
    if preprocessing.trim_dbfs is not None:
        kept = trimmed(samples, sample_rate_hz, preprocessing.trim_dbfs)
    wanted = preprocessing.sample_rate_hz
    if wanted is None or wanted == sample_rate_hz:
        if len(kept) == len(samples):
            return extension, data, samples, sample_rate_hz
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            subtype = file.subtype
        return *_encoded(kept, sample_rate_hz, subtype), kept, sample_rate_hz
    # Imported late, as in `_resized`.
    from muomni.data.media.resampling import resample

    with _one_thread():
        resampled = resample(kept, sample_rate_hz, wanted)
    buffer = io.BytesIO()
    soundfile.write(buffer, resampled, wanted, "PCM_16", format="FLAC")
    return "flac", buffer.getvalue(), resampled, wanted


def trimmed(samples: np.ndarray, sample_rate_hz: int, level_dbfs: float) -> np.ndarray:
    """An audio clip [num_samples, num_channels] without the silence at both ends, except for `TRIM_MARGIN_S`.

    A frame is silent if the RMS of its loudest channel is below the level; a clip of silence is kept whole.
    """
    size = max(1, round(FRAME_S * sample_rate_hz))
    starts = np.arange(0, len(samples), size)
    power = np.add.reduceat(np.square(samples, dtype=np.float64), starts, axis=0).max(axis=1)
    num_in_frame = np.diff(np.append(starts, len(samples)))
    (loud,) = np.nonzero(power >= num_in_frame * 10 ** (level_dbfs / 10))
    if not len(loud):
        return samples
    margin = round(TRIM_MARGIN_S * sample_rate_hz)
    return samples[max(0, loud[0] * size - margin) : (loud[-1] + 1) * size + margin]


def _encoded(samples: np.ndarray, sample_rate_hz: int, subtype: str) -> tuple[str, bytes]:
    """Extension and bytes of samples that were decoded from a file of a subtype, without loss up to 24 bits.

    soundfile scales floats so that full scale becomes 32767, so they are converted to integers here.
    """
    if subtype in _MORE_THAN_24_BITS:
        return encode_audio(samples, sample_rate_hz, "WAV", "FLOAT")
    num_bits = 24 if subtype == "PCM_24" else 16
    scale = 1 << (num_bits - 1)
    values = np.rint(samples * np.float64(scale)).clip(-scale, scale - 1)
    if num_bits == 24:
        return encode_audio(values.astype(np.int32) << 8, sample_rate_hz, "FLAC", "PCM_24")
    return encode_audio(values.astype(np.int16), sample_rate_hz, "FLAC", "PCM_16")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one torch thread: workers share the processors, and their number must not affect results."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
