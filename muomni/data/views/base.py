"""What a stage sees of its corpora: samples become examples, examples become a batch.

A view decodes and collates; it knows no model, no rank and no order. One file a view: `text_view`,
`speech_view`, `image_text_view`, `waveform_view`, `tts_view`, `conversation_view`.
"""

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from muomni.data.sampling.lengths import Lengths
from muomni.data.shards.source import Source

Batch = dict[str, torch.Tensor]
Example = TypeVar("Example")


class View(ABC, Generic[Example]):
    """Turns the bytes of samples into batches of tensors with a fixed set of keys.

    `unit` names what `units(batch)` counts, for throughput: tokens, audio_s, images. `augments` says
    that training samples are varied at random.
    """

    unit: str = "samples"
    augments: bool = False

    @abstractmethod
    def lengths(self, source: Source) -> Lengths:
        """Cost of each sample in the unit of the stage's batching."""

    @abstractmethod
    def example(self, sample: dict[str, Any], random: np.random.Generator | None) -> Example:
        """Decode one sample; `random` drives augmentation, None in evaluation and without `augments`.

        Raises DataError for a sample that cannot be used.
        """

    def reader(self, source: Source) -> "ExampleReader[Example]":
        """What a loader reads the examples of `source` with."""
        return ExampleReader(self, source)

    @abstractmethod
    def collate(self, rows: list[list[Example]]) -> Batch:
        """Put the examples of each row into tensors of fixed keys and types; a row may be empty.

        The tensor `units` (float, 0-d) counts the batch in `unit`. All keys are present even when
        no row holds a usable example, so that no rank ever runs another graph than its peers.
        """


class ExampleReader(Generic[Example]):
    """Gives the examples of a source by sample id; picklable, since the workers of a loader get it."""

    def __init__(self, view: View[Example], source: Source) -> None:
        self.view = view
        self.source = source

    def __call__(self, index: int, random: np.random.Generator | None) -> Example:
        """The view's `example` of one sample; raises DataError for one that cannot be used."""
        return self.view.example(self.source.read(index), random)

    def expect(self, indices: np.ndarray) -> None:
        """Say which samples (ids) are asked for next, in order, so that remote datasets fetch ahead."""
        self.source.expect(indices)
