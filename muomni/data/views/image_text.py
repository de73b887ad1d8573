"""Image-caption pairs for contrastive pretraining."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from muomni.config.models import Augmentation
from muomni.data.media.formats import only_medium
from muomni.data.media.image import decode_image
from muomni.data.sampling.lengths import Lengths
from muomni.data.shards.manifest import hash64
from muomni.data.shards.source import Source
from muomni.data.text.sample_texts import sample_captions
from muomni.data.text.tokenizer import Tokenizer
from muomni.data.views.base import EXACT, Batch, Padding, View, round_up
from muomni.errors import DataError

# The group of padding pairs; the loss knows it as PADDING_GROUP.
NO_GROUP = -1
# The columns of `groups`.
NUM_GROUPS = 3
IMAGE, CAPTION, CAPTIONS = range(NUM_GROUPS)


@dataclass(frozen=True, slots=True)
class Pair:
    """An image uint8 [3, S, S], one of its captions as token ids (with BOS and EOS), and group ids.

    Columns of the ids: equal for equal image files, for equal captions, and for samples with the same set
    of captions, any of which describes the image (such as prompts with the name of its class).
    """

    pixels: np.ndarray
    ids: list[int]
    groups: tuple[int, int, int]


class ImageTextView(View[Pair]):
    """Batches with one pair per sequence: images [B, 3, S, S] uint8, token_ids [B, L],
    token_lengths [B], groups [B, NUM_GROUPS] (-1 in the padding pairs of empty sequences, which come last).

    Training samples one caption per image, evaluation takes the first. Captions are truncated to
    `max_tokens`, keeping the EOS.
    """

    unit = "images"
    augments = True

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_size: int,
        max_tokens: int,
        augmentation: Augmentation | None,
        padding: Padding = EXACT,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.max_tokens = max_tokens
        self.augmentation = augmentation
        self.padding = padding

    def lengths(self, source: Source) -> Lengths:
        return Lengths(len(source), np.ones_like, "one each")

    def example(self, sample: dict[str, Any], random: np.random.Generator | None) -> Pair:
        all_captions = sample_captions(sample)
        caption = all_captions[0 if random is None else int(random.integers(len(all_captions)))]
        name, content = only_medium(sample, "image")
        try:
            pixels = decode_image(content, self.image_size)
        except DataError as error:
            raise DataError(f"{sample['__key__']}.{name}: {error}") from None
        if random is not None and self.augmentation is not None:
            pixels = _augmented(pixels, self.augmentation, random)
        groups = (_group(content), group_of(caption), group_of(*all_captions))
        return Pair(pixels, self.token_ids(caption), groups)

    def token_ids(self, caption: str) -> list[int]:
        """Token ids of a caption, the input of the text encoder."""
        ids = self.tokenizer.encode(caption)[: self.max_tokens - 2]
        return [self.tokenizer.bos_id, *ids, self.tokenizer.eos_id]

    def collate(self, sequences: list[list[Pair]]) -> Batch:
        pairs = [pair for sequence in sequences for pair in sequence]
        longest = max((len(pair.ids) for pair in pairs), default=1)
        size, width = len(sequences), min(round_up(longest, self.padding.tokens), self.max_tokens)
        images = torch.zeros(size, 3, self.image_size, self.image_size, dtype=torch.uint8)
        token_ids = torch.full((size, width), self.tokenizer.pad_id)
        token_lengths = torch.ones(size, dtype=torch.long)
        groups = torch.full((size, NUM_GROUPS), NO_GROUP)
        for index, pair in enumerate(pairs):
            images.numpy()[index] = (
                pair.pixels
            )  # numpy copies strided memory twice as fast as torch
            token_ids[index, : len(pair.ids)] = torch.tensor(pair.ids)
            token_lengths[index] = len(pair.ids)
            groups[index] = torch.tensor(pair.groups)
        return {
            "images": images,
            "token_ids": token_ids,
            "token_lengths": token_lengths,
            "groups": groups,
            "units": torch.tensor(float(len(pairs))),
        }


def image_group(sample: dict[str, Any]) -> int:
    """The group id of the image of a sample; raises DataError if it has none."""
    return _group(only_medium(sample, "image")[1])


def _augmented(
    pixels: np.ndarray, augmentation: Augmentation, random: np.random.Generator
) -> np.ndarray:
    """Scale and shift a square image [3, S, S]; uncovered pixels are white."""
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


def group_of(*captions: str) -> int:
    """The group id of a set of captions; their case, spaces, order, and repetitions do not matter."""
    return _group("\n".join(sorted({" ".join(caption.lower().split()) for caption in captions})))


def _group(content: str | bytes) -> int:
    return hash64(content) >> 1  # fits int64 and is never -1
