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
    """Decode a picture to uint8 [3, size, size], RGB; raises as `open_image`.

    The centre square is cut out and resized to `size` (bicubic, antialiased), as CLIP does at
    evaluation.
    """
    picture = centre_square(open_image(data, _REDUCING_GAP * size))
    return resized(picture, (size, size)).numpy()


def centre_square(picture: Image.Image) -> Image.Image:
    """The largest square around the centre, in whole pixels."""
    side = min(picture.size)
    left, top = ((length - side) // 2 for length in picture.size)
    return picture.crop((left, top, left + side, top + side))


def resized(picture: Image.Image, sides: tuple[int, int]) -> torch.Tensor:
    """An RGB picture as uint8 [3, height, width] of the wanted `sides` (width, height), bicubic and
    antialiased. The bytes do not depend on the processor's instructions."""
    # The values of a pixel stay side by side in memory, which torch's vector instructions need.
    batch = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    return interpolate(batch, sides[::-1], mode="bicubic", antialias=True)[0]
