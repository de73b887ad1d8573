"""The interface of views, which decode samples into examples and collate examples into batches.

Views do not depend on models, ranks, or sample order. Each view is one module of this package.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from muomni.config.models import FRAME_SUBSAMPLING, MEL_HOP
from muomni.data.sampling.lengths import Lengths
from muomni.data.shards.source import Source

Batch = dict[str, torch.Tensor]
# Entries that stay on the host: sizes that kernels are launched with.
HOST_KEYS = frozenset({"longest_document"})
Example = TypeVar("Example")


@dataclass(frozen=True, slots=True)
class Padding:
    """Multiples that the widths of padded tensors are rounded up to."""

    samples: int = 1  # of waveforms at 16 kHz
    tokens: int = 1  # characters of spoken texts, tokens of captions


# CPUs compute no more than needed. GPUs build kernels and plans for each new shape, and are faster on sizes
# that are multiples of 16: 0.64 s of audio are 16 frames of the encoder and of the codec.
EXACT = Padding()
COARSE = Padding(samples=16 * FRAME_SUBSAMPLING * MEL_HOP, tokens=32)


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `size`."""
    return -(-size // multiple) * multiple


class View(ABC, Generic[Example]):
    """Decodes samples into examples and collates examples into batches with a fixed set of keys.

    `unit` is the unit of `batch["units"]`, which throughput is measured in: tokens, audio_s, or images.
    `augments` says whether training samples are augmented at random, or have a seed for the model.
    """

    unit: str = "samples"
    augments: bool = False

    @abstractmethod
    def lengths(self, source: Source) -> Lengths:
        """Length of each sample in the unit of the stage's batching."""

    @abstractmethod
    def example(self, sample: dict[str, Any], random: np.random.Generator | None) -> Example:
        """Decode one sample, augmented with `random` (None in evaluation and without `augments`).

        Raises DataError for an unusable sample.
        """

    def reader(self, source: Source) -> "ExampleReader[Example]":
        """Return the reader of the examples of `source`, for a loader."""
        return ExampleReader(self, source)

    @abstractmethod
    def collate(self, sequences: list[list[Example]]) -> Batch:
        """Collate the examples of each sequence into tensors; a sequence may be empty.

        The tensor `units` (float, 0-d) is the size of the batch in `unit`. All keys are present even if
        no example is usable, so that every rank runs the same graph.
        """


class ExampleReader(Generic[Example]):
    """Reads examples of a source by sample id. Picklable, for the workers of a loader."""

    def __init__(self, view: View[Example], source: Source) -> None:
        self.view = view
        self.source = source

    def __call__(self, index: int, random: np.random.Generator | None) -> Example:
        """The example of sample `index`; raises DataError for an unusable sample."""
        return self.view.example(self.source.read(index), random)

    def expect(self, indices: np.ndarray) -> None:
        """Announce the samples (ids) to read next, in order, so that remote datasets prefetch them."""
        self.source.expect(indices)
