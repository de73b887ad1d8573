"""Bytes of an image to a square of pixels, as the stages see it.

libjpeg-turbo decodes plain JPEGs into an array, Pillow everything else. torch resizes, by Pillow's own filter
but in vector instructions: levels differ by one at most, and it takes a fraction of the time.
"""

import io

import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image
from torch.nn.functional import interpolate

from muomni.data.media.decode import image_errors, open_image

# A JPEG is decoded at no less than this multiple of the size that it is then resized to: from 2 on the
# result is hardly told from that of the full size (Pillow's documentation of `reducing_gap`).
_REDUCING_GAP = 2
_JPEG_START = b"\xff\xd8"


def decode_image(data: bytes, size: int) -> np.ndarray:
    """Decode an image to uint8 [3, size, size], RGB, the values of a pixel side by side in memory;
    raises as `open_image`.

    The center square is cut out and resized to `size` (bicubic, antialiased), as CLIP does at
    evaluation.
    """
    smallest_side = _REDUCING_GAP * size
    pixels = plain_jpeg(data, smallest_side)
    if pixels is None:
        pixels = np.array(open_image(data, smallest_side))
    return resized(center_square(pixels), (size, size)).transpose(2, 0, 1)


def plain_jpeg(data: bytes, smallest_side: int) -> np.ndarray | None:
    """The pixels [height, width, 3] that `open_image` would give, in three quarters of its time.

    None for what is no JPEG in RGB, is to be turned or decoded at a smaller size, or not whole: Pillow
    knows all of these, and says what is wrong. Raises `DataError` for a header that cannot be read.
    """
    if not data.startswith(_JPEG_START):
        return None
    with image_errors():
        image = Image.open(io.BytesIO(data), formats=("JPEG",))
        is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    if image.mode != "RGB" or is_turned or min(image.size) >= 2 * smallest_side:
        return None
    try:
        return simplejpeg.decode_jpeg(data)
    except ValueError:
        return None


def center_square(pixels: np.ndarray) -> np.ndarray:
    """The largest square around the center of [height, width, 3], in whole pixels."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


def resized(pixels: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
    """An RGB image, uint8 [height, width, 3], at the wanted `sides` (width, height), bicubic and
    antialiased. The bytes do not depend on the processor's instructions."""
    # The values of a pixel stay side by side in memory, which torch's vector instructions need. torch sees
    # that by the strides, that of the batch included, so the batch is made before the axes are moved.
    batch = torch.from_numpy(np.ascontiguousarray(pixels))[None].permute(0, 3, 1, 2)
    wanted = interpolate(batch, sides[::-1], mode="bicubic", antialias=True)[0]
    return wanted.permute(1, 2, 0).numpy()
