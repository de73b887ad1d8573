"""Images with captions, for contrastive learning."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from muomni.config.models import Augmentation
from muomni.data.media.decode import IMAGE_EXTENSIONS
from muomni.data.media.image import decode_image
from muomni.data.sampling.lengths import Lengths
from muomni.data.shards.manifest import hash64
from muomni.data.shards.source import Source
from muomni.data.text.tokenizer import Tokenizer
from muomni.data.views.base import Batch, View
from muomni.errors import DataError

# Marks rows that only fill a batch up; the loss knows it as PADDING_GROUP.
NO_GROUP = -1


@dataclass(frozen=True, slots=True)
class Pair:
    """An image uint8 [3, S, S], one of its captions as ids (BOS first, EOS last), and two numbers
    that equal images and equal captions share."""

    pixels: np.ndarray
    ids: list[int]
    groups: tuple[int, int]


class ImageTextView(View[Pair]):
    """Batches of exactly `num_rows` pairs: images [B, 3, S, S] uint8, token_ids [B, L],
    token_lengths [B], groups [B, 2] (-1 in a row that only fills up).

    Training takes any caption of an image, evaluation the first. A caption longer than
    `max_tokens` loses its end, but not the EOS.
    """

    unit = "images"
    augments = True

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_size: int,
        max_tokens: int,
        num_rows: int,
        augmentation: Augmentation | None,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.max_tokens = max_tokens
        self.num_rows = num_rows
        self.augmentation = augmentation

    def lengths(self, source: Source) -> Lengths:
        return Lengths(len(source), np.ones_like, "one each")

    def example(self, sample: dict[str, Any], random: np.random.Generator | None) -> Pair:
        all_captions = captions(sample)
        caption = all_captions[0 if random is None else int(random.integers(len(all_captions)))]
        groups = (group_of(sample["__key__"]), group_of(caption))
        return Pair(self.pixels(sample, random), self.token_ids(caption), groups)

    def pixels(self, sample: dict[str, Any], random: np.random.Generator | None) -> np.ndarray:
        """The image of a sample as uint8 [3, S, S], varied when `random` is given."""
        pixels = _pixels(sample, self.image_size)
        if random is not None and self.augmentation is not None:
            return _varied(pixels, self.augmentation, random)
        return pixels

    def token_ids(self, caption: str) -> list[int]:
        """A caption as the text tower reads it."""
        ids = self.tokenizer.encode(caption)[: self.max_tokens - 2]
        return [self.tokenizer.bos_id, *ids, self.tokenizer.eos_id]

    def collate(self, rows: list[list[Pair]]) -> Batch:
        pairs = [pair for row in rows for pair in row]
        width = max((len(pair.ids) for pair in pairs), default=1)
        images = torch.zeros(self.num_rows, 3, self.image_size, self.image_size, dtype=torch.uint8)
        token_ids = torch.full((self.num_rows, width), self.tokenizer.pad_id)
        token_lengths = torch.ones(self.num_rows, dtype=torch.long)
        groups = torch.full((self.num_rows, 2), NO_GROUP)
        for row, pair in enumerate(pairs):
            images.numpy()[row] = pair.pixels  # numpy moves the axes in half of torch's time
            token_ids[row, : len(pair.ids)] = torch.tensor(pair.ids)
            token_lengths[row] = len(pair.ids)
            groups[row] = torch.tensor(pair.groups)
        return {
            "images": images,
            "token_ids": token_ids,
            "token_lengths": token_lengths,
            "groups": groups,
            "units": torch.tensor(float(len(pairs))),
        }


def captions(sample: dict[str, Any]) -> list[str]:
    """All captions of a sample; raises DataError when it has none."""
    try:
        if "json" in sample:
            found = [str(caption) for caption in json.loads(sample["json"]).get("captions", [])]
        else:
            found = []
        found = found or [sample["txt"].decode("utf-8")]
    except (KeyError, ValueError, AttributeError, TypeError):
        raise DataError(f"sample '{sample['__key__']}' has no readable caption") from None
    return found


def _pixels(sample: dict[str, Any], size: int) -> np.ndarray:
    for extension in IMAGE_EXTENSIONS:
        if extension in sample:
            try:
                return decode_image(sample[extension], size)
            except DataError as error:
                raise DataError(f"{sample['__key__']}.{extension}: {error}") from None
    raise DataError(f"sample '{sample['__key__']}' has no image ({', '.join(IMAGE_EXTENSIONS)})")


def _varied(
    pixels: np.ndarray, augmentation: Augmentation, random: np.random.Generator
) -> np.ndarray:
    """Scale and move a square image within its size; what becomes free is white."""
    image = Image.fromarray(pixels.transpose(1, 2, 0))
    size = image.width
    if random.random() < augmentation.flip_probability:
        image = ImageOps.mirror(image)
    side = max(1, round(size * random.uniform(augmentation.min_scale, augmentation.max_scale)))
    low, high = min(0, size - side), max(0, size - side)
    left, top = (int(random.integers(low, high + 1)) for _ in range(2))
    canvas = Image.new("RGB", (size, size), "white")
    canvas.paste(image.resize((side, side), Image.Resampling.BICUBIC), (left, top))
    return np.array(canvas).transpose(2, 0, 1)


def group_of(text: str) -> int:
    """The number that stands for a key or a caption; captions that differ in case alone are equal."""
    return (
        hash64(text.strip().lower()) >> 1
    )  # int64 has no room for the highest bit, and -1 is taken
