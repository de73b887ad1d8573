"""Bytes of a picture to a square of pixels, as the stages see it.

Pillow decodes. torch resizes, by Pillow's own filter but in vector instructions: levels differ by one at
most, and it takes a fraction of the time.
"""

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from muomni.data.decode import open_image

# A JPEG is decoded at no less than this multiple of the size that it is then resized to: from 2 on the
# result is hardly told from that of the full size (Pillow's documentation of `reducing_gap`).
_REDUCING_GAP = 2


def decode_image(data: bytes, size: int) -> np.ndarray:
    """Decode a picture to uint8 [3, size, size], RGB, the values of a pixel side by side in memory;
    raises as `open_image`.

    The centre square is cut out and resized to `size` (bicubic, antialiased), as CLIP does at
    evaluation.
    """
    picture = centre_square(open_image(data, _REDUCING_GAP * size))
    return resized(picture, (size, size)).transpose(2, 0, 1)


def centre_square(picture: Image.Image) -> Image.Image:
    """The largest square around the centre, in whole pixels."""
    side = min(picture.size)
    left, top = ((length - side) // 2 for length in picture.size)
    return picture.crop((left, top, left + side, top + side))


def resized(picture: Image.Image, sides: tuple[int, int]) -> np.ndarray:
    """An RGB picture as uint8 [height, width, 3] of the wanted `sides` (width, height), bicubic and
    antialiased. The bytes do not depend on the processor's instructions."""
    # The values of a pixel stay side by side in memory, which torch's vector instructions need. torch sees
    # that by the strides, that of the batch included, so the batch is made before the axes are moved.
    batch = torch.from_numpy(np.array(picture))[None].permute(0, 3, 1, 2)
    pixels = interpolate(batch, sides[::-1], mode="bicubic", antialias=True)[0]
    return pixels.permute(1, 2, 0).numpy()
