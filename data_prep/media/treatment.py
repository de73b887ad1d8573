"""What is changed in a sample on the way into a shard: image size and format, sample rate, text.

Nothing is unless asked for. All is a pure function of the file and the options, so shards have the same
bytes for any number of tasks. A file that already is as asked keeps its bytes.
"""

import io
import re
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import soundfile
from PIL import ExifTags, Image

from muomni.data.media.decode import IMAGE_FORMATS, flat, image_errors, upright
from muomni.errors import ConfigError

Check = Literal["decode", "header"]
CHECKS: tuple[Check, ...] = ("decode", "header")
ImageFormat = Literal["keep", "jpeg", "webp"]
OUTPUT_FORMATS: tuple[ImageFormat, ...] = ("keep", "jpeg", "webp")
_MIN_RATE_HZ, _MAX_RATE_HZ = 4_000, 192_000

_PIL_FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}
# A JPEG is decoded at about twice the size that is asked for, as far as eighths allow.
_DRAFT_GAP = 2
# Values of EXIF's orientation that swap the sides.
_TURNED = (5, 6, 7, 8)
_QUOTES = str.maketrans(
    {**dict.fromkeys("‘’‚‛′", "'"), **dict.fromkeys("“”„‟″«»", '"'), "–": "-", "—": "-", "…": "..."}
)


def _white_space(text: str) -> str:
    """Runs of white space as one space, one line break or one blank line; none at the ends."""

    def shortest(run: re.Match[str]) -> str:
        return ("\n" * min(run[0].count("\n"), 2)) or " "

    return re.sub(r"\s+", shortest, text).strip()


def _without_control(text: str) -> str:
    """No control and format characters but tabs and line breaks."""
    kept = (c for c in text if c in "\t\n" or unicodedata.category(c) not in ("Cc", "Cf"))
    return "".join(kept)


def _without_punctuation(text: str) -> str:
    """No punctuation but apostrophes and hyphens inside of words."""
    return re.sub(r"(?<![^\W_])['’-]|['’-](?![^\W_])|[^\w\s'’-]|_", "", text)


NORMALIZERS: dict[str, Callable[[str], str]] = {
    "nfc": lambda text: unicodedata.normalize("NFC", text),
    "nfkc": lambda text: unicodedata.normalize("NFKC", text),
    "control": _without_control,
    "quotes": lambda text: text.translate(_QUOTES),
    "punctuation": _without_punctuation,
    "lower": str.lower,
    "upper": str.upper,
    "whitespace": _white_space,
}


@dataclass(frozen=True, slots=True)
class Treatment:
    """How the files of a corpus are checked and what is changed; raises `ConfigError`.

    `check`: decode every file, or trust its header. `resize_shorter`: pixels of the shorter side, only
    of larger images unless `upscale`. `quality` is that of JPEG and WebP. `normalize` names
    `NORMALIZERS`, applied in this order.
    """

    check: Check = "decode"
    resize_shorter: int | None = None
    upscale: bool = False
    image_format: ImageFormat = "keep"
    quality: int = 90
    sample_rate_hz: int | None = None
    normalize: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.resize_shorter is not None and self.resize_shorter < 1:
            raise ConfigError(f"--resize-shorter {self.resize_shorter} must be 1 or more")
        if self.upscale and self.resize_shorter is None:
            raise ConfigError("--upscale says how to resize; give --resize-shorter too")
        if not 1 <= self.quality <= 100:
            raise ConfigError(f"--quality {self.quality} lies outside 1 to 100")
        rate = self.sample_rate_hz
        if rate is not None and not _MIN_RATE_HZ <= rate <= _MAX_RATE_HZ:
            raise ConfigError(
                f"--sample-rate {rate} lies outside {_MIN_RATE_HZ} to {_MAX_RATE_HZ} Hz"
            )
        unknown = [name for name in self.normalize if name not in NORMALIZERS]
        if unknown:
            raise ConfigError(f"--normalize {unknown[0]!r} is none of {', '.join(NORMALIZERS)}")

    @property
    def changes_images(self) -> bool:
        return self.resize_shorter is not None or self.image_format != "keep"

    def as_text(self) -> dict[str, str]:
        """The options that differ from the default, for plan and manifest."""
        default = asdict(Treatment())
        chosen = {name: value for name, value in asdict(self).items() if value != default[name]}
        chosen.pop("quality", None)
        if self.changes_images:
            chosen["quality"] = self.quality
        return {
            name: ",".join(value) if isinstance(value, tuple) else str(value)
            for name, value in chosen.items()
        }

    @classmethod
    def from_text(cls, texts: dict[str, str]) -> "Treatment":
        """What `as_text` gave, read again."""
        read: dict[str, Callable[[str], object]] = {
            "resize_shorter": int,
            "quality": int,
            "sample_rate_hz": int,
            "upscale": lambda text: text == "True",
            "normalize": lambda text: tuple(text.split(",")),
        }
        return cls(**{name: read.get(name, str)(text) for name, text in texts.items()})  # type: ignore[arg-type]


def treat_text(treatment: Treatment, text: str) -> str:
    """The text after all steps of `normalize`."""
    for name in treatment.normalize:
        text = NORMALIZERS[name](text)
    return text


def treat_image(
    treatment: Treatment, extension: str, data: bytes
) -> tuple[str, bytes, tuple[int, int], tuple[int, int]]:
    """Decode an image and write it as asked: extension, bytes, size now, size before.

    Turned upright where its EXIF data say so, without that data and color profiles. Raises `DataError`
    for a broken image.
    """
    with image_errors():
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        before = image.size
        scale = _scale(treatment, before)
        wanted = extension if treatment.image_format == "keep" else treatment.image_format
        is_kept = scale == 1 and image.format == _PIL_FORMATS[wanted]
        if is_kept:
            image.draft(image.mode, (1, 1))
        elif scale < 1:
            width, height = (int(_DRAFT_GAP * scale * side) for side in before)
            image.draft(image.mode, (width, height))
        image.load()
        if is_kept:
            return extension, data, before, before
        # The draft has made the sides shorter, so their ratio is taken from before.
        is_turned = image.getexif().get(ExifTags.Base.Orientation) in _TURNED
        sides = before[::-1] if is_turned else before
        image = upright(image)
        size = (max(1, round(sides[0] * scale)), max(1, round(sides[1] * scale)))
        if size != image.size:
            image = _resized(image, size)
        return _extension(wanted), _encoded(image, _PIL_FORMATS[wanted], treatment), size, before


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """An RGB or RGBA image of another size; Pillow knows that transparent pixels have no color."""
    if image.mode == "RGBA":
        return image.resize(size, Image.Resampling.BICUBIC)
    # Not at the top: most corpora are written without torch, which takes seconds to import.
    from muomni.data.media.image import resized

    with _one_thread():
        return Image.fromarray(resized(np.array(image), size))


def _scale(treatment: Treatment, size: tuple[int, int]) -> float:
    if treatment.resize_shorter is None:
        return 1.0
    scale = treatment.resize_shorter / min(size)
    return scale if scale < 1 or treatment.upscale else 1.0


def _extension(name: str) -> str:
    return "jpg" if name == "jpeg" else name


def _encoded(image: Image.Image, form: str, treatment: Treatment) -> bytes:
    buffer = io.BytesIO()
    if form == "JPEG":
        flat(image).save(buffer, form, quality=treatment.quality)
    elif form == "WEBP":
        image.save(buffer, form, quality=treatment.quality, method=4)
    else:
        image.save(buffer, form)
    return buffer.getvalue()


def treat_audio(
    treatment: Treatment, extension: str, data: bytes, samples: np.ndarray, sample_rate_hz: int
) -> tuple[str, bytes, np.ndarray, int]:
    """A decoded audio clip [num_samples, num_channels] at the rate that is asked for, as FLAC of 16 bits.

    Extension, bytes, samples and rate come back as they were where nothing has to be changed.
    """
    wanted = treatment.sample_rate_hz
    if wanted is None or wanted == sample_rate_hz:
        return extension, data, samples, sample_rate_hz
    # Not at the top, as in `_resized`.
    from muomni.data.media.resampling import resample

    with _one_thread():
        resampled = resample(samples, sample_rate_hz, wanted)
    buffer = io.BytesIO()
    soundfile.write(buffer, resampled, wanted, "PCM_16", format="FLAC")
    return "flac", buffer.getvalue(), resampled, wanted


@contextmanager
def _one_thread() -> Iterator[None]:
    """Results must not depend on the number of processors, and workers share these already."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
