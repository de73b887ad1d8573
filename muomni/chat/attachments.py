"""Images and audio clips that a user attaches to a turn, checked before the model sees them.

Size and duration are read from the file's header if it tells them, so a huge file is refused without being
decoded.
"""

import io
from dataclasses import dataclass
from pathlib import Path

import imagesize

from muomni.config.models import FRAME_RATE_HZ, SAMPLE_RATE_HZ, OmniConfig
from muomni.data.media.audio import decode_declared_length, resampled_length
from muomni.data.media.formats import AUDIO_EXTENSIONS, EXTENSIONS, IMAGE_EXTENSIONS
from muomni.data.media.image import decode_image
from muomni.data.text.turns import MediaKind
from muomni.errors import DataError

MAX_FILE_BYTES = 100 << 20
# Every image is reduced to the model's size, so this only protects memory.
MAX_IMAGE_PIXELS = 64_000_000
# <bos>, <user>, <audio_start>, <audio_end>, and <assistant>.
_NUM_OTHER_POSITIONS = 5


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """The largest image and the longest audio clip that a model takes.

    `image_size` is the side of the square that the model sees.
    """

    image_size: int
    audio_s: float
    image_pixels: int = MAX_IMAGE_PIXELS
    file_bytes: int = MAX_FILE_BYTES

    @classmethod
    def of(cls, config: OmniConfig, max_new_tokens: int) -> "MediaLimits":
        """The limits that leave `max_new_tokens` positions for the answer."""
        num_positions = config.thinker.max_positions - max_new_tokens - _NUM_OTHER_POSITIONS
        audio_s = max(0, num_positions) * config.audio_stack / FRAME_RATE_HZ
        return cls(config.vision_encoder.image_size, audio_s)


@dataclass(frozen=True, slots=True)
class Attachment:
    """A file that was checked; `facts` describe it in words."""

    kind: MediaKind
    name: str
    data: bytes
    facts: str


def media_kind(path: Path) -> MediaKind:
    """The kind of a file by its extension; raises DataError for one that is neither."""
    extension = path.suffix.lower().lstrip(".")
    for kind, known in EXTENSIONS.items():
        if extension in known:
            return kind
    known = ", ".join((*IMAGE_EXTENSIONS, *AUDIO_EXTENSIONS))
    raise DataError(f"{path.name} is neither an image nor an audio file; use one of {known}")


def read_attachment(kind: MediaKind, path: Path, limits: MediaLimits) -> Attachment:
    """Read and check an image or audio file.

    Raises DataError if it cannot be read, is broken or empty, or exceeds a limit.
    """
    if path.suffix.lower().lstrip(".") not in EXTENSIONS[kind]:
        known = ", ".join(EXTENSIONS[kind])
        raise DataError(f"{path.name} is not a supported {kind} file; use one of {known}")
    data = _read(path, kind, limits.file_bytes)
    try:
        facts = (_check_image if kind == "image" else _check_audio)(data, limits)
    except DataError as error:
        raise DataError(f"{path.name}: {error}; use another file") from None
    return Attachment(kind, path.name, data, facts)


def _read(path: Path, kind: MediaKind, max_bytes: int) -> bytes:
    try:
        if path.exists() and not path.is_file():  # reading a pipe may block forever
            raise DataError(f"{path} is not a file; name a supported {kind} file")
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise DataError(f"cannot read {kind} {path}: {error.strerror}") from None
    if len(data) > max_bytes:
        raise DataError(
            f"{path.name} is larger than {max_bytes >> 20} MiB; use a smaller or shorter file"
        )
    return data


def _check_image(data: bytes, limits: MediaLimits) -> str:
    width, height = imagesize.get(io.BytesIO(data))
    if int(width) * int(height) > limits.image_pixels:
        raise DataError(
            f"the image has {width} x {height} pixels, but at most {limits.image_pixels / 1e6:g} million are "
            f"read"
        )
    decode_image(data, limits.image_size)
    size = limits.image_size
    return f"{width} x {height}, which the model sees at {size} x {size}"


def _check_audio(data: bytes, limits: MediaLimits) -> str:
    duration_s = resampled_length(data) / SAMPLE_RATE_HZ
    if duration_s > limits.audio_s:
        raise DataError(
            f"the audio clip is {duration_s:.1f} s long, but this model takes at most {limits.audio_s:.1f} s"
        )
    decode_declared_length(data)
    return f"{duration_s:.1f} s"
